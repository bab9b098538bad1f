"""What an upcycling is asked for, checked before anything is planned."""

import math
from collections.abc import Iterable

from growth.depth import check_layers, parse_layers
from growth.upcycle.layout import Layout
from surgery.errors import RecipeError

MOST_EXPERTS = 4096
TOP_ONE = (
    "with --top-k 1 a token's only expert has the weight 1, so the router learns from the "
    "balancing loss alone"
)


def check_experts(experts: int, top_k: int) -> None:
    """Refuse numbers of experts that make no mixture.

    Raises:
        RecipeError: one of them is out of range.
    """
    if not 2 <= experts <= MOST_EXPERTS:  # noqa: PLR2004 - one is no mixture
        fact = f"is outside 2 to {MOST_EXPERTS}"
        raise RecipeError(f"--experts {experts}", fact, "8 is usual")
    if not 1 <= top_k <= experts:
        fact = f"is outside 1 to {experts}, the number of experts"
        raise RecipeError(f"--top-k {top_k}", fact, "2 is usual")


def check_share(option: str, share: float) -> None:
    """Refuse a share that is none.

    Raises:
        RecipeError: it is outside 0 to 1.
    """
    if not 0 <= share <= 1:  # NaN too
        raise RecipeError(f"{option} {share:g}", "is outside 0 to 1", "the paper took 0.5")


def check_deviation(option: str, deviation: float) -> None:
    """Refuse a standard deviation that is none.

    Raises:
        RecipeError: it is negative or not finite.
    """
    if not (math.isfinite(deviation) and deviation >= 0):
        raise RecipeError(f"{option} {deviation:g}", "is no standard deviation", "give 0 or more")


def neurons_anew(share: float, width: int) -> int:
    """Return how many neurons start anew, rounded down.

    Raises:
        RecipeError: the share is above 0, and none would.
    """
    count = int(share * width)
    if share > 0 and not count:
        fact = f"starts none of {width} neurons anew"
        raise RecipeError(f"--drop-ratio {share:g}", fact, f"give at least {1 / width:.2g}")
    return count


def sparse_layers(layers: str | None, count: int) -> tuple[int, ...]:
    """Return the layers that become mixtures: all, or those of a text like `1-3,7`.

    Raises:
        RecipeError: a layer does not exist.
    """
    if layers is None:
        return tuple(range(count))
    asked = parse_layers(layers, option="--layers")
    check_layers(asked, count)
    return tuple(sorted(set(asked)))


def layout_notes(layout: Layout, *, top_k: int) -> Iterable[str]:
    """Yield what whoever trains the result should know."""
    if top_k == 1:
        yield TOP_ONE
    if layout.shared:
        yield "the layout's shared expert is one neuron of zeros, which no training changes"
