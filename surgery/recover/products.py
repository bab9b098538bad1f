"""Products of a head in the dtype that it computes in, summed in a higher one.

On a CUDA device the low dtype's own matrix units sum in float32 and return that; elsewhere blocks
of the weight are raised first, so that no whole copy of it is made.

Axis letters: c tokens of a chunk, d width, v vocabulary.
"""

import torch
from torch import Tensor


class Product:
    """Products with a head's weight in a low dtype, summed in a high one."""

    def __init__(self, weight_vd: Tensor, low: torch.dtype, high: torch.dtype, block: int) -> None:
        self.direct = low == high and weight_vd.dtype == high
        self.mixed = not self.direct and weight_vd.is_cuda and low.itemsize < high.itemsize
        self.low, self.high = low, high
        self.weight_vd = weight_vd.to(low) if self.mixed else weight_vd
        step = max(block // (high.itemsize * weight_vd.shape[1]), 1)
        rows = len(weight_vd)
        self.blocks = [slice(at, min(at + step, rows)) for at in range(0, rows, step)]

    def out(self, hidden_cd: Tensor, bias_v: Tensor | None) -> Tensor:
        """Return `hidden @ weight.T + bias`, [c, v], in the high dtype."""
        if self.mixed:
            x_cd = hidden_cd.to(self.low)
            found = torch.mm(x_cd, self.weight_vd.T, out_dtype=self.high)
        elif self.direct:
            found = hidden_cd @ self.weight_vd.T
        else:
            x_cd = hidden_cd.to(self.low).to(self.high)
            found = x_cd.new_empty((len(x_cd), len(self.weight_vd)))
            for rows in self.blocks:
                found[:, rows] = x_cd @ self._raised(rows).T
        return found if bias_v is None else found.add_(bias_v)

    def back(self, slope_cv: Tensor) -> Tensor:
        """Return `slope @ weight`, [c, d]."""
        if self.mixed:
            return torch.mm(slope_cv.to(self.low), self.weight_vd, out_dtype=self.high)
        if self.direct:
            return slope_cv @ self.weight_vd
        found = slope_cv.new_zeros((len(slope_cv), self.weight_vd.shape[1]))
        for rows in self.blocks:
            found.addmm_(slope_cv[:, rows], self._raised(rows))
        return found

    def add_outer(self, total_vd: Tensor, slope_cv: Tensor, hidden_cd: Tensor) -> None:
        """Add `slope.T @ hidden` to [v, d], a block of rows at a time."""
        x_cd = hidden_cd.to(self.low)
        if not self.mixed:
            total_vd.addmm_(slope_cv.T, x_cd.to(self.high))
            return
        for rows in self.blocks:
            low = slope_cv[:, rows].to(self.low)
            total_vd[rows] += torch.mm(low.T, x_cd, out_dtype=self.high)

    def _raised(self, rows: slice) -> Tensor:
        return self.weight_vd[rows].to(self.low).to(self.high)
