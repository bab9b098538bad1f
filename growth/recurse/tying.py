"""Layers tied into a loop, with or without factors by which each depth differs."""

from typing import Any

from growth.recurse.block import How
from growth.recurse.factor import METHODS, Svd
from growth.recurse.formats import (
    Form,
    Format,
    Part,
    Ranks,
    adapter_form,
    base_form,
    check_foldable,
    check_format,
    dense_form,
    tied_form,
)
from growth.recurse.loops import Init, Scheme
from growth.recurse.ranks import energy_ranks, even_ranks
from growth.recurse.survey import Looped, survey
from growth.recurse.telling import facts, notes
from surgery.checkpoint import Checkpoint
from surgery.engine import Progress
from surgery.errors import RecipeError
from surgery.plan import Plan, check_plan
from surgery.preflight import MEMORY

SKETCHED = (
    "ranks keep the energy asked for by exact singular values; the sketches of --svd randomized "
    "may keep a little less (gram, the default with --energy, does not)"
)


def tie(
    base: Checkpoint,
    *,
    blocks: int,
    init: Init = "stepwise",
    scheme: Scheme = "cycle",
    tie_norms: bool = False,
    format: Format = "tied",
) -> Plan:
    """Tie L layers into B loops of K = L / B blocks.

    Norms and biases stay per depth; with `tie_norms` they are tied too, as in the paper.

    Args:
        blocks: B, how often the tied layers are run through.
        init: what a block starts from; see `lay_loops`.
        scheme: which block each depth runs; see `lay_loops`.
        format: `tied`, every shared tensor stored once; `dense`, the stock model with copies.

    Raises:
        RecipeError: the ask makes no sense for this model.
        PlanError: the model cannot be made recursive.

    Source: arXiv 2410.20672, section 2.2. Deviation: norms stay per depth by default, since no
    low-rank factor on the linear layers makes up for a tied gain.
    """
    check_format(format, None, parts=("peft",))
    looped = survey(
        base, blocks=blocks, scheme=scheme, init=init, tie_norms=tie_norms, factors=False
    )
    how = How()
    form = tied_form(looped, {}, how) if format == "tied" else dense_form(looped, {}, how)
    asked: dict[str, Any] = {"blocks": blocks, "init": init, "scheme": scheme}
    asked |= {"tie_norms": tie_norms, "format": format}
    told = (*base.notes, *notes(looped, {}, init=init, rank=None))
    return _plan(looped, form, {}, operation="recurse tie", parameters=asked, told=told)


def relax(
    base: Checkpoint,
    *,
    blocks: int,
    rank: int | None = None,
    energy: float | None = None,
    init: Init = "average",
    scheme: Scheme = "cycle",
    tie_norms: bool = False,
    format: Format = "tied",
    part: Part | None = None,
    svd: Svd | None = None,
    device: str = "cpu",
    seed: int = 0,
    workers: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Plan:
    """Tie layers into a loop, and give every linear layer of every depth factors of low rank.

    Depth d computes W x + B A x, with W the tied weight as stored and B A the nearest of its rank
    to what the depth's own weight is beyond it: B = U_r S_r, A = V_r^T, no further factor. A
    depth that has its block for itself gets none.

    Args:
        rank: of every linear layer, or the most that `energy` may take.
        energy: take the smallest ranks that keep this share of each squared residual; the
            weights are read for it.
        format: `tied`; `dense`, the stock model with the factors added; or `peft`, a stock model
            of K layers and an adapter that repeats them.
        part: of `peft`: `base` or `adapter`.
        svd: how residuals are decomposed; `randomized` by default, `gram` with `energy`, which a
            sketch would miss by a little.
        device: where.
        seed: of sketches, and of A where a residual is zero.
        workers, memory, progress: for `energy`.

    Raises:
        RecipeError: the ask makes no sense for this model.
        PlanError: the model cannot be made recursive, or not in this format.

    Source: arXiv 2410.20672, section 2.3.
    """
    check_format(format, part, parts=("peft",))
    _check(rank, energy, svd, device)
    looped = survey(
        base, blocks=blocks, scheme=scheme, init=init, tie_norms=tie_norms, factors=True
    )
    fold = format == "peft" and not tie_norms
    if format == "peft":
        check_foldable(looped)
    how = How(svd=svd or ("gram" if energy else "randomized"), device=device, seed=seed)
    ranks = even_ranks(looped, rank)
    more: tuple[str, ...] = ()
    if energy is not None and part != "base":
        limits: dict[str, Any] = {"workers": workers, "memory": memory, "progress": progress}
        ranks, more = energy_ranks(looped, ranks, energy=energy, how=how, fold=fold, limits=limits)
        more += (SKETCHED,) if svd == "randomized" else ()
    ranks = {name: own for name, own in ranks.items() if any(own)}
    asked: dict[str, Any] = {"blocks": blocks, "rank": rank, "energy": energy, "init": init}
    asked |= {"scheme": scheme, "tie_norms": tie_norms, "format": format, "part": part}
    asked |= {"svd": svd, "device": device, "seed": seed}
    told = (*base.notes, *more)
    if part != "base":
        told += tuple(notes(looped, ranks, init=init, rank=rank))
    form = _form(looped, ranks, how, format, part)
    return _plan(looped, form, ranks, operation="recurse relax", parameters=asked, told=told)


def _form(looped: Looped, ranks: Ranks, how: How, format: Format, part: Part | None) -> Form:
    if part == "base":
        return base_form(looped, how)
    if part == "adapter":
        return adapter_form(looped, ranks, how)
    return dense_form(looped, ranks, how) if format == "dense" else tied_form(looped, ranks, how)


def _plan(
    looped: Looped,
    form: Form,
    ranks: Ranks,
    *,
    operation: str,
    parameters: dict[str, Any],
    told: tuple[str, ...],
) -> Plan:
    base = looped.base
    used = {tensor.name for step in form.steps for tensor in step.inputs}
    why = "no part of the adapter" if form.adapter else "its block starts from other layers"
    return check_plan(
        Plan(
            operation=operation,
            parameters=parameters,
            sources=(base,),
            steps=form.steps,
            order=form.order,
            config=form.config,
            carried=() if form.adapter else base.carried,
            written=form.written,
            dropped={name: why for name in base.tensors if name not in used},
            facts=facts(looped, ranks),
            notes=told,
            adapter=form.adapter,
        )
    )


def _check(rank: int | None, energy: float | None, svd: str | None, device: str) -> None:
    if rank is None and energy is None:
        fact = "needs --rank or --energy"
        raise RecipeError("recurse relax", fact, "for instance --rank 256")
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank}", "is below 1", "surgery recurse tie adds no factors")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy {energy}", "is outside (0, 1]", "for instance --energy 0.9")
    if svd is not None and svd not in METHODS:
        raise RecipeError(f"--svd {svd}", f"is none of {', '.join(METHODS)}")
    if device != "cpu":
        from surgery.evaluate.load import find_device  # with torch

        if find_device(device).type == "mps":
            raise RecipeError(f"--device {device}", "has no float64, which this takes", "try cpu")
