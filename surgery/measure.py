"""Sums over two slices of stored numbers, in float64; the only torch of a comparison."""

from math import fsum
from typing import TYPE_CHECKING

from surgery.compute import as_tensor, use_one_thread
from surgery.sums import Sums, add

if TYPE_CHECKING:
    import torch

PART = 64 << 10  # elements: three float64 vectors of them stay in the cache
SCRATCH = 3 * 8 * PART + PART


def same_bytes(a: memoryview, b: memoryview) -> bool:
    """Tell whether two views of the same length hold the same bytes."""
    import numpy as np

    return bool((np.frombuffer(a, np.uint8) == np.frombuffer(b, np.uint8)).all())


class Rulers:
    """float64 vectors of one thread, kept and reused."""

    def __init__(self) -> None:
        import torch

        use_one_thread()
        self._wide = [torch.empty(PART, dtype=torch.float64) for _ in range(3)]
        self._mask = torch.empty(PART, dtype=torch.bool)

    def alike(self, view: memoryview, code: str) -> Sums:
        """Return the sums of a slice and its equal: only its length has to be computed."""
        stored = as_tensor(view, code)
        count = stored.numel()
        squares = fsum(self._square(stored[at : at + PART]) for at in range(0, count, PART))
        return Sums(
            count=count,
            aa=squares,
            bb=squares,
            ab=squares,
            dd=0.0,
            max_abs=0.0,
            equal=count,
            agree=count,
        )

    def _square(self, part: "torch.Tensor") -> float:
        wide = self._wide[0][: part.numel()].copy_(part)
        return float(wide.dot(wide))

    def apart(self, a: tuple[memoryview, str], b: tuple[memoryview, str]) -> Sums:
        """Return the sums of two slices of the same number of elements, given with dtype codes."""
        x, y = as_tensor(*a), as_tensor(*b)
        starts = range(0, x.numel(), PART)
        return add(self._part(x[at : at + PART], y[at : at + PART]) for at in starts)

    def _part(self, x: "torch.Tensor", y: "torch.Tensor") -> Sums:
        import torch

        count = x.numel()
        a, b, d = (wide[:count] for wide in self._wide)
        a.copy_(x)
        b.copy_(y)
        torch.sub(b, a, out=d)
        aa, bb, ab, dd = (float(u.dot(v)) for u, v in ((a, a), (b, b), (a, b), (d, d)))
        low, high = torch.aminmax(d)
        equal = count - int(torch.count_nonzero(d))
        agree = torch.eq(a.sign_(), b.sign_(), out=self._mask[:count])
        return Sums(
            count=count,
            aa=aa,
            bb=bb,
            ab=ab,
            dd=dd,
            max_abs=max(-float(low), float(high)),
            equal=equal,
            agree=int(torch.count_nonzero(agree)),
        )
