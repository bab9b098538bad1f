"""Tensors with other sizes: each new index of an axis is a sum of old ones, read as a view."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from growth.dimensions import Axis
from surgery.checkpoint import TensorInfo, View, make_view, read_rows
from surgery.checkpoint.view import ReadRows

if TYPE_CHECKING:
    import numpy as np
    import torch

    Integers = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True)
class Mix:
    """New indices in terms of old ones: new i = sum over j of factors[i, j] * old sources[i, j].

    Attributes:
        sources: [new, terms].
        factors: [new, terms].
    """

    sources: "Integers"
    factors: "Floats"

    @property
    def size(self) -> int:
        """Number of new indices."""
        return len(self.sources)

    @property
    def is_selection(self) -> bool:
        """Whether numbers are only moved or repeated, so that their bits stay."""
        return self.sources.shape[1] == 1 and bool((self.factors == 1.0).all())

    def scaled(self, factors: "Floats") -> "Mix":
        """Return the mix with new index i multiplied by factors[i]."""
        return Mix(self.sources, self.factors * factors[:, None])

    def widened(self, width: int, offset: int = 0) -> "Mix":
        """Return the mix of indices where every unit is `width` indices, one beside the other."""
        import numpy as np

        inside = np.arange(width)[None, :, None]
        wide = offset + self.sources[:, None, :] * width + inside
        terms = self.sources.shape[1]
        factors = np.repeat(self.factors[:, None, :], width, axis=1)
        return Mix(wide.reshape(-1, terms), factors.reshape(-1, terms))


def selection(sources: "Sequence[int] | Integers") -> Mix:
    """Return the mix where new index i is old index sources[i]."""
    import numpy as np

    wanted = np.asarray(sources, dtype=np.int64)[:, None]
    return Mix(wanted, np.ones(wanted.shape))


def along(axis: Axis, units: Mapping[str, Mix]) -> Mix | None:
    """Return the mix of an axis from mixes of units by dimension; None where all units stay."""
    import numpy as np

    if not any(segment.dimension in units for segment in axis.segments):
        return None
    mixes, offset = [], 0
    for segment in axis.segments:
        unit = units.get(segment.dimension) or selection(range(segment.units))
        mixes.append(unit.widened(segment.width, offset))
        offset += segment.units * segment.width
    terms = max(mix.sources.shape[1] for mix in mixes)
    padded = [_padded(mix, terms) for mix in mixes]
    return Mix(
        np.concatenate([mix.sources for mix in padded]),
        np.concatenate([mix.factors for mix in padded]),
    )


def _padded(mix: Mix, terms: int) -> Mix:
    import numpy as np

    more = terms - mix.sources.shape[1]
    if not more:
        return mix
    sources = np.concatenate([mix.sources, np.repeat(mix.sources[:, :1], more, axis=1)], axis=1)
    return Mix(sources, np.pad(mix.factors, ((0, 0), (0, more))))


def resized(tensor: TensorInfo, mixes: Sequence[Mix | None], *, why: str = "resize") -> TensorInfo:
    """Return a tensor of new sizes, made of the old one when it is read.

    Args:
        tensor: stored or a view, of one axis or more.
        mixes: one per axis; None leaves an axis as it is. Numbers that are only moved or repeated
            keep their bits; sums and products are of float32, of an F32 or F64 tensor of float64.
        why: for `--dry-run`.
    """
    if all(mix is None for mix in mixes):
        return tensor
    *outer, last = mixes if len(mixes) > 1 else (*mixes, None)
    rows = _joined(outer, tensor.shape)
    shape = tuple(
        size if mix is None else mix.size for mix, size in zip(mixes, tensor.shape, strict=True)
    )

    def make(read: ReadRows, start: int, count: int) -> "torch.Tensor":
        found = _mixed_rows(read, tensor, rows, start, count)
        return found if last is None else _mixed_columns(found, last, tensor.dtype)

    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=shape,
        stored=(tensor,),
        make=make,
        why=why,
        key=_digest((rows, last), getattr(tensor, "key", "")),
        held=tensor.held if isinstance(tensor, View) else 0,
    )


def _joined(outer: Sequence[Mix | None], shape: tuple[int, ...]) -> Mix | None:
    """Join the mixes of all axes but the last into one of rows."""
    if all(mix is None for mix in outer):
        return None
    joined: Mix | None = None
    for mix, size in zip(outer, shape, strict=False):
        own = mix or selection(range(size))
        joined = own if joined is None else _product(joined, own, size)
    return joined


def _product(first: Mix, second: Mix, size: int) -> Mix:
    sources = first.sources[:, None, :, None] * size + second.sources[None, :, None, :]
    factors = first.factors[:, None, :, None] * second.factors[None, :, None, :]
    rows, terms = first.size * second.size, first.sources.shape[1] * second.sources.shape[1]
    return Mix(sources.reshape(rows, terms), factors.reshape(rows, terms))


def _mixed_rows(
    read: ReadRows, tensor: TensorInfo, rows: Mix | None, start: int, count: int
) -> "torch.Tensor":
    import torch

    if rows is None:
        whole: torch.Tensor = read_rows(read, tensor, start, count)
        return whole
    part = Mix(rows.sources[start : start + count], rows.factors[start : start + count])
    if part.is_selection:
        return gather(read, tensor, part.sources[:, 0])
    total: torch.Tensor | None = None
    for term in range(part.sources.shape[1]):
        found = _floats(gather(read, tensor, part.sources[:, term]), tensor.dtype)
        factor = torch.from_numpy(part.factors[:, term].copy()).to(found.dtype)
        found = found * factor.view(-1, *[1] * (found.dim() - 1))
        total = found if total is None else total + found
    assert total is not None  # noqa: S101 - every mix has a term
    return total


def _mixed_columns(found: "torch.Tensor", mix: Mix, dtype: str) -> "torch.Tensor":
    import torch

    if mix.is_selection:
        return found[..., torch.from_numpy(mix.sources[:, 0])]
    wide = _floats(found, dtype)
    total: torch.Tensor | None = None
    for term in range(mix.sources.shape[1]):
        factor = torch.from_numpy(mix.factors[:, term].copy()).to(wide.dtype)
        picked = wide[..., torch.from_numpy(mix.sources[:, term].copy())] * factor
        total = picked if total is None else total + picked
    assert total is not None  # noqa: S101 - every mix has a term
    return total


def _floats(found: "torch.Tensor", dtype: str) -> "torch.Tensor":
    return found.double() if dtype in {"F32", "F64"} else found.float()


def gather(read: ReadRows, tensor: TensorInfo, rows: "Integers") -> "torch.Tensor":
    """Read rows by number, each run of consecutive ones at once: [len(rows), *row]."""
    import numpy as np
    import torch

    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    runs = zip([0, *ends[:-1]], ends, strict=True)
    return torch.cat([read_rows(read, tensor, int(rows[a]), b - a) for a, b in runs])


def _digest(mixes: Sequence[Mix | None], key: str) -> str:
    total = hashlib.sha256(key.encode())
    for mix in mixes:
        total.update(b"-" if mix is None else mix.sources.astype("<i8").tobytes())
        total.update(b"-" if mix is None else mix.factors.astype("<f8").tobytes())
    return total.hexdigest()
