"""Make a checkpoint again from its record, and compare."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.adapters import WEIGHTS
from surgery.checkpoint.refs import pinned, split_ref
from surgery.engine import Progress
from surgery.errors import CheckpointError, RecipeError, VerificationError
from surgery.plan import Plan
from surgery.provenance import RECORD, read_record
from surgery.run import dry_digests, run
from surgery.shards import SHARD_SIZE

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What an operation does when it is run by hand.

    Attributes:
        compile_plan: takes the opened inputs and, by keyword, the recorded parameters.
        open_input: takes a ref and, by keyword, `weights`, the file to take.
    """

    compile_plan: Callable[..., Plan]
    open_input: Callable[..., Checkpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What came out.

    Attributes:
        operation: what was done again.
        identical: how many tensors came out as recorded.
        inputs: what is different about the inputs.
        outputs: what is different about the outputs.
        versions: programs of another version than recorded, as sentences.
    """

    operation: str
    identical: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    versions: tuple[str, ...]


def reproduce(
    checkpoint: Checkpoint,
    find_operation: Callable[[str], Operation],
    *,
    moved: Mapping[str, str] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> Reproduction:
    """Do again what the record of a checkpoint says, and compare every tensor's digest.

    Args:
        find_operation: the operation by its recorded name.
        moved: recorded ref of an input to where it is now.
        out: where to write the result; by default only digests are computed.
        progress: called about ten times a second with bytes done and in all.
        limits: workers, memory and what else `run` takes.

    Raises:
        CheckpointError: there is no usable record, or an input cannot be opened.
        RecipeError: `moved` names no input of the record.
        VerificationError: an input is not the one recorded, which shows before it is read.
    """
    record = _usable_record(checkpoint)
    operation = find_operation(str(record["operation"]))
    sources = _open_inputs(record, operation, moved or {})
    plan = _compile(checkpoint, record, operation, sources)
    if out is not None:
        limits.setdefault("shard_size", record.get("shard_size") or SHARD_SIZE)
        made: Record = run(plan, out, progress=progress, **limits).record
    else:
        made = dry_digests(plan, progress=progress, **limits)
    return Reproduction(
        operation=str(record["operation"]),
        identical=sum(record["outputs"].get(n) == d for n, d in made["outputs"].items()),
        inputs=tuple(_changed_inputs(record, made)),
        outputs=tuple(_changed_outputs(checkpoint, record, made, plan)),
        versions=tuple(_other_versions(record, made)),
    )


def _usable_record(checkpoint: Checkpoint) -> Record:
    record = read_record(checkpoint)
    if record is None:
        place = checkpoint.files[0] if checkpoint.bare else checkpoint.root
        raise CheckpointError(place, "has no record of how it was made", "surgery wrote none here")
    shapes = {"parameters": dict, "inputs": list, "outputs": dict, "files": dict, "versions": dict}
    wrong = next((k for k, kind in shapes.items() if not isinstance(record.get(k), kind)), None)
    inputs = record.get("inputs")
    if wrong is None and all(_is_input(entry) for entry in inputs or ()):
        return record
    fact = f"has no usable {wrong!r}" if wrong else "has no usable 'inputs'"
    raise CheckpointError(checkpoint.root / RECORD, fact, "restore the record")


def _is_input(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("ref"), str)
        and isinstance(entry.get("files"), dict)
        and all(isinstance(told, dict) for told in entry["files"].values())
    )


def _open_inputs(
    record: Record, operation: Operation, moved: Mapping[str, str]
) -> tuple[Checkpoint, ...]:
    refs = [entry["ref"] for entry in record["inputs"]]
    unknown = next((ref for ref in moved if ref not in refs), None)
    if unknown is not None:
        remedy = f"the record names {', '.join(refs)}"
        raise RecipeError(f"--input {unknown}", "is no input of the record", remedy)
    return tuple(_open_input(entry, operation, moved) for entry in record["inputs"])


def _open_input(entry: Record, operation: Operation, moved: Mapping[str, str]) -> Checkpoint:
    ref, revision = entry["ref"], entry.get("revision")
    place = moved.get(ref) or pinned(ref, revision)
    gone = any(not Path(part).expanduser().exists() for part in split_ref(ref))
    if not revision and ref not in moved and gone:
        fact = "is an input of the record, and is no longer there"
        raise CheckpointError(ref, fact, f"say where it is now: --input {ref}=NEW")
    source = operation.open_input(place, weights=_choice(entry, place))
    found = {name: source.stamps[file][2] for file, name in source.file_names.items()}
    told = {name: facts.get("bytes") for name, facts in entry["files"].items()}
    if source.bare:  # a file may have another name now
        found, told = ({str(n): v for n, v in enumerate(sizes.values())} for sizes in (found, told))
    if found != told:
        name = next(n for n in {**told, **found} if told.get(n) != found.get(n)) or place
        fact = (
            f"is not the input recorded: {name} has {found.get(name)} bytes, not {told.get(name)}"
        )
        raise VerificationError(place, fact)
    return source


def _choice(entry: Record, place: str) -> str | None:
    """Return the weight file to take where a directory holds several."""
    names = [name for name in entry["files"] if not name.startswith(WEIGHTS)]
    folder = Path(split_ref(place)[0]).expanduser()
    if len(names) == 1 and (folder / names[0]).exists():
        return str(names[0])
    both = ("model.safetensors", "model.safetensors.index.json")
    return both[1] if all((folder / name).exists() for name in both) else None


def _compile(
    checkpoint: Checkpoint, record: Record, operation: Operation, sources: Sequence[Checkpoint]
) -> Plan:
    place = checkpoint.files[0] if checkpoint.bare else checkpoint.root / RECORD
    try:
        return operation.compile_plan(*sources, **record["parameters"])
    except (TypeError, ValueError, AttributeError) as error:  # nobody vouches for a record
        fact = f"has parameters that {record['operation']} does not take ({error})"
        raise CheckpointError(place, fact, "use the version it names") from error


def _changed_inputs(record: Record, made: Record) -> list[str]:
    changed = []
    for told, found in zip(record["inputs"], made["inputs"], strict=True):
        digests = [[facts.get("digest") for facts in e["files"].values()] for e in (told, found)]
        names = [
            name for name, before, now in zip(told["files"], *digests, strict=True) if before != now
        ]
        changed += [f"{found['ref']}: {name} is not what was recorded" for name in names]
    return changed


def _changed_outputs(checkpoint: Checkpoint, record: Record, made: Record, plan: Plan) -> list[str]:
    told, found, specs = record["outputs"], made["outputs"], plan.outputs
    changed = [f"{name}: was not made again" for name in told if name not in found]
    for name, digest in found.items():
        there = checkpoint.tensors.get(name)
        if name not in told:
            changed.append(f"{name}: is new")
        elif digest != told[name]:
            changed.append(f"{name}: came out different")
        elif there and (there.dtype, there.shape) != (specs[name].dtype, specs[name].shape):
            changed.append(f"{name}: came out as {specs[name].dtype} {list(specs[name].shape)}")
    files = [n for n in made["files"] if n in record["files"] and _is_compared(n)]
    differing = [n for n in files if made["files"][n] != record["files"][n]]
    return changed + [f"{name}: came out different" for name in differing]


def _is_compared(name: str) -> bool:
    """Whether a file depends on nothing but the inputs: names and shard sizes may differ."""
    return name != "README.md" and not name.endswith(".index.json")


def _other_versions(record: Record, made: Record) -> list[str]:
    return [
        f"{name} is {made['versions'].get(name, 'not here')}, the record has {version}"
        for name, version in record["versions"].items()
        if made["versions"].get(name) != version
    ]
