"""Float arithmetic on parts of stored tensors, rounded once; the only torch in the engine."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import BITS, TensorInfo, View, read_rows, row_shape, rows_of
from surgery.digest import Leaves, checksums
from surgery.errors import ResultError
from surgery.plan import Part, Step, TensorSpec
from surgery.slices import Grid, Scratch, Sources

if TYPE_CHECKING:
    import torch

    Parts = Iterator[tuple[Part, list[torch.Tensor]]]

COMPUTABLE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
}  # fmt: skip
# What views read besides: torch's own dtypes where there are any, bytes for the others.
STORED = {
    **COMPUTABLE, "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip

Function = Callable[..., Any]


def torch_dtype(code: str) -> "torch.dtype":
    """Return torch's dtype for a safetensors code that can be computed with."""
    import torch

    found: torch.dtype = getattr(torch, COMPUTABLE[code])
    return found


def use_one_thread() -> None:
    """Keep torch to one thread: the engine has its own."""
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


class Reading:
    """Reads a step's inputs chunk by chunk, as one thread does.

    Attributes:
        leaves: per stored input the checksums of what was read, where it is to be identified.
    """

    def __init__(
        self,
        step: Step,
        grid: Grid,
        sources: Sources,
        scratch: Scratch,
        *,
        identify: bool = True,
    ) -> None:
        self.step, self.grid = step, grid
        self.sources, self.scratch = sources, scratch
        plain = [n for n, tensor in enumerate(step.inputs) if not isinstance(tensor, View)]
        self.leaves = {n: Leaves(checksums) for n in plain} if identify else {}

    def parts(self, start: int, count: int) -> "Parts":
        """Yield every part of `count` elements from `start`, with the inputs' floats in it."""
        for at in range(start, start + count, self.grid.chunk):
            size = min(self.grid.chunk, start + count - at)
            whole = [self._load(slot, at, size) for slot in range(len(self.step.inputs))]
            for part in self.grid.parts(at, size):
                begin = part.start - at
                yield part, self._floats([t[begin : begin + part.count] for t in whole])

    def sample(self) -> "Parts":
        """Yield one part made of blocks of the whole tensor."""
        import torch

        blocks = self.grid.blocks()
        found = [
            torch.cat([self._load(slot, at, size).clone() for at, size in blocks])
            for slot in range(len(self.step.inputs))
        ]
        yield Part(-1, 0, sum(size for _, size in blocks)), self._floats(found)

    def _floats(self, given: "list[torch.Tensor]") -> "list[torch.Tensor]":
        """Widen into buffers that are kept: their values last until the next part."""
        if self.step.fn is None:
            return given
        held = self.scratch.floats
        found = []
        for slot, flat in enumerate(given):
            code = float_type(flat, self.step.width)
            key = (slot, code)
            if key not in held or held[key].numel() < flat.numel():
                held[key] = flat.new_empty(flat.numel(), dtype=code)
            floats = held[key][: flat.numel()].copy_(flat)
            found.append(floats.view(-1, self.grid.row) if self.step.rows else floats)
        return found

    def _load(self, slot: int, start: int, count: int) -> "torch.Tensor":
        tensor = self.step.inputs[slot]
        if isinstance(tensor, View):
            read = stored_reader(self.sources)
            row = max(math.prod(row_shape(tensor.shape)), 1)
            rows: torch.Tensor = read_rows(read, tensor, start // row, count // row)
            return rows.reshape(-1)
        width = BITS[tensor.dtype] // 8
        view = self.scratch.take(slot, count * width)
        self.sources.read(tensor, start * width, view)
        if slot in self.leaves:
            self.leaves[slot].feed(view)
        return as_tensor(view, tensor.dtype)


def stored_reader(sources: Sources) -> Callable[[TensorInfo, int, int], "torch.Tensor"]:
    """Return what gives rows of a stored tensor in its stored dtype, for views."""

    def read(tensor: TensorInfo, start: int, count: int) -> "torch.Tensor":
        if isinstance(tensor, View):
            made: torch.Tensor = read_rows(read, tensor, start, count)
            return made
        row = tensor.nbytes // max(rows_of(tensor), 1)
        data = bytearray(row * count)
        sources.read(tensor, start * row, memoryview(data))
        shape = (count, *row_shape(tensor.shape)) if tensor.shape else (1,)
        return stored_tensor(data, tensor.dtype, shape)

    return read


def stored_tensor(data: bytearray, code: str, shape: tuple[int, ...]) -> "torch.Tensor":
    """See bytes as a tensor; where torch lacks the dtype, as bytes [rows, bytes of a row]."""
    import torch

    known = code in STORED
    dtype: torch.dtype = getattr(torch, STORED[code]) if known else torch.uint8
    if not len(data):
        return torch.empty(shape if known else (shape[0], 0), dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return flat.view(dtype).view(shape) if known else flat.view(shape[0], -1)


def write_parts(
    fn: Function,
    parts: "Parts",
    outputs: Sequence[tuple[str, TensorSpec]],
    buffers: Sequence[memoryview],
) -> Iterator[tuple[int, int]]:
    """Apply `fn(part, *inputs)` to parts; yield (first byte, bytes) as each buffer fills.

    Args:
        buffers: one per output, of which the same number of elements is filled each time.

    Raises:
        ResultError: the result is not finite.
    """
    targets = [as_tensor(b, spec.dtype) for b, (_, spec) in zip(buffers, outputs, strict=True)]
    room, filled, start = targets[0].numel(), 0, -1
    for part, inputs in parts:
        start = part.start if filled == 0 else start
        results = _as_tuple(fn(part, *inputs))
        for target, result, (name, _) in zip(targets, results, outputs, strict=True):
            store(target[filled : filled + part.count], result.reshape(-1), name)
        filled += part.count
        if filled == room:
            yield start, filled
            filled = 0
    if filled:
        yield start, filled


def compute_whole(
    step: Step, sources: Sources, digests: dict[int, Leaves]
) -> list[tuple[memoryview, str]]:
    """Apply a step's function to whole tensors; return each output's bytes.

    Raises:
        ResultError: a result is not finite or has another shape than planned.
    """
    import torch

    use_one_thread()
    read = stored_reader(sources)
    inputs = []
    for slot, tensor in enumerate(step.inputs):
        found = read(tensor, 0, rows_of(tensor))
        if slot in digests:
            digests[slot].feed(found.reshape(-1).view(torch.uint8).numpy().data)
        inputs.append(found.to(float_type(found, step.width)).view(tensor.shape))
        del found
    assert step.fn is not None  # noqa: S101 - told by the caller
    results = _as_tuple(step.fn(*inputs))
    return [_finished(r, n, spec) for r, (n, spec) in zip(results, step.outputs, strict=True)]


def _finished(result: "torch.Tensor", name: str, spec: TensorSpec) -> tuple[memoryview, str]:
    if tuple(result.shape) != spec.shape:
        raise ResultError(name, f"came out as {tuple(result.shape)}, planned was {spec.shape}")
    data = memoryview(bytearray(spec.nbytes))
    store(as_tensor(data, spec.dtype), result.reshape(-1), name)
    return data, name


def as_tensor(view: memoryview, code: str) -> "torch.Tensor":
    """See bytes as a flat tensor without copying them."""
    import torch

    dtype: torch.dtype = getattr(torch, STORED[code])
    return torch.frombuffer(view, dtype=dtype) if len(view) else torch.empty(0, dtype=dtype)


def float_type(tensor: "torch.Tensor", width: int) -> "torch.dtype":
    """Return floats of at least `width` bytes; float64 stays what it is."""
    import torch

    double = tensor.dtype == torch.float64 or width == 8  # noqa: PLR2004 - bytes
    return torch.float64 if double else torch.float32


def _as_tuple(result: object) -> tuple["torch.Tensor", ...]:
    return result if isinstance(result, tuple) else (result,)


def store(target: "torch.Tensor", result: "torch.Tensor", name: str) -> None:
    """Round a result into its place.

    Raises:
        ResultError: it is not finite, or has another size.
    """
    import torch

    if result.numel() != target.numel():  # one element would be copied to all
        given, planned = result.numel(), target.numel()
        raise ResultError(name, f"came out with {given} elements, planned were {planned}")
    target.copy_(result)
    # A sum is 40 times as fast as isfinite, and finite only if all terms are.
    told = torch.float32 if target.dtype == torch.float16 else None
    if not math.isfinite(float(target.sum(dtype=told))) and not bool(target.isfinite().all()):
        fact = "the result holds NaN or infinity"
        raise ResultError(name, fact, "check the inputs with `surgery verify`, or the parameters")
