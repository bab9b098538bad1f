"""The record of how a checkpoint came to be: `surgery.json`, and the card that people read."""

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.jsonfile import read_json_object, read_small_file
from surgery.checkpoint.refs import split_ref
from surgery.digest import ALGORITHM, PLACEHOLDER, Digests, combine
from surgery.errors import CheckpointError
from surgery.plan import Plan, identity

RECORD = "surgery.json"
KEY = "surgery"  # where a bare file's record lies in the header's own metadata
FORMAT = 1


def make_record(
    plan: Plan,
    digests: Digests,
    *,
    headers: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    shard_size: int | None = None,
) -> dict[str, Any]:
    """Return the record of a run; the same run gives the same bytes, so it holds no time.

    `Digests` without an entry give placeholders of the same length.

    Args:
        headers: per shard the digest of its header, by `header_digest`.
        files: per file beside the shards the SHA-256 of its bytes.
        shard_size: bytes of tensor data per file; None for a bare file.
    """
    told = {name: digests.told[name] for name in plan.order if name in digests.told}
    return {
        "surgery": FORMAT,
        "operation": plan.operation,
        "parameters": dict(plan.parameters),
        "inputs": [_input_record(plan, source, digests) for source in plan.sources],
        "facts": dict(plan.facts),
        "dropped": dict(plan.dropped),
        "steps": identity(plan),
        "digest": ALGORITHM,
        "outputs": {name: digests.outputs.get(name, PLACEHOLDER) for name in plan.order},
        **({"told": told} if told else {}),
        "shard_size": shard_size,
        "headers": dict(headers or {}),
        "files": dict(files or {}),
        "versions": _versions(plan),
    }


def header_digest(header: bytes, record: str | None = None) -> str:
    """Digest the bytes of a file before its data, without the record that a bare file has there."""
    own = json.dumps(record, ensure_ascii=False).encode() if record is not None else b""
    return hashlib.sha256(header.replace(own, b"") if own else header).hexdigest()


def sealed(record: Mapping[str, Any], *, indent: int | None = None, room: int = 0) -> str:
    """Write a record as JSON that ends in a digest of itself, so that an edit shows.

    Args:
        room: blanks to add behind, for a place of fixed length.
    """
    spaces = (",", ":") if indent is None else None
    open_record = {**record, "seal": PLACEHOLDER}
    text = json.dumps(open_record, indent=indent, separators=spaces, default=str) + " " * room
    head, _, tail = text.rpartition(PLACEHOLDER)
    return head + hashlib.sha256(text.encode()).hexdigest() + tail


def is_sealed(text: str) -> bool:
    """Whether the text of a record is byte for byte what `sealed` wrote."""
    at = text.rfind('"seal"')
    begin = text.find('"', at + len('"seal"')) + 1
    told, end = text[begin : begin + len(PLACEHOLDER)], begin + len(PLACEHOLDER)
    blank = text[:begin] + PLACEHOLDER + text[end:]
    return at >= 0 and hashlib.sha256(blank.encode()).hexdigest() == told


def _input_record(plan: Plan, source: Checkpoint, digests: Digests) -> dict[str, Any]:
    used: dict[Path, dict[str, TensorInfo]] = {file: {} for file in source.files}
    for step in plan.steps:
        for tensor in step.stored:
            if tensor.file in used:
                used[tensor.file][tensor.name] = tensor
    files = {
        source.file_names[file]: {
            "bytes": source.stamps[file][2],
            "tensors_read": len(tensors),
            "digest": _file_digest(file, tensors, digests),
        }
        for file, tensors in used.items()
    }
    return {"ref": source.ref, "revision": source.revision, "files": files}


def _file_digest(file: Path, tensors: Mapping[str, TensorInfo], digests: Digests) -> str:
    """Digest what was read of a file: name, dtype, shape and digest of each tensor, by name."""
    lines = []
    for name, tensor in sorted(tensors.items()):
        found = digests.inputs.get(f"{file}:{name}", PLACEHOLDER)
        lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {found}\n".encode())
    return combine(lines)


def _versions(plan: Plan) -> dict[str, str]:
    computed = any(not step.is_copy for step in plan.steps)
    names = ("torch",) if computed else ()
    return {
        "surgery": tool_version(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def tool_version() -> str:
    """Return the installed version of this distribution."""
    try:
        return version("model-surgery")
    except PackageNotFoundError:
        return "uninstalled"


def read_record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the record of a checkpoint, or None where it has none, as a base with adapters.

    Raises:
        CheckpointError: the record is there, and broken or of a later format.
    """
    if checkpoint.adapters:  # what lies there is the base's own
        return None
    if checkpoint.bare:
        place = checkpoint.files[0]
        text = checkpoint.metadata.get(KEY)
        record = _parse(text, place) if text is not None else None
    else:
        place = checkpoint.root / RECORD
        record = read_json_object(place) if place.exists() else None
    if record is not None and record.get("surgery") != FORMAT:
        fact = f"is a record of format {record.get('surgery')!r}, this version reads {FORMAT}"
        raise CheckpointError(place, fact, "use the version that wrote it")
    return record


def record_text(checkpoint: Checkpoint) -> str | None:
    """Return the record as it is written, or None where there is none."""
    if checkpoint.bare:
        return checkpoint.metadata.get(KEY)
    place = checkpoint.root / RECORD
    return read_small_file(place).decode("utf-8", "replace") if place.exists() else None


def _parse(text: str, place: Path) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CheckpointError(place, "holds a broken record in its header") from error
    if not isinstance(record, dict):
        raise CheckpointError(place, "holds a broken record in its header")
    return record


def model_card(plan: Plan) -> str:
    """Return the README of an output: what was done to what, and how to check it.

    Only names are told, never paths of the machine that made it.
    """
    library = "peft" if plan.adapter else "transformers"
    front = ["---", f"library_name: {library}", "tags:", "- surgery", f"- {plan.operation}"]
    if hub := [ref for source in plan.sources for ref in _hub_refs(source)]:
        front += ["base_model:", *(f"- {json.dumps(ref)}" for ref in hub)]
    names = ", ".join(_inline(source.name) for source in plan.sources)
    body = [
        f"# {_inline(plan.operation)} of {names}",
        "",
        _made(plan.facts.get("trained")),
        "",
        *_fenced(json.dumps({plan.operation: dict(plan.parameters)}, indent=2, default=str)),
        "",
        *(f"- {_inline(note)}" for note in plan.notes),
        "",
        f"The full record, with the digest of every tensor, is in `{RECORD}`. "
        "`surgery verify` checks this directory against it, `surgery reproduce` makes it again.",
    ]
    return "\n".join([*front, "---", "", *body]) + "\n"


def _made(trained: object) -> str:
    if not trained:
        return "Made by arithmetic on stored weights, without training."
    return f"Made by training after surgery ({_inline(str(trained))})."


def _hub_refs(source: Checkpoint) -> list[str]:
    """Return the hub names of a source, and of adapters that are added to it."""
    commits = source.revision.split("+") if source.revision else []
    refs = split_ref(source.ref) if len(commits) > 1 else (source.ref,)
    return [ref.partition("@")[0] for ref, commit in zip(refs, commits, strict=False) if commit]


def _inline(text: str) -> str:
    """Escape what Markdown or HTML would act on."""
    safe = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "`*_[]#|":
        safe = safe.replace(mark, f"\\{mark}")
    return safe


def _fenced(text: str) -> list[str]:
    """Fence text so that nothing in it can end the fence."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}json", *text.splitlines(), fence]
