"""What a checkpoint is made of, told from headers, config and small files alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from surgery.anatomy import PART_ORDER, Anatomy, Stack, anatomy, dig
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError
from surgery.provenance import read_record
from surgery.survey.dimensions import dimensions, expert_counts
from surgery.survey.layers import LayerGroup, Layers, describe_layers
from surgery.survey.tokenizer import Tokenizer, find_tokenizer

__all__ = ["Count", "File", "LayerGroup", "Layers", "OtherStack", "Survey", "Tokenizer", "survey"]

Kinds = Callable[[Mapping[str, Any], Anatomy], list[str] | None]
Found = TypeVar("Found")
EXTRA = "extra layers"
ORDER = (*PART_ORDER, EXTRA)


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Tensors of one part or dtype: how many, their elements, their bytes."""

    name: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherStack:
    """A numbered series of modules beside the model's own layers."""

    prefix: str
    layers: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the checkpoint, its bytes, and how many tensors it holds."""

    name: str
    bytes: int
    tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What `surgery inspect` tells; `as_dict` is its JSON.

    Attributes:
        kind: "file", "directory" or "hub".
        family: `model_type` of the config, or "unknown".
        parameters: stored elements of all tensors; a tied head counts once.
        active: parameters that one token passes through; None but for a mixture of experts.
        parts, dtypes: what the elements are for, and what they are stored as.
        layers: None where none were found.
        dimensions: widths, heads, vocabulary and context, as far as they are told.
        embedding, head: names of the tensors.
        record: what made it, by its `surgery.json`; None where there is none.
        notes: what a user should know, and what could not be told and why.
    """

    ref: str
    name: str
    kind: str
    revision: str | None
    family: str
    architectures: tuple[str, ...]
    tensors: int
    parameters: int
    bytes: int
    active: int | None
    parts: tuple[Count, ...]
    dtypes: tuple[Count, ...]
    layers: Layers | None
    dimensions: Mapping[str, int | float]
    embedding: str | None
    head: str | None
    tied: bool
    lost_head: bool
    experts: Mapping[str, int] | None
    other_stacks: tuple[OtherStack, ...]
    quantization: str | None
    tokenizer: Tokenizer | None
    files: tuple[File, ...]
    record: Mapping[str, Any] | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def survey(checkpoint: Checkpoint, *, kinds: Kinds | None = None) -> Survey:
    """Tell what a checkpoint is made of; what cannot be told becomes a note.

    Args:
        kinds: tells from config and anatomy what kind each layer is.
    """
    notes = list(checkpoint.notes)
    parts, config = _anatomy(checkpoint, notes), checkpoint.config or {}
    text = dig(config, parts.section) if parts else config
    experts = expert_counts(text, parts.experts) if parts else None
    found = Survey(
        ref=checkpoint.ref,
        name=checkpoint.name,
        kind="file" if checkpoint.bare else "hub" if checkpoint.revision else "directory",
        revision=checkpoint.revision,
        family=str(config.get("model_type") or "unknown"),
        architectures=tuple(str(name) for name in _listed(config.get("architectures"))),
        tensors=len(checkpoint.tensors),
        parameters=sum(t.numel for t in checkpoint.tensors.values()),
        bytes=checkpoint.nbytes,
        active=_active(checkpoint, parts, experts),
        parts=_parts(checkpoint, parts) if parts else (),
        dtypes=_dtypes(checkpoint),
        layers=_layers(checkpoint, parts, kinds, notes) if parts else None,
        dimensions=dimensions(checkpoint, text, parts),
        embedding=parts.embedding if parts else None,
        head=parts.head if parts else None,
        tied=parts.tied if parts else False,
        lost_head=parts.lost_head if parts else False,
        experts=experts,
        other_stacks=tuple(_stack(checkpoint, s) for s in parts.other_stacks) if parts else (),
        quantization=_quantization(config),
        tokenizer=_tried(lambda: find_tokenizer(checkpoint), notes),
        files=_files(checkpoint),
        record=_tried(lambda: _record(checkpoint), notes),
        notes=(),
    )
    return replace(
        found, notes=(*notes, *_remarks(found, text, has_config=checkpoint.config is not None))
    )


def _tried(look: Callable[[], Found], notes: list[str]) -> Found | None:
    """Return what a look finds; where it cannot, note why."""
    try:
        return look()
    except CheckpointError as error:
        notes.append(str(error))
        return None


def _anatomy(checkpoint: Checkpoint, notes: list[str]) -> Anatomy | None:
    """Find the parts by config and tensors; where they disagree, by the tensors alone."""
    found = _tried(lambda: anatomy(checkpoint), notes)
    if found or checkpoint.config is None:
        return found
    return _tried(lambda: anatomy(replace(checkpoint, config=None)), [])


