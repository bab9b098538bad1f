"""Growth of depth in stages: which layers are repeated when, and the share of training between."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from growth.stack import stack
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError

Schedule = Literal["progressive", "midas", "gradual"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A depth that is trained for a while.

    Attributes:
        layers: how many there are.
        layer_map: of each the layer of the stage before; empty for the model as it is.
        share: of all tokens.
        tokens: to train it for, where the budget is told.
    """

    layers: int
    layer_map: tuple[int, ...]
    share: float
    tokens: float | None

    def as_dict(self) -> Mapping[str, Any]:
        """Return the fields as a plain table."""
        return asdict(self)


def plan_stages(
    base: Checkpoint,
    *,
    to: int,
    schedule: Schedule,
    stages: int | None = None,
    tokens: float | None = None,
    alpha: float = 1.0,
) -> list[Stage]:
    """Plan the growth of a model of L layers to `to`.

    - `progressive` doubles: the whole stack is repeated on top, until the depth is there.
    - `gradual` adds a block of equal size at each growth, a copy of the last one.
    - `midas` adds a copy of the middle block in its place.

    Args:
        base: as it is trained first.
        stages: k, the first included; by default as few as equal blocks allow. Doubling has as
            many as it takes.
        tokens: the budget of all stages together.
        alpha: stage i of k is trained for a share proportional to i^alpha (PROP-alpha).

    Raises:
        RecipeError: depths or numbers of stages that do not fit.
        PlanError: the architecture's layers cannot be repeated so.

    Source: Gong et al. 2019 for doubling; arXiv 2409.19044, section 2, for the two others, where
    block ceil(n / 2) of n is the middle one, and for PROP-alpha.
    """
    count = anatomy(base).layers
    _check(count, to, tokens, alpha)
    depths = _depths(count, to, schedule, stages)
    maps = [MAPS[schedule](a, b) for a, b in pairwise(depths)]
    _check_maps(base, maps)
    weights = [i**alpha for i in range(1, len(depths) + 1)]
    shares = [weight / math.fsum(weights) for weight in weights]
    return [
        Stage(
            layers=depth,
            layer_map=tuple(layer_map),
            share=share,
            tokens=None if tokens is None else share * tokens,
        )
        for depth, layer_map, share in zip(depths, [(), *maps], shares, strict=True)
    ]


def _check(count: int, to: int, tokens: float | None, alpha: float) -> None:
    if to <= count:
        fact = f"is no more than the {count} layers that the model has"
        raise RecipeError(f"--to {to}", fact, f"for instance --to {2 * count}")
    if tokens is not None and not (tokens > 0 and math.isfinite(tokens)):
        raise RecipeError(f"--tokens {tokens:g}", "is not a positive number")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise RecipeError(f"--alpha {alpha:g}", "is below 0 or not finite", "the paper took 1 to 3")


def _depths(count: int, to: int, schedule: Schedule, stages: int | None) -> list[int]:
    if schedule == "progressive":
        return _doubled(count, to, stages)
    if stages is None:
        stages = _fewest(count, to)
    if stages < 2:  # noqa: PLR2004 - one to start from, one to grow
        fact = f"is below 2, the {count} layers as they are included"
        raise RecipeError(f"--stages {stages}", fact, _remedy(count, to))
    block, rest = divmod(to - count, stages - 1)
    if rest or not block:
        fact = f"makes no equal blocks of the {to - count} layers that are added"
        raise RecipeError(f"--stages {stages}", fact, _remedy(count, to))
    if count % block:
        fact = f"adds blocks of {block} layers, of which the {count} there are make no whole number"
        raise RecipeError(f"--stages {stages}", fact, _remedy(count, to))
    return [count + block * i for i in range(stages)]


def _fewest(count: int, to: int) -> int:
    """Return the fewest stages whose blocks fit what is there and what is added."""
    return (to - count) // math.gcd(to - count, count) + 1


def _remedy(count: int, to: int) -> str:
    return f"for instance --stages {_fewest(count, to)}"


def _doubled(count: int, to: int, stages: int | None) -> list[int]:
    depths = [count]
    while depths[-1] < to:
        depths.append(depths[-1] * 2)
    if depths[-1] != to:
        fact = f"is not {count} doubled any number of times"
        raise RecipeError(f"--to {to}", fact, f"{depths[-2]} and {depths[-1]} are; or use gradual")
    if stages not in (None, len(depths)):
        fact = f"is not what doubling from {count} to {to} takes"
        raise RecipeError(f"--stages {stages}", fact, f"leave it out, or give {len(depths)}")
    return depths


def _twice(count: int, _: int) -> list[int]:
    return [*range(count), *range(count)]


def _last_again(count: int, more: int) -> list[int]:
    block = more - count
    return [*range(count), *range(count - block, count)]


def _middle_again(count: int, more: int) -> list[int]:
    block = more - count
    end = math.ceil(count // block / 2) * block
    return [*range(end), *range(end - block, count)]


MAPS: Mapping[Schedule, Callable[[int, int], list[int]]] = {
    "progressive": _twice,
    "gradual": _last_again,
    "midas": _middle_again,
}


def _check_maps(base: Checkpoint, maps: Sequence[Sequence[int]]) -> None:
    """Plan each growth in terms of the first layers, so that what is refused shows at once."""
    whole = list(range(anatomy(base).layers))
    for layer_map in maps:
        whole = [whole[n] for n in layer_map]
        stack(base, layers=ranges(whole))


def ranges(layers: Sequence[int]) -> str:
    """Write layers as `--map` takes them: 0-3,2-3."""
    ends = [i for i in range(1, len(layers)) if layers[i] != layers[i - 1] + 1]
    runs = zip([0, *ends], [*ends, len(layers)], strict=True)
    return ",".join(
        str(layers[a]) if b - a == 1 else f"{layers[a]}-{layers[b - 1]}" for a, b in runs
    )


def as_pipeline(model: str, found: Sequence[Stage], quantity: Callable[[float], str]) -> str:
    """Write the stages as a pipeline file, with the place of each training in words.

    Args:
        quantity: writes a number of tokens.
    """
    lines = [f"# Depth in stages: {_told(found[0], quantity)}, before this is run.", "steps:"]
    before = model
    for stage in found[1:]:
        name = f"layers-{stage.layers}"
        lines += [
            f"  {name}:  # {_told(stage, quantity)}",
            "    command: stack",
            f"    base: {_quoted(before)}",
            f'    map: "{ranges(stage.layer_map)}"',
        ]
        before = name
    return "\n".join(lines) + "\n"


def _told(stage: Stage, quantity: Callable[[float], str]) -> str:
    told = f"train the {stage.layers} layers for {stage.share:.1%} of the tokens"
    return told if stage.tokens is None else f"{told}, {quantity(stage.tokens)}"


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
