"""Arithmetic on parts of stored tensors with numpy alone, for functions that use only operators.

Does what `surgery.compute` does, to the bit, without the second and the 200 MB that torch takes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import BITS
from surgery.digest import Leaves, checksums
from surgery.errors import ResultError
from surgery.plan import Part, Step, TensorSpec
from surgery.slices import Grid, Scratch, Sources

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]

STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "uint16"}
HALF, ODD = 0x7FFF, 1  # rounding to even: half of what is cut off, and one more for odd results


def can_compute(step: Step) -> bool:
    """Whether numpy is enough for a step."""
    codes = [t.dtype for t in step.inputs] + [spec.dtype for _, spec in step.outputs]
    sliced = (step.elementwise or step.passes) and not step.rows and not step.has_views
    return step.plain and sliced and set(codes) <= set(STORED)


class Reading:
    """Reads a step's inputs chunk by chunk, as one thread does.

    Attributes:
        leaves: per input the checksums of what was read, where it is to be identified.
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
        known = len(step.inputs) if identify else 0
        self.leaves = {n: Leaves(checksums) for n in range(known)}

    def parts(self, start: int, count: int) -> "Iterator[tuple[Part, list[Floats]]]":
        """Yield every part of `count` elements from `start`, with the inputs' floats in it.

        The floats lie in buffers that are kept: their values last until the next part.
        """
        for at in range(start, start + count, self.grid.chunk):
            size = min(self.grid.chunk, start + count - at)
            whole = [self._load(slot, at, size) for slot in range(len(self.step.inputs))]
            for part in self.grid.parts(at, size):
                begin = part.start - at
                cut = [held[begin : begin + part.count] for held in whole]
                yield part, [self._widen(slot, held) for slot, held in enumerate(cut)]

    def sample(self) -> "Iterator[tuple[Part, list[Floats]]]":
        """Yield one part made of blocks of the whole tensor."""
        import numpy as np

        blocks = self.grid.blocks()
        found = []
        for slot in range(len(self.step.inputs)):
            held = np.concatenate([self._load(slot, at, size).copy() for at, size in blocks])
            found.append(self._widen(slot, held))
        yield Part(-1, 0, sum(size for _, size in blocks)), found

    def _load(self, slot: int, start: int, count: int) -> "NDArray[Any]":
        import numpy as np

        tensor = self.step.inputs[slot]
        width = BITS[tensor.dtype] // 8
        view = self.scratch.take(slot, count * width)
        self.sources.read(tensor, start * width, view)
        if slot in self.leaves:
            self.leaves[slot].feed(view)
        return np.frombuffer(view, STORED[tensor.dtype])

    def _widen(self, slot: int, held: "NDArray[Any]") -> "Floats":
        import numpy as np

        bits = self.step.inputs[slot].dtype == "BF16"
        double = self.step.width == 8 or held.dtype == np.float64  # noqa: PLR2004 - bytes
        wanted = np.uint32 if bits else np.float64 if double else np.float32
        key = (slot, wanted.__name__)
        if key not in self.scratch.floats or len(self.scratch.floats[key]) < len(held):
            self.scratch.floats[key] = np.empty(len(held), wanted)
        buffer = self.scratch.floats[key][: len(held)]
        if not bits:
            buffer[...] = held
            return buffer  # type: ignore[no-any-return]
        buffer[...] = held
        np.left_shift(buffer, np.uint32(16), out=buffer)  # faster than to cast and shift at once
        floats: Floats = buffer.view(np.float32)
        return floats.astype(np.float64) if double else floats


def write_parts(
    fn: Callable[..., Any],
    parts: "Iterator[tuple[Part, list[Floats]]]",
    outputs: Sequence[tuple[str, TensorSpec]],
    buffers: Sequence[memoryview],
) -> Iterator[tuple[int, int]]:
    """Apply `fn(part, *inputs)` to parts; yield (first element, elements) as the buffer fills.

    Raises:
        ResultError: the result is not finite.
    """
    import numpy as np

    ((name, spec),) = outputs
    target = np.frombuffer(buffers[0], STORED[spec.dtype])
    filled, start = 0, -1
    for part, inputs in parts:
        start = part.start if filled == 0 else start
        _store(target[filled : filled + part.count], fn(part, *inputs), spec.dtype, name)
        filled += part.count
        if filled == len(target):
            yield start, filled
            filled = 0
    if filled:
        yield start, filled


def _store(target: "NDArray[Any]", result: "Floats", code: str, name: str) -> None:
    import numpy as np

    if result.size != target.size:  # one element would be copied to all
        fact = f"came out with {result.size} elements, planned were {target.size}"
        raise ResultError(name, fact)
    with np.errstate(over="ignore", invalid="ignore"):
        if code == "BF16":
            _round_bfloat16(target, result)
        else:
            target[...] = result
        unknown = math.isnan(float(result.max(initial=0)))
    if unknown or _overflowed(target, code):
        fact = "the result holds NaN or infinity"
        raise ResultError(name, fact, "check the inputs with `surgery verify`, or the parameters")


def _round_bfloat16(target: "NDArray[np.uint16]", result: "Floats") -> None:
    """Round to the nearest, ties to even."""
    import numpy as np

    bits = result.astype(np.float32, copy=False).view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(ODD)
    odd += np.uint32(HALF)
    odd += bits
    odd >>= np.uint32(16)
    target[...] = odd


def _overflowed(target: "NDArray[Any]", code: str) -> bool:
    """Whether there is an infinity; of 16 bits, such a magnitude has all exponent bits set."""
    import numpy as np

    if code in {"F32", "F64"}:
        return bool(np.isinf(target).any())
    highest = int((target.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0))
    return highest >= (0x7F80 if code == "BF16" else 0x7C00)
