"""The shared basis of one kind of matrix over all layers, and the network that works in it."""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.plan import Tell

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 256
EPOCHS = 10
BATCH = 64
RATE = 1e-3
NORM_SHARE = 5e-4
SMALLEST = 1e-6  # singular values to the largest; what lies below is rounding of the Gram matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is to be predicted.

    Attributes:
        after: layers that a new one follows.
        seed: text that the random numbers come from.
        swapped: matrices are stored as [inputs, outputs].
    """

    after: tuple[int, ...]
    seed: str
    swapped: bool


def scratch(layers: int, n: int, m: int) -> int:
    """Return the bytes that a prediction holds, for matrices of n outputs and m inputs.

    All V in float32; the Gram matrix, its eigenvectors and the solver's room in float64; matrices
    of two layers as they are read and projected; the network with gradients and moments.
    """
    rank = min(n, layers * m)
    network = 2 * m * HIDDEN + HIDDEN * HIDDEN + HIDDEN * m + 2 * HIDDEN + m
    held = 4 * layers * rank * m + 8 * 4 * n * n + 8 * 2 * n * m
    return held + 4 * 5 * network + 4 * 8 * BATCH * (3 * m + 2 * HIDDEN)


def predict(stored: Sequence[Any], ask: Ask) -> "Iterator[Tensor | Tell]":
    """Train the network on what is stored, and yield the new layers' matrices in order.

    Args:
        stored: per layer an [n, m] matrix that is read when it is indexed.
    """
    import torch

    basis, scale = shared_basis(stored, swapped=ask.swapped)
    values = torch.empty(len(stored), basis.shape[1], matrix(stored[0], ask.swapped).shape[1])
    for layer, one in enumerate(stored):
        values[layer] = (basis / scale).T @ matrix(one, ask.swapped)
    network = _Network(values.shape[2], ask.seed)
    with torch.enable_grad():
        network.train(values)
    yield Tell(explained=network.explained(values))
    left = (basis * scale).float()
    for layer in ask.after:
        made = left @ network(torch.cat([values[layer], values[layer + 1]], dim=1))
        yield made.T.contiguous() if ask.swapped else made


def matrix(one: Any, swapped: bool) -> "Tensor":  # noqa: ANN401 - a stored tensor
    """Read a matrix as [outputs, inputs], float64."""
    found: Tensor = one[...].double()
    return found.T if swapped else found


def shared_basis(stored: Sequence[Any], *, swapped: bool) -> "tuple[Tensor, Tensor]":
    """Return U [n, rank] and S [rank] of all layers' matrices side by side, in float64."""
    import torch

    gram: Tensor | None = None
    for one in stored:
        wide = matrix(one, swapped)
        gram = wide @ wide.T if gram is None else gram.addmm_(wide, wide.T)
    assert gram is not None  # noqa: S101 - there are three layers or more
    squares, vectors = torch.linalg.eigh(gram)
    sizes = squares.clamp(min=0).sqrt().flip(0)
    most = min(gram.shape[0], len(stored) * matrix(stored[0], swapped).shape[1])
    kept = int((sizes[:most] > SMALLEST * sizes[0]).sum())
    if not kept:  # all zero: any direction gives zero
        return vectors[:, :1], torch.ones(1, dtype=torch.float64)
    return vectors.flip(1)[:, :kept], sizes[:kept]


class _Network:
    """Two hidden layers of ReLU from [V_l-1, V_l+1] to V_l."""

    def __init__(self, m: int, seed: str) -> None:
        import torch

        self._random = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
        sizes = [(HIDDEN, 2 * m), (HIDDEN, HIDDEN), (m, HIDDEN)]
        self._maps = [(self._draw(out, fan, fan), self._draw(out, 0, fan)) for out, fan in sizes]

    def _draw(self, out: int, inside: int, fan: int) -> "Tensor":
        """Draw as torch's linear layers do: uniform within one over the root of the inputs."""
        import torch

        bound = 1 / math.sqrt(fan)
        drawn = torch.rand((out, inside) if inside else (out,), generator=self._random)
        return drawn.mul_(2).sub_(1).mul_(bound).requires_grad_()

    def __call__(self, given: "Tensor") -> "Tensor":
        import torch

        with torch.no_grad():
            return self._forward(given)

    def _forward(self, given: "Tensor") -> "Tensor":
        import torch

        (first, a), (second, b), (third, c) = self._maps
        hidden = torch.relu(torch.nn.functional.linear(given, first, a))
        hidden = torch.relu(torch.nn.functional.linear(hidden, second, b))
        return torch.nn.functional.linear(hidden, third, c)

    def train(self, values: "Tensor") -> None:
        """Learn every layer that has two neighbours, row by row in a random order."""
        import torch

        layers, rows, _ = values.shape
        optimiser = torch.optim.AdamW([one for pair in self._maps for one in pair], lr=RATE)
        for _ in range(EPOCHS):
            order = torch.randperm((layers - 2) * rows, generator=self._random)
            for at in range(0, len(order), BATCH):
                picked = order[at : at + BATCH]
                layer, row = picked // rows + 1, picked % rows
                given = torch.cat([values[layer - 1, row], values[layer + 1, row]], dim=1)
                optimiser.zero_grad()
                loss: Any = loss_of(self._forward(given), values[layer, row])
                loss.backward()
                optimiser.step()

    def explained(self, values: "Tensor") -> float:
        """Return the share of the squares of the V that are known which the network explains."""
        import torch

        left, total = 0.0, 0.0
        for layer in range(1, len(values) - 1):
            given = torch.cat([values[layer - 1], values[layer + 1]], dim=1)
            left += float((self(given) - values[layer]).double().square().sum())
            total += float(values[layer].double().square().sum())
        return 1 - left / total if total else 1.0


def loss_of(found: "Tensor", wanted: "Tensor") -> "Tensor":
    """Return the mean square, and a little of the norms' squared difference."""
    import torch

    square = (found - wanted).square().mean()
    norms = (torch.linalg.vector_norm(found) - torch.linalg.vector_norm(wanted)).square()
    loss: Tensor = (1 - NORM_SHARE) * square + NORM_SHARE * norms
    return loss
