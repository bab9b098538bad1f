"""Ranks of the factors: as asked, or by a reading before the plan of how residuals fall off."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from growth.recurse.block import How, Module, residual, tied_weight
from growth.recurse.factor import Svd, gram_matrix, scratch
from growth.recurse.formats import Ranks, module_of
from growth.recurse.survey import WEIGHT, Looped
from surgery.checkpoint import BITS
from surgery.lora.spectra import Spectra, measured
from surgery.pipeline import is_ahead
from surgery.plan import Step, TensorSpec


def dense_rank(shape: tuple[int, int]) -> int:
    """Return the highest rank at which two factors take no more than the matrix."""
    return max(shape[0] * shape[1] // (shape[0] + shape[1]), 1)


def shapes(looped: Looped) -> dict[str, tuple[int, int]]:
    """Return rows and columns by linear layer."""
    found = {rest.removesuffix(WEIGHT): looped.tensor(0, rest).shape for rest in looped.linears}
    return {name: (shape[0], shape[1]) for name, shape in found.items()}


def even_ranks(looped: Looped, rank: int | None) -> dict[str, list[int]]:
    """Return one rank for all, capped by each matrix; none where a depth has its block alone.

    Args:
        rank: None for the highest that is no larger than a dense difference.
    """
    alone = [looped.loops.is_alone(depth) for depth in range(len(looped.loops.layer_map))]
    most = {name: min(rank or dense_rank(shape), *shape) for name, shape in shapes(looped).items()}
    return {name: [0 if one else cap for one in alone] for name, cap in most.items()}


def energy_ranks(
    looped: Looped,
    most: Ranks,
    *,
    energy: float,
    how: How,
    fold: bool,
    limits: Mapping[str, Any],
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    """Return for each linear layer and depth the smallest rank that keeps the energy.

    Where nothing may be read yet, the ranks at most are returned.

    Args:
        most: the ranks at most.
        energy: share of the squared residual.
        fold: residuals are those of weights with gains folded in.
        limits: workers, memory and progress.

    Raises:
        PlanError: a matrix does not fit into the memory.
    """
    if is_ahead():
        return {name: [*own] for name, own in most.items()}, ()
    modules = [
        module_of(looped, block, rest, whole=True, fold=fold) for block, rest in looped.modules()
    ]
    steps = [_spectra(m, n, how) for n, m in enumerate(modules)]
    spectra = measured(steps, (looped.base,), "--energy", limits)
    return _smallest_ranks(modules, most, energy, spectra)


def _smallest_ranks(
    modules: Sequence[Module], most: Ranks, energy: float, spectra: Spectra
) -> tuple[dict[str, list[int]], tuple[str, ...]]:
    ranks = {name: [0] * len(own) for name, own in most.items()}
    short = []
    for number, module in enumerate(modules):
        found = spectra.numbers(f"{number}").reshape(len(module.depths), -1)
        for depth, squares in zip(module.depths, found.tolist(), strict=True):
            if most[module.name][depth]:
                wanted = _smallest(squares, energy)
                ranks[module.name][depth] = min(wanted, most[module.name][depth])
                if wanted > most[module.name][depth]:
                    short.append(f"{module.name} of depth {depth}")
    if not short:
        return ranks, ()
    told = f"{len(short)} linear layers keep less than the energy asked for at the highest rank"
    return ranks, (f"{told}: {short[0]}; a higher --rank allows more",)


def _smallest(squares: Sequence[float], energy: float) -> int:
    """Return how many of the falling squares make up the share; none where all are zero."""
    whole, kept = sum(squares), 0.0
    for rank, square in enumerate(squares):
        if kept >= energy * whole * (1 - 1e-12):
            return rank
        kept += square
    return len(squares)


def _spectra(module: Module, number: int, how: How) -> Step:
    """Return the step that gives the squared singular values of every depth's residual."""
    few, (n, m) = min(module.shape), module.shape

    def fn(*stored: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        import torch

        held = tied_weight(module, stored)
        for slot in range(len(module.depths)):
            left = residual(module, stored, held, slot, how.device)
            values = torch.linalg.eigvalsh(gram_matrix(left))
            yield values.flip(0).clamp_min(0).cpu()

    method: Svd = "gram"
    item = BITS[module.spec.dtype] // 8
    return Step(
        outputs=((f"{number}", TensorSpec("F64", (len(module.depths), few))),),
        inputs=(*module.inputs, *module.gains),
        fn=fn,
        streamed=True,
        scratch=(item + 16) * n * m + scratch(module.shape, 1, method, 8),
        why="measure",
    )
