"""A table under another model's tokens: copies where both have the token, else sums by OMP."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from growth.vocab.newrows import check_floats
from growth.vocab.pursuit import inverse_lengths, pursue, scratch, targets_at_once
from surgery.checkpoint import BITS, TensorInfo
from surgery.compute import torch_dtype, use_one_thread
from surgery.plan import Step, Tell, TensorSpec
from surgery.stored import Stored
from surgery.vocabulary.rows import Numbers

if TYPE_CHECKING:
    from torch import Tensor

READ = 1 << 20  # elements read at once
THREADS = 8  # each holds bases of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparse:
    """Where the rows of a table come from.

    Attributes:
        size: rows of the new table.
        shared: [c] new rows whose token both models have.
        base: [c] the model's rows of those tokens.
        donor: [s] the donor's rows of the first of them; it may have none for the last.
        fresh: [n] new rows, and the donor's, whose token the donor alone has.
        steps: atoms of each sum.
    """

    size: int
    shared: Numbers
    base: Numbers
    donor: Numbers
    fresh: Numbers
    steps: int

    def digest(self) -> str:
        """Return what tells two of them apart."""
        import hashlib

        parts = (self.shared, self.base, self.donor, self.fresh)
        found = hashlib.sha256(b"".join(part.tobytes() for part in parts))
        found.update(f"{self.size} {self.steps}".encode())
        return found.hexdigest()


def sparse_step(table: TensorInfo, donor: TensorInfo, rows: Sparse) -> Step:
    """Plan the making of a table; both models' rows of the shared tokens are held as stored."""
    check_floats(table)
    check_floats(donor)
    shape = (rows.size, table.shape[1])
    return Step(
        inputs=(table, donor),
        outputs=((table.name, TensorSpec(table.dtype, shape)),),
        fn=lambda base, other: _make(base, other, rows, (table.dtype, donor.dtype)),
        streamed=True,
        scratch=_scratch(table, donor, rows),
        why="matching pursuit",
        key=rows.digest(),
        tells=("omp_residual",),
    )


def _threads() -> int:
    return min(os.cpu_count() or 1, THREADS)


def _scratch(table: TensorInfo, donor: TensorInfo, rows: Sparse) -> int:
    sides = [
        (BITS[t.dtype] // 8 * (len(rows.shared) + extra) * t.shape[1])
        for t, extra in ((donor, len(rows.fresh)), (table, 0))
    ]
    width = 8 if {table.dtype, donor.dtype} & {"F32", "F64"} else 4
    count, columns = len(rows.fresh), donor.shape[1]
    at_once = min(targets_at_once(rows.steps, columns, width), count)
    workers = min(_threads(), -(-count // max(at_once, 1)))
    each = scratch(at_once, rows.steps, columns, width)
    sums = 2 * (8 + width) * count * rows.steps + 8 * len(rows.donor)
    return max(sides) + workers * each + sums + 4 * 8 * READ


def _make(base: Stored, donor: Stored, rows: Sparse, codes: tuple[str, str]) -> Iterator[Any]:
    """Yield the new table in runs of rows, and how much of the new tokens is not represented."""
    atoms, weights, missed = _sums(donor, rows, codes[1])
    mine, mean = _taken(base, rows.base, codes[0])
    yield from _table(rows, mine, mean, atoms, weights)
    yield Tell(omp_residual=missed)


def _sums(donor: Stored, rows: Sparse, code: str) -> "tuple[Tensor, Tensor, float]":
    """Return atoms [n, k], weights [n, k], and the mean share of a row's length left over."""
    import torch

    every, _ = _taken(donor, np.concatenate([rows.donor, rows.fresh]), code)
    atoms, targets = every[: len(rows.donor)], every[len(rows.donor) :]
    inverse = inverse_lengths(atoms, like=torch.empty(0, dtype=donor.dtype))

    def work(start: int) -> "tuple[Tensor, Tensor, Tensor]":
        use_one_thread()
        chunk = targets[start : start + step].to(donor.dtype)
        taken, weights, left = pursue(chunk, atoms, inverse, rows.steps)
        length = torch.linalg.vector_norm(chunk, dim=1).clamp(min=torch.finfo(chunk.dtype).tiny)
        return taken, weights, torch.linalg.vector_norm(left, dim=1) / length

    step = targets_at_once(rows.steps, donor.shape[1], donor.dtype.itemsize)
    parts = list(_in_order(work, range(0, len(targets), step)))
    if not parts:
        empty = torch.zeros(0, rows.steps)
        return empty.long(), empty.to(donor.dtype), 0.0
    taken, weights, left = (torch.cat(every) for every in zip(*parts, strict=True))
    return taken, weights, float(left.mean())


def _in_order(work: Any, starts: range) -> Iterator[Any]:  # noqa: ANN401 - a function of a start
    """Do the work for each start on several threads; yield the results in order."""
    with ThreadPoolExecutor(_threads()) as pool:
        waiting: deque[Future[Any]] = deque()
        for start in starts:
            waiting.append(pool.submit(work, start))
            if len(waiting) > _threads():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _taken(table: Stored, wanted: Numbers, code: str) -> "tuple[Tensor, Tensor]":
    """Return rows of a table as stored, [rows, d], and the mean of all its rows; one reading."""
    import torch

    order = np.argsort(wanted, kind="stable")
    ascending = wanted[order]
    count, columns = table.shape
    found = torch.empty((len(wanted), columns), dtype=torch_dtype(code))
    total = torch.zeros(columns, dtype=torch.float64)
    step = max(READ // columns, 1)
    for start in range(0, count, step):
        block = table[start : start + step]
        total += block.double().sum(dim=0)
        first, last = np.searchsorted(ascending, (start, start + len(block)))
        inside = torch.from_numpy(ascending[first:last] - start)
        found[torch.from_numpy(order[first:last])] = block[inside].to(found.dtype)
    return found, total / count


def _table(
    rows: Sparse, mine: "Tensor", mean: "Tensor", atoms: "Tensor", weights: "Tensor"
) -> Iterator["Tensor"]:
    """Yield the new rows: copies, sums, and the mean where no token has the row."""
    import torch

    copied = np.full(rows.size, -1, np.int64)
    copied[rows.shared] = np.arange(len(rows.shared))
    summed = np.full(rows.size, -1, np.int64)
    summed[rows.fresh] = np.arange(len(rows.fresh))
    step = max(READ // mine.shape[1], 1)
    for start in range(0, rows.size, step):
        own, new = copied[start : start + step], summed[start : start + step]
        out = mean.to(weights.dtype).repeat(len(own), 1)
        here, there = (torch.from_numpy(np.flatnonzero(part >= 0)) for part in (own, new))
        out[here] = mine[torch.from_numpy(own[own >= 0])].to(out.dtype)
        for at, to in _pairs(torch.from_numpy(new[new >= 0]), there, step // rows.steps):
            chosen = mine[atoms[at].reshape(-1)].to(out.dtype)
            chosen = chosen.view(len(at), rows.steps, mine.shape[1])
            out[to] = torch.einsum("tk,tkd->td", weights[at], chosen)
        yield out


def _pairs(one: "Tensor", other: "Tensor", size: int) -> "Iterator[tuple[Tensor, Tensor]]":
    """Cut two tensors alike along their first axis."""
    for at in range(0, len(one), max(size, 1)):
        yield one[at : at + max(size, 1)], other[at : at + max(size, 1)]
