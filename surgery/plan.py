"""A plan: independent steps from stored tensors to named new tensors, decided before any read."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint import BITS, Checkpoint, TensorInfo, View, stamp, stored_tensors
from surgery.checkpoint.layout import CARRIED_FOLDERS
from surgery.errors import PlanError

# Files beside the weights that no plan gives the bytes of.
MADE_BY_THE_RUN = ("config.json", "model.safetensors.index.json", "README.md", "surgery.json")
# A function over float tensors; torch is not imported here, so its tensors are Any.
Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Dtype (safetensors code) and shape of a tensor, known before anything is read."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a tensor a function is given: `count` elements from the flat `start` on.

    Parts lie on a fixed grid, so that nothing depends on how a run is cut into work items. A
    sample, picked from the whole tensor, has index -1.
    """

    index: int
    start: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A request for one reading of a step's inputs, yielded by the generator of a `passes` step.

    Attributes:
        fn: called as `fn(part, *inputs)` for every part; what it returns is kept in memory.
        sample: call `fn` once, with elements picked evenly from the whole tensor.
        group: wait for every step that asks for this group, and combine over all of them.
        combine: with `group`, called once with one list of results per step, in plan order.
        fold: makes one of what a part and all before it gave, and of what the next part gives, in
            order; the list of results holds that one, or nothing where there are no parts.
    """

    fn: Function
    sample: bool = False
    group: str = ""
    combine: Callable[[list[list[Any]]], Any] | None = None
    fold: Callable[[Any, Any], Any] | None = None


class Tell:
    """Figures that the generator of a step of passes, or a streamed one, tells for the record."""

    def __init__(self, **figures: float) -> None:
        self.figures = {name: float(figure) for name, figure in figures.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pure function from stored tensors to named new ones.

    Without `fn`, one input is copied byte for byte to every output; no input means zeros.
    With `fn`, the inputs come as float32 tensors (float64 where an output is F32 or F64, or an
    input F64) and the result, one tensor per output, is rounded once to the output's dtype.

    How `fn` is called: whole tensors in their stored shapes; with `elementwise`, equal flat
    slices; with `passes`, `fn()` is a generator that yields `Pass` requests, is sent the list of
    their results in order (with `group`: what `combine` made, and the step's place in the
    group), may yield `Tell`, and returns a function `(part, *inputs)` for the last reading.

    Attributes:
        rows: parts are whole rows, all axes behind the first as one; 1-D tensors are one row.
        plain: `fn`, or what its passes call, uses operators only, so that it may be given numpy
            arrays and torch stays out.
        scratch: bytes `fn` needs beyond its inputs and outputs, for steps that are not sliced.
        streamed: `fn` is given `surgery.stored.Stored` tensors, reads what it indexes, and
            returns an iterator of its outputs' pieces in order, and may give `Tell` among them;
            `scratch` is all it holds.
        why: what the step does, in a word or two, for `--dry-run`.
        key: tells steps apart that differ in nothing but numbers, for the fingerprint.
        groups: the groups of its passes, in their order, so that others know to wait for it.
        tells: names of the figures that it may tell.
    """

    outputs: tuple[tuple[str, TensorSpec], ...]
    inputs: tuple[TensorInfo, ...] = ()
    fn: Function | None = None
    elementwise: bool = False
    passes: bool = False
    rows: bool = False
    plain: bool = False
    scratch: int = 0
    streamed: bool = False
    why: str = "copy"
    key: str = ""
    groups: tuple[str, ...] = ()
    tells: tuple[str, ...] = ()

    @property
    def is_copy(self) -> bool:
        """Whether bytes are copied as they are."""
        return self.fn is None and not self.has_views

    @property
    def has_views(self) -> bool:
        """Whether an input is made when it is read."""
        return any(isinstance(tensor, View) for tensor in self.inputs)

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """What the step reads from disk."""
        return tuple(part for tensor in self.inputs for part in stored_tensors(tensor))

    @property
    def bytes_in(self) -> int:
        """Bytes read from disk."""
        return sum(tensor.nbytes for tensor in self.stored)

    @property
    def bytes_out(self) -> int:
        """Bytes written to disk."""
        return sum(spec.nbytes for _, spec in self.outputs)

    @property
    def is_sliced(self) -> bool:
        """Whether the engine may work on the step piece by piece."""
        return self.fn is None or self.elementwise or self.passes

    @property
    def whole_bytes(self) -> int:
        """Memory the step holds at once when it cannot be sliced: what is stored, and floats."""
        if self.is_sliced:
            return 0
        if self.streamed:
            return self.scratch + sum(t.held for t in self.inputs if isinstance(t, View))
        numbers = sum(t.numel for t in self.inputs) + sum(s.numel for _, s in self.outputs)
        return self.width * numbers + self.bytes_in + self.bytes_out + self.scratch

    @property
    def width(self) -> int:
        """Bytes of the floats that are computed with; those of all inputs are alike."""
        double = any(spec.dtype in {"F32", "F64"} for _, spec in self.outputs)
        return 8 if double or any(tensor.dtype == "F64" for tensor in self.inputs) else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that a run does, and what it leaves beside the weights.

    Attributes:
        operation: the operation's name, with `parameters` what `reproduce` repeats.
        sources: the opened inputs, the first being the donor of config and files.
        steps: independent; they share nothing.
        order: output tensor names in the order they are laid out on disk.
        config: the new config.json; None for a bare .safetensors output.
        adapter: the output is a LoRA adapter, and `config` its adapter_config.json.
        carried: files copied beside the weights, unchanged.
        written: name to bytes of files made anew beside the weights; of a carried file of the same
            name only these are taken.
        dropped: source tensors that reach no output, with the reason.
        facts: what later commands need to know (layer map, trainable layers), recorded.
        notes: what the user should know.
        reader: how the sources are read where they are no safetensors files: takes `sources`,
            gives what `surgery.slices.Sources` is.
    """

    operation: str
    parameters: Mapping[str, Any]
    sources: tuple[Checkpoint, ...]
    steps: tuple[Step, ...]
    order: tuple[str, ...]
    config: dict[str, Any] | None
    carried: tuple[Path, ...] = ()
    written: Mapping[str, bytes] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reader: Callable[..., Any] | None = None
    adapter: bool = False

    @property
    def stem(self) -> str:
        """What the weight files are called, before number and suffix."""
        return "adapter_model" if self.adapter else "model"

    @property
    def config_name(self) -> str:
        """The name of the config beside the weights."""
        return "adapter_config.json" if self.adapter else "config.json"

    @property
    def one_file(self) -> bool:
        """Whether the weights are one file, whatever their size."""
        return self.bare or self.adapter

    @property
    def bare(self) -> bool:
        """Whether the output is one .safetensors file."""
        return self.config is None

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """Every output tensor, in the order of layout."""
        specs = {name: spec for step in self.steps for name, spec in step.outputs}
        return {name: specs[name] for name in self.order}

    @property
    def bytes_in(self) -> int:
        """Bytes read."""
        return sum(step.bytes_in for step in self.steps)

    @property
    def bytes_out(self) -> int:
        """Bytes of tensor data written."""
        return sum(step.bytes_out for step in self.steps)


def check_plan(plan: Plan) -> Plan:
    """Return the plan after checking that it accounts for every tensor.

    Raises:
        PlanError: an output named twice or not laid out, a copy that changes size, or a source
            tensor that is neither used nor dropped for a reason.
    """
    names = [name for step in plan.steps for name, _ in step.outputs]
    twice = next((name for name, count in _counts(names).items() if count > 1), None)
    if twice is not None:
        raise PlanError(twice, "two steps of the plan write this tensor")
    if set(names) != set(plan.order) or len(plan.order) != len(names):
        raise PlanError(plan.operation, "the plan's layout does not name each output once")
    for step in plan.steps:
        _check_sizes(step)
    _check_written(plan)
    used = {(t.file, t.name) for step in plan.steps for t in step.stored}
    for source in plan.sources:
        for name, tensor in source.tensors.items():
            lost = any((part.file, part.name) not in used for part in stored_tensors(tensor))
            if lost and name not in plan.dropped:
                raise PlanError(source.ref, f"the plan loses the tensor {name!r}")
    return plan


def _check_written(plan: Plan) -> None:
    for name in plan.written:
        if plan.bare:
            raise PlanError(name, "a bare file has no other file beside it")
        folder, _, plain = name.rpartition("/")
        sound = plain != "" and Path(plain).name == plain and folder in ("", *CARRIED_FOLDERS)
        if not sound or name in MADE_BY_THE_RUN or name.endswith(".safetensors"):
            raise PlanError(name, "the plan may not write a file of this name")


def _counts(names: list[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _check_sizes(step: Step) -> None:
    if step.fn is None and len(step.inputs) > 1:
        raise PlanError(step.outputs[0][0], "a copy has one input")
    counted = step.elementwise or step.passes
    sized = [t.nbytes for t in step.inputs] if step.fn is None else []
    if counted:
        sized = [t.numel for t in step.inputs]
    for name, spec in step.outputs:
        size = spec.numel if counted else spec.nbytes
        if any(size != given for given in sized):
            raise PlanError(name, "the plan gives it another size than its source")


def fingerprint(plan: Plan, shard_size: int) -> str:
    """Return a digest of all that decides the output's bytes, inputs' identity included.

    A run resumes only what a run with the same fingerprint left behind.
    """
    told = {
        "operation": plan.operation,
        "parameters": plan.parameters,
        "sources": [
            [source.ref, [[str(file), *stamp] for file, stamp in source.stamps.items()]]
            for source in plan.sources
        ],
        "outputs": {n: [s.dtype, s.shape] for n, s in plan.outputs.items()},
        "steps": [
            [s.why, s.key, [told_input(t) for t in s.inputs], [n for n, _ in s.outputs]]
            for s in plan.steps
        ],
        "carried": [[str(path), *stamp(path)] for path in plan.carried],
        "written": {n: hashlib.sha256(data).hexdigest() for n, data in plan.written.items()},
        "config": plan.config,
        "shard_size": shard_size,
    }
    text = json.dumps(told, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(plan: Plan) -> str:
    """Return a digest of what the steps do, whatever the inputs hold and wherever they lie."""
    sources = {file: n for n, source in enumerate(plan.sources) for file in source.files}
    told = [
        [
            *(s.why, s.key, [[t.dtype, t.shape, told_input(t)] for t in s.inputs]),
            [sources.get(t.file, t.file.name) for t in s.stored],
            [[name, spec.dtype, spec.shape] for name, spec in s.outputs],
        ]
        for s in plan.steps
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def told_input(tensor: TensorInfo) -> object:
    """Return what identifies an input of a step beside its file."""
    if not isinstance(tensor, View):
        return tensor.name
    return [tensor.name, tensor.why, tensor.key, [part.name for part in tensor.stored]]