def _listed(value: object) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _count(name: str, tensors: Iterable[TensorInfo]) -> Count:
    kept = list(tensors)
    return Count(
        name=name,
        tensors=len(kept),
        parameters=sum(t.numel for t in kept),
        bytes=sum(t.nbytes for t in kept),
    )


def _parts(checkpoint: Checkpoint, parts: Anatomy) -> tuple[Count, ...]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for name, tensor in checkpoint.tensors.items():
        groups[EXTRA if _is_extra(parts, name) else parts.part(name)].append(tensor)
    return tuple(_count(name, groups[name]) for name in ORDER if name in groups)


def _dtypes(checkpoint: Checkpoint) -> tuple[Count, ...]:
    groups: dict[str, list[TensorInfo]] = defaultdict(list)
    for tensor in checkpoint.tensors.values():
        groups[tensor.dtype].append(tensor)
    found = [_count(code, tensors) for code, tensors in groups.items()]
    return tuple(sorted(found, key=lambda count: (-count.bytes, count.name)))


def _active(
    checkpoint: Checkpoint, parts: Anatomy | None, experts: Mapping[str, int] | None
) -> int | None:
    """Count the parameters that one token meets: all but the experts it is not sent to."""
    if parts is None or experts is None or "per_token" not in experts:
        return None
    own = [t for n, t in checkpoint.tensors.items() if not _is_extra(parts, n)]
    routed = sum(t.numel for t in own if _is_routed(parts, t.name))
    idle = routed * (experts["per_layer"] - experts["per_token"]) // experts["per_layer"]
    return sum(t.numel for t in own) - idle


def _is_extra(parts: Anatomy, name: str) -> bool:
    place = parts.locate(name)
    return place is not None and place[0] >= parts.layers


def _is_routed(parts: Anatomy, name: str) -> bool:
    place = parts.locate(name)
    return place is not None and "experts" in place[1].split(".")


def _layers(
    checkpoint: Checkpoint, parts: Anatomy, kinds: Kinds | None, notes: list[str]
) -> Layers:
    told = kinds(checkpoint.config, parts) if kinds and checkpoint.config else None
    if told is not None and len(told) != parts.layers:
        notes.append(f"the config tells the kinds of {len(told)} layers, there are {parts.layers}")
        told = None
    return describe_layers(checkpoint, parts, told)


def _stack(checkpoint: Checkpoint, stack: Stack) -> OtherStack:
    names = [stack.name(n, rest) for n, layer in stack.layers.items() for rest in layer]
    total = sum(checkpoint.tensors[name].numel for name in names)
    return OtherStack(prefix=stack.prefix, layers=len(stack.layers), parameters=total)


def _quantization(config: Mapping[str, Any]) -> str | None:
    told = config.get("quantization_config")
    return str(told.get("quant_method") or "unnamed") if isinstance(told, dict) else None


def _files(checkpoint: Checkpoint) -> tuple[File, ...]:
    tensors = Counter(tensor.file for tensor in checkpoint.tensors.values())
    config = (checkpoint.root / "config.json",) if checkpoint.config is not None else ()
    return tuple(
        File(
            name=checkpoint.file_names.get(path) or str(path.relative_to(checkpoint.root)),
            bytes=path.stat().st_size,
            tensors=tensors.get(path, 0),
        )
        for path in (*checkpoint.files, *config, *checkpoint.carried)
    )


def _record(checkpoint: Checkpoint) -> dict[str, Any] | None:
    record = read_record(checkpoint)
    if record is None:
        return None
    inputs = [i.get("ref") for i in _listed(record.get("inputs")) if isinstance(i, dict)]
    kept = {key: record.get(key) for key in ("operation", "parameters", "versions")}
    return {**kept, "inputs": inputs}


def _remarks(found: Survey, text: Mapping[str, Any], *, has_config: bool) -> list[str]:
    """Tell what does not fit together, though it need not be wrong."""
    notes = []
    if found.quantization:
        notes.append(
            f"quantized ({found.quantization}): a stored element may hold several parameters"
        )
    if found.lost_head:
        notes.append("the config promises an output head of its own (lm_head), but there is none")
    if found.kind != "file" and not has_config:
        notes.append("there is no config.json, so nothing can load the weights")
    if found.head and text.get("tie_word_embeddings"):
        notes.append(f"the config ties the head to the embedding, but {found.head} is stored too")
    rows, tokens = found.dimensions.get("vocabulary"), found.tokenizer and found.tokenizer.tokens
    if rows and tokens and tokens > rows:
        notes.append(f"the tokenizer has {tokens} tokens, the embedding only {rows} rows")
    return notes
