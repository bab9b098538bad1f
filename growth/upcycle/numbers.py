"""The arithmetic of upcycling: random routers, neurons drawn anew, noise; seeded by name."""

import hashlib
from collections.abc import Generator
from functools import partial
from math import fsum
from typing import TYPE_CHECKING, Any

from surgery.plan import Part, Pass

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Moments = tuple[int, float, float]


def generator(*what: object) -> "np.random.Generator":
    """Return a generator that is decided by what it is for."""
    import numpy as np

    digest = hashlib.sha256("\0".join(map(str, what)).encode()).digest()
    seed = np.random.SeedSequence(np.frombuffer(digest, np.uint32).tolist())
    return np.random.Generator(np.random.SFC64(seed))


def random_router(*, shape: tuple[int, int], deviation: float, seed: int, name: str) -> "Tensor":
    """Return a router's rows, [experts, hidden], from a normal distribution around 0."""
    import torch

    drawn = generator(seed, name).standard_normal(shape)
    return torch.from_numpy(drawn * deviation)


def chosen_neurons(*, width: int, count: int, seed: int, layer: int, expert: int) -> "Tensor":
    """Return which neurons of an expert start anew, as [width] booleans.

    One choice an expert: gate, up and down projection of a neuron start anew together.
    """
    import torch

    order = generator(seed, "neurons", layer, expert).permutation(width)
    chosen = torch.zeros(width, dtype=torch.bool)
    chosen[torch.from_numpy(order[:count])] = True
    return chosen


def altered(
    *,
    width: int,
    count: int,
    neurons_first: bool,
    noise: float,
    seed: int,
    layer: int,
    expert: int,
    name: str,
) -> Generator[Pass, Any, Any]:
    """Draw `count` of an expert's neurons anew, then add noise to all of it.

    New numbers have the mean and the standard deviation of those that they replace, in this
    tensor; noise has the standard deviation `noise` times the whole tensor's.

    Args:
        neurons_first: the tensor is [neurons, hidden], else [hidden, neurons].

    Source: Drop-Upcycling, arXiv 2502.19261, section 3. Its published code draws the neurons of
    the three projections apart, so that what starts anew in one does not in the others; the paper
    draws them once, and so does this.
    """
    chosen = chosen_neurons(width=width, count=count, seed=seed, layer=layer, expert=expert)
    selected = partial(_mask, chosen=chosen, neurons_first=neurons_first)
    found = yield Pass(fn=partial(_moments, selected=selected))
    replaced, whole = (_mean_and_deviation([part[n] for part in found]) for n in (0, 1))
    drawing = partial(generator, seed, name)
    spread = noise * whole[1]
    return partial(_redrawn, selected=selected, replaced=replaced, spread=spread, drawing=drawing)


def _mask(part: Part, x: "Tensor", *, chosen: "Tensor", neurons_first: bool) -> "Tensor":
    """Return which numbers of some rows are of neurons that start anew, [rows, columns]."""
    if not neurons_first:
        return chosen.expand(x.shape)
    first = part.start // x.shape[1]
    return chosen[first : first + x.shape[0], None].expand(x.shape)


def _moments(part: Part, x: "Tensor", *, selected: Any) -> tuple[Moments, Moments]:  # noqa: ANN401
    return _sums(x[selected(part, x)]), _sums(x)


def _sums(x: "Tensor") -> Moments:
    x = x.double()
    return x.numel(), float(x.sum()), float((x * x).sum())


def _mean_and_deviation(parts: list[Moments]) -> tuple[float, float]:
    count, total, squares = (fsum(column) for column in zip(*parts, strict=True))
    if not count:
        return 0.0, 0.0
    mean = total / count
    return mean, float(max(squares / count - mean * mean, 0.0) ** 0.5)


def _redrawn(
    part: Part,
    x: "Tensor",
    *,
    selected: Any,  # noqa: ANN401 - a function
    replaced: tuple[float, float],
    spread: float,
    drawing: Any,  # noqa: ANN401 - a function
) -> "Tensor":
    drawn, anew = drawing(part.index), selected(part, x)
    mean, deviation = replaced
    result = x.clone()
    result[anew] = _normal(drawn, int(anew.sum()), x) * deviation + mean
    if spread:
        result += _normal(drawn, x.numel(), x).view(x.shape) * spread
    return result


def _normal(drawn: "np.random.Generator", count: int, like: "Tensor") -> "Tensor":
    import numpy as np
    import torch

    return torch.from_numpy(drawn.standard_normal(count, dtype=np.float32)).to(like.dtype)


def mean(*models: Any) -> Any:  # noqa: ANN401 - arrays of torch or numpy
    """Return the mean of like tensors, elementwise."""
    return sum(models[1:], models[0]) / len(models)


def same(x: Any) -> Any:  # noqa: ANN401 - an array of torch or numpy
    """Return what is given, to be rounded to another dtype."""
    return x
