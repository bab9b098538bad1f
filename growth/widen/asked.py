"""What is asked for, checked: how much every dimension grows."""

from collections.abc import Mapping
from fractions import Fraction
from math import gcd, lcm
from typing import Any

from growth.dimensions import Dimension, Dimensions
from growth.widen.families import EXACT
from growth.widen.maps import Widening
from growth.widen.shares import MOST_NOISE, PRECISION
from surgery.anatomy import dig
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError, RecipeError

MOST = 64  # copies; more is a slip
FEED_FORWARD: tuple[Dimension, ...] = ("ffn", "expert ffn", "shared ffn")
ALONG: tuple[Dimension, ...] = ("hidden", "query", "key")


def check_asked(
    *, factor: int | None, to: int | None, inner: int | None, method: str, noise: float
) -> None:
    """Refuse options that do not go together, before the model is looked at.

    Raises:
        RecipeError: neither or both of `factor` and `to`, or one out of its range.
    """
    if (factor is None) == (to is None):
        fact = "needs either --factor or --to"
        raise RecipeError("surgery widen", fact, "for instance --factor 2")
    if factor is not None and not 1 < factor <= MOST:
        raise RecipeError(f"--factor {factor}", f"is outside 2 to {MOST}", "for instance 2")
    if method not in {"fpi", "aki"}:
        raise RecipeError(f"--method {method[:40]}", "is neither fpi nor aki")
    if not 0 <= noise <= MOST_NOISE:
        fact = f"is outside 0 to {MOST_NOISE:g}"
        raise RecipeError(f"--noise {noise}", fact, "0.3 sets copies apart well")
    if to is not None and noise:
        remedy = "copies of uneven number cannot cancel: leave it out, or use --factor"
        raise RecipeError(f"--noise {noise}", "goes with --factor, not with --to", remedy)
    if factor is not None and (inner is not None or method != "fpi"):
        option = "--method aki" if inner is None else f"--intermediate-size {inner}"
        raise RecipeError(option, "goes with --to, not with --factor")


def check_family(base: Checkpoint, found: Dimensions) -> None:
    """Refuse an architecture that was not found to be right when widened.

    Raises:
        PlanError: of that kind, or weights in a dtype whose numbers cannot be halved.
    """
    if found.heads.family not in EXACT:
        fact = "is an architecture that is not known to compute the same when it is widened"
        raise PlanError(base.root / "config.json", f"{found.heads.family} {fact}")
    if found.parts.lost_head:
        fact = "does not tie the output head to the embedding, but there is no head"
        raise PlanError(base.root / "config.json", fact, "restore the missing tensor")
    text = dig(base.config or {}, found.parts.section)
    if found.heads.shared or text.get("position_embedding_type", "absolute") != "absolute":
        fact = "tells heads apart by their position, so that none can be copied"
        raise PlanError(base.root / "config.json", fact)
    odd = next((t for t in base.tensors.values() if _is_odd(t.dtype)), None)
    if odd is not None:
        fact = f"is stored as {odd.dtype}, whose numbers cannot be divided"
        raise PlanError(odd.name, fact, "dequantise the checkpoint first")


def _is_odd(dtype: str) -> bool:
    return dtype not in PRECISION and dtype not in {"I64", "I32", "BOOL"}


def plan_widths(
    found: Dimensions,
    *,
    factor: int | None,
    to: int | None,
    inner: int | None,
    method: Any,  # noqa: ANN401 - fpi or aki
    noise: float,
    seed: int,
) -> Widening:
    """Return how every dimension grows.

    Raises:
        RecipeError: a width that is no larger, breaks heads, or leaves no whole number of units.
    """
    ratio = Fraction(factor or 0) or Fraction(to or 0, found.hidden)
    if ratio < 1 or (ratio == 1 and inner is None):
        fact = f"is not above the model's width of {found.hidden}"
        raise RecipeError(f"--to {to}", fact, "widen makes a model larger")
    _check_heads(found, ratio)
    feed = _feed_forward(found, ratio, inner)
    ratios = dict.fromkeys(ALONG, ratio) | dict.fromkeys(FEED_FORWARD, feed)
    return Widening(
        ratios={dimension: r for dimension, r in ratios.items() if r != 1},
        method="tile" if factor else method,
        group=found.heads.queries // found.heads.keys,
        noise=noise,
        seed=seed,
    )


def _check_heads(found: Dimensions, ratio: Fraction) -> None:
    heads = {"attention": found.heads.queries, "key-value": found.heads.keys}
    for kind, count in heads.items():
        if (count * ratio).denominator != 1:
            step = lcm(*(found.hidden // gcd(found.hidden, n) for n in heads.values()))
            width = int(found.hidden * ratio)
            fact = f"makes {float(count * ratio):g} {kind} heads of {count}"
            raise RecipeError(f"--to {width}", fact, f"choose a multiple of {step}")


def _feed_forward(found: Dimensions, ratio: Fraction, inner: int | None) -> Fraction:
    sizes = sizes_of(found)
    if inner is None:
        odd = next((n for n in sizes if (n * ratio).denominator != 1), None)
        if odd is not None:
            width = int(found.hidden * ratio)
            fact = f"leaves no whole number of the {odd} feed-forward units"
            raise RecipeError(f"--to {width}", fact, "give --intermediate-size")
        return ratio
    feed = Fraction(inner, sizes[0])
    if feed < 1 or any((n * feed).denominator != 1 for n in sizes):
        fact = f"does not grow feed-forward layers of {', '.join(map(str, sizes))} units"
        raise RecipeError(f"--intermediate-size {inner}", fact, "give a larger number")
    if feed == ratio == 1:
        raise RecipeError(f"--intermediate-size {inner}", "is what the model has already")
    return feed


def sizes_of(found: Dimensions) -> list[int]:
    """Return the sizes of feed-forward layers: dense, of an expert, of shared experts."""
    segments = [s for axes in found.axes.values() for axis in axes for s in axis.segments]
    every = ((kind, s.units) for kind in FEED_FORWARD for s in segments if s.dimension == kind)
    return [units for _, units in dict.fromkeys(every)]


def widths(found: Dimensions, how: Widening) -> Mapping[str, list[int]]:
    """Return old and new numbers of units, for the record."""
    old: dict[Dimension, int] = {
        "hidden": found.hidden,
        "query": found.heads.queries,
        "key": found.heads.keys,
    }
    told = {str(name): [size, how.size(name, size)] for name, size in old.items()}
    sizes = sizes_of(found)
    return told | ({"feed-forward": [sizes[0], how.size("ffn", sizes[0])]} if sizes else {})
