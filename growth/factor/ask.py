"""What is asked for: checked, and turned into one form for every map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from growth.factor.form import KINDS, Form, Method, form_of
from growth.linears import Linear
from growth.recurse.factor import METHODS as SVDS
from growth.recurse.factor import Svd
from growth.stock import check_stock
from surgery.anatomy import RECURSIVE, Anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError, RecipeError

FACTORED = "factored"  # model_type of what this makes
MIXED = ".experts."  # maps that transformers packs into one tensor of all experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """The options.

    Attributes:
        rank: of every map, at most with `energy`; of every block of a monarch map.
        ratio: share of each map's weights that is kept.
        energy: share of the squared length that is kept; of the outputs with svd-llm.
        density: share of weights that stand beside the product, for sparse-low-rank.
    """

    method: Method
    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    density: float | None = None
    svd: Svd | None = None

    @property
    def decomposed_by(self) -> Svd:
        """How singular vectors are found."""
        return self.svd or ("gram" if self.energy else "randomized")


def check_ask(ask: Ask) -> None:
    """Refuse options that make no sense together.

    Raises:
        RecipeError: with the reason.
    """
    if ask.method not in KINDS:
        raise RecipeError(f"--method {ask.method}", f"is none of {', '.join(KINDS)}")
    if ask.svd is not None and ask.svd not in SVDS:
        raise RecipeError(f"--svd {ask.svd}", f"is none of {', '.join(SVDS)}")
    if ask.rank is None and ask.ratio is None and ask.energy is None:
        remedy = "for instance --ratio 0.5"
        raise RecipeError("surgery factor", "needs --rank, --ratio or --energy", remedy)
    if ask.ratio is not None and (ask.rank is not None or ask.energy is not None):
        raise RecipeError(
            "--ratio", "decides the ranks, and so does --rank or --energy", "name one"
        )
    if ask.rank is not None and ask.rank < 1:
        raise RecipeError(f"--rank {ask.rank}", "is below 1", "for instance --rank 64")
    if ask.ratio is not None and not 0 < ask.ratio <= 1:
        raise RecipeError(f"--ratio {ask.ratio}", "is outside (0, 1]", "for instance --ratio 0.5")
    if ask.energy is not None and not 0 < ask.energy <= 1:
        raise RecipeError(f"--energy {ask.energy}", "is outside (0, 1]", "for instance 0.95")
    _check_density(ask)


def _check_density(ask: Ask) -> None:
    sparse = ask.method == "sparse-low-rank"
    if ask.density is None:
        return
    place = f"--density {ask.density}"
    if not sparse:
        raise RecipeError(place, "is for --method sparse-low-rank alone", "leave it out")
    if not 0 < ask.density < 1:
        raise RecipeError(place, "is outside (0, 1)", "for instance --density 0.03")
    if ask.ratio is not None and ask.ratio <= ask.density:
        fact = f"leaves nothing of --ratio {ask.ratio} to the product"
        raise RecipeError(place, fact, "raise the one or lower the other")


def check_model(base: Checkpoint) -> None:
    """Refuse what the factored model class does not build on.

    Raises:
        PlanError: with the reason.
    """
    config = base.config
    if config is None:
        fact = "has no config.json, which would say what model it is"
        raise PlanError(base.ref, fact, "name the directory of a model")
    if config.get("model_type") == FACTORED:
        remedy = "write it out first: surgery factor MODEL --materialize"
        raise PlanError(base.ref, "is factored already", remedy)
    if config.get("model_type") == RECURSIVE:
        fact = "is recursive, so that its layers share their maps"
        raise PlanError(base.ref, fact, "write it out first: surgery recurse materialize")
    check_stock(base, verb="factor", result="factored", quantised="and factors would not be")


def check_maps(base: Checkpoint, parts: Anatomy, linears: Sequence[Linear]) -> None:
    """Refuse maps that the model in memory does not have one by one under these names.

    Raises:
        PlanError: with the reason.
    """
    if parts.section or parts.other_stacks:
        fact = "has towers or stacks beside the language model's layers"
        raise PlanError(base.ref, fact, "name a model of text alone")
    if "." not in parts.stack.prefix:
        fact = f"names its layers {parts.stack.prefix}.0, without the model's own prefix"
        raise PlanError(base.ref, fact, "load it with transformers and save it again")
    if parts.lost_head:
        raise PlanError(base.ref, "promises an output head of its own, but there is none")
    mixed = next((x.module for x in linears if MIXED in x.module), None)
    if mixed is not None:
        fact = "is one expert of several, which are one tensor once they are loaded"
        raise PlanError(mixed, fact, "leave experts out: --exclude .experts.")
    behind = next((x for x in linears if _layer(parts, x) >= parts.layers), None)
    if behind is not None:
        raise PlanError(
            behind.module, "is of a predictor layer, which is not built", "--exclude it"
        )


def _layer(parts: Anatomy, linear: Linear) -> int:
    located = parts.locate(linear.tensor.name)
    assert located is not None  # noqa: S101 - as it was found
    return located[0]


def forms(linears: Sequence[Linear], ask: Ask) -> dict[str, Form]:
    """Return the form of each map by its module; with `energy`, of the rank at most.

    Raises:
        RecipeError: a ratio leaves a map no rank.
        PlanError: a monarch map cannot be cut into blocks.
    """
    return {linear.module: _form(linear, ask) for linear in linears}


def _form(linear: Linear, ask: Ask) -> Form:
    form = form_of(linear, KINDS[ask.method], 1, _density(ask))
    if form.kind == "monarch":
        for size, blocks, side in zip(form.shape, form.blocks[::-1], SIDES, strict=True):
            if blocks == 1:
                fact = f"has {size} {side}, a prime number, which cannot be cut into blocks"
                raise PlanError(linear.module, fact, "take another method, or --exclude it")
    rank = ask.rank or form.most
    if ask.ratio is not None:
        rank = int(ask.ratio * form.outputs * form.inputs - form.entries) // form.per_rank
    if rank < 1:
        fact = f"leaves {linear.module} ({form.outputs} x {form.inputs}) no rank"
        raise RecipeError(f"--ratio {ask.ratio}", fact, "keep more, or --exclude small maps")
    return ranked(form, rank)


SIDES = ("outputs", "inputs")
DENSITY = 0.03  # SLTrain's


def _density(ask: Ask) -> float:
    return DENSITY if ask.density is None else ask.density


def ranked(form: Form, rank: int) -> Form:
    """Return a form with another rank, capped."""
    from dataclasses import replace

    return replace(form, rank=min(max(rank, 1), form.most))


def notes(made: Mapping[str, Form], ask: Ask, sizes: Mapping[str, int]) -> list[str]:
    """Return what a user should know before it runs.

    Args:
        sizes: `model`, how many numbers it has, and `maps`, those of the factored maps.
    """
    found = [
        f"the factored form holds {ratio(made, sizes):.1%} of the model's parameters, "
        f"{_numbers(made) / sizes['maps']:.1%} of those in the {len(made)} maps"
    ]
    over = [name for name, form in made.items() if form.numbers > form.outputs * form.inputs]
    if over:
        form = made[over[0]]
        found.append(
            f"the factors of {over[0]} at rank {form.rank} have {form.numbers} weights, more than "
            f"the map's {form.outputs * form.inputs} ({len(over)} of {len(made)} maps are so)"
        )
    capped = [n for n, form in made.items() if ask.rank is not None and form.most < ask.rank]
    if capped:
        found.append(f"no rank is above a matrix's shorter side: {capped[0]} is met exactly")
    return found


def ratio(made: Mapping[str, Form], sizes: Mapping[str, int]) -> float:
    """Return the share of the model's parameters that the factored form holds."""
    return (sizes["model"] - sizes["maps"] + _numbers(made)) / sizes["model"]


def _numbers(made: Mapping[str, Form]) -> int:
    return sum(form.numbers for form in made.values())


def parameters(ask: Ask) -> dict[str, Any]:
    """Return the options for the record."""
    return {name: getattr(ask, name) for name in Ask.__slots__}
