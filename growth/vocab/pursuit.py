"""Orthogonal matching pursuit of many targets at once: few atoms whose sum is near each.

Axes: t targets, s atoms, d columns, k steps.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 20  # elements of the atoms that are looked at together
STATE = 1 << 25  # bytes of the orthonormal bases of the targets worked on together
NOTHING = 1e-6  # of an atom's length: what is left of it then is rounding


def targets_at_once(steps: int, columns: int, width: int) -> int:
    """Return how many targets fit in `STATE`, of floats of so many bytes."""
    return max(STATE // (steps * columns * width), 1)


def scratch(targets: int, steps: int, columns: int, width: int) -> int:
    """Return the bytes that `pursue` holds beside targets and atoms."""
    basis = 2 * steps * columns + 8 * columns + 2 * steps * steps + 4 * steps
    block = max(BLOCK // columns, 1)
    return width * (targets * (basis + 2 * block) + 2 * max(BLOCK, columns))


def inverse_lengths(atoms: "Tensor", like: "Tensor") -> "Tensor":
    """Return [s]: one over each atom's length, 0 for one of zeros."""
    import torch

    step = max(BLOCK // atoms.shape[1], 1)
    blocks = [atoms[at : at + step].to(like.dtype) for at in range(0, len(atoms), step)]
    lengths = torch.cat([torch.linalg.vector_norm(block, dim=1) for block in blocks])
    return torch.where(lengths > 0, 1 / lengths, torch.zeros_like(lengths))


def pursue(
    targets: "Tensor", atoms: "Tensor", inverse: "Tensor", steps: int
) -> "tuple[Tensor, Tensor, Tensor]":
    """Approximate each target by a weighted sum of `steps` atoms.

    Shapes: targets [t, d], atoms [s, d] in any float dtype, inverse [s] from `inverse_lengths`;
    the results are the atoms' numbers [t, k], their weights [t, k], and what is left, [t, d].

    Each step takes the atom at the smallest angle to what is left, and then what is left is made
    orthogonal to all taken (QR with a second orthogonalisation). The weights are those of least
    squares. An atom that adds no direction gets the weight 0.

    Source: Pati, Rezaiifar and Krishnaprasad 1993; arXiv 2506.06607 for its use on embeddings.
    """
    import torch

    count, columns = targets.shape
    basis = targets.new_zeros(count, steps, columns)
    upper = torch.eye(steps, dtype=targets.dtype).repeat(count, 1, 1)
    along = targets.new_zeros(count, steps)
    taken = torch.full((count, steps), -1, dtype=torch.int64)
    left = targets.clone()
    for k in range(steps):
        best = _nearest(left, atoms, inverse, taken[:, :k])
        taken[:, k] = best
        atom = atoms[best].to(targets.dtype)
        direction, within = _orthogonal(atom, basis[:, :k])
        length = torch.linalg.vector_norm(direction, dim=1)
        adds = length > NOTHING * torch.linalg.vector_norm(atom, dim=1)
        unit = direction / torch.where(adds, length, torch.ones_like(length))[:, None]
        unit *= adds[:, None]
        upper[:, :k, k] = within
        upper[:, k, k] = torch.where(adds, length, torch.ones_like(length))
        basis[:, k] = unit
        along[:, k] = (left * unit).sum(dim=1)
        left -= along[:, k, None] * unit
    weights = torch.linalg.solve_triangular(upper, along[:, :, None], upper=True)[:, :, 0]
    return taken, weights, left


def _nearest(left: "Tensor", atoms: "Tensor", inverse: "Tensor", taken: "Tensor") -> "Tensor":
    """Return [t]: the atom not taken at the smallest angle to what is left, the first of equals."""
    import torch

    step = max(BLOCK // atoms.shape[1], 1)
    best = torch.full((len(left),), -1.0, dtype=left.dtype)
    place = torch.zeros(len(left), dtype=torch.int64)
    for start in range(0, len(atoms), step):
        block = atoms[start : start + step].to(left.dtype)
        likeness = (left @ block.T).abs_() * inverse[start : start + step]
        inside = (taken >= start) & (taken < start + len(block))
        row, column = inside.nonzero(as_tuple=True)
        likeness[row, taken[row, column] - start] = -1.0
        value, at = likeness.max(dim=1)
        better = value > best
        best = torch.where(better, value, best)
        place = torch.where(better, at + start, place)
    return place


def _orthogonal(atom: "Tensor", basis: "Tensor") -> "tuple[Tensor, Tensor]":
    """Return what of an atom [t, d] lies outside a basis [t, k, d], and its parts within [t, k]."""
    import torch

    first = torch.einsum("tkd,td->tk", basis, atom)
    outside = atom - torch.einsum("tk,tkd->td", first, basis)
    second = torch.einsum("tkd,td->tk", basis, outside)
    return outside - torch.einsum("tk,tkd->td", second, basis), first + second
