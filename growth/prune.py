"""Depth by removal: of layers that are named, or of those that a measurement shows to do least."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from growth.depth import DepthMap, change_depth, check_layers, parse_layers
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.layers.kinds import refuse_recursive
from surgery.plan import Plan

Method = Literal["block-influence", "angular", "similarity", "tail"]
# What the scores are, by layer or by the first layer of a run.
SCORES: Mapping[Method, str] = {
    "block-influence": "influence of each layer (1 - cosine of before and behind), the least go",
    "angular": "angle (in units of pi) over the run from each layer on, the least goes",
    "similarity": "cosine over the run from each layer on, the greatest goes",
}


def prune(
    base: Checkpoint,
    *,
    layers: str,
    method: Method | None = None,
    scores: Sequence[float] | None = None,
) -> Plan:
    """Drop layers such as `21-28` (both ends included); the others close up.

    Args:
        base: L layers.
        layers: which ones to drop.
        method: how they were chosen, for the record; see `choose_layers`.
        scores: what they were chosen by, for the record.

    Raises:
        RecipeError: a layer does not exist, or none would be left.
    """
    count = anatomy(base).layers
    gone = parse_layers(layers, option="--layers")
    check_layers(gone, count)
    kept = tuple(n for n in range(count) if n not in gone)
    chosen = {} if method is None else {"method": method, "scores": list(scores or ())}
    plan = change_depth(
        base,
        DepthMap(sources=kept),
        operation="prune",
        parameters={"layers": layers, **chosen},
        facts={"dropped_layers": sorted(set(gone)), **chosen},
    )
    if method is None:
        return plan
    return replace(plan, notes=(*plan.notes, _told(sorted(set(gone)), method, scores or ())))


def _told(gone: Sequence[int], method: Method, scores: Sequence[float]) -> str:
    """Tell which layers go, and the figures that chose them."""
    which = f"layer {gone[0]} goes" if len(gone) == 1 else f"layers {', '.join(map(str, gone))} go"
    if method not in SCORES or not scores:
        return which
    sign = -1 if method == "similarity" else 1
    values = ", ".join(f"{i}: {sign * score:.4f}" for i, score in enumerate(scores))
    return f"{which}; {SCORES[method]}: {values}"


def choose_layers(
    base: Checkpoint, statistics: Checkpoint | None, *, method: Method, layers: int
) -> tuple[list[int], list[float]]:
    """Choose the layers to drop, and return what they were chosen by.

    - `block-influence`: the `layers` layers of least influence 1 - E cos(h_l, h_l+1), wherever
      they are (ShortGPT, arXiv 2403.03853, equation 1).
    - `angular`: the run of `layers` layers with the least angle between the last token's residual
      before and behind it (arXiv 2403.17887, equations 6 and 7).
    - `similarity`: the run with the greatest cosine between the residuals before and behind it,
      over all tokens (LLM-Streamline, arXiv 2403.19135, section 3.1).
    - `tail`: the last ones; nothing is measured (arXiv 2411.15558).

    Returns:
        The layers, and a score for each layer (`block-influence`) or each first layer of a run.

    Raises:
        RecipeError: so many layers cannot be dropped, or the statistics are of another model.
        CheckpointError: the statistics lack what the method needs.
    """
    refuse_recursive(base)
    count = anatomy(base).layers
    if not 1 <= layers < count:
        fact = f"is outside 1 to {count - 1} for a model of {count} layers"
        raise RecipeError(f"--layers {layers}", fact, "at least one layer has to stay")
    if method == "tail" or statistics is None:
        return list(range(count - layers, count)), []
    from surgery.calibrate.statistics import open_statistics, read_numbers  # with numpy

    found = open_statistics(statistics, base)
    if method == "block-influence":
        cosine = read_numbers(found.tensor("cosine", "layers"))
        influence = [1.0 - float(cosine[i, i + 1]) for i in range(count)]
        order = sorted(range(count), key=lambda i: (influence[i], -i))
        return sorted(order[:layers]), influence
    if method == "angular":
        angle = read_numbers(found.tensor("angle.last", "layers"))
        return _run_of_least(
            [float(angle[i, i + layers]) for i in range(count - layers + 1)], layers
        )
    cosine = read_numbers(found.tensor("cosine", "layers"))
    return _run_of_least([-float(cosine[i, i + layers]) for i in range(count - layers + 1)], layers)


def _run_of_least(scores: list[float], layers: int) -> tuple[list[int], list[float]]:
    first = min(range(len(scores)), key=scores.__getitem__)
    return list(range(first, first + layers)), scores
