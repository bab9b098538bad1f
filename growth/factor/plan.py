"""A model with factored maps, planned."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from growth.factor.ask import (
    Ask,
    check_ask,
    check_maps,
    check_model,
    forms,
    notes,
    parameters,
    ratio,
)
from growth.factor.config import MODELLING_FILE, factored_config, modelling_file
from growth.factor.form import Form, Method
from growth.factor.steps import energy_forms, factor_step
from growth.linears import Linear, find_linears
from growth.recurse.factor import Svd
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.engine import Progress
from surgery.errors import RecipeError
from surgery.pipeline import is_ahead
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.preflight import MEMORY

NEEDS = {"svd-llm": "grams"}


def factor(
    base: Checkpoint,
    statistics: Checkpoint | None = None,
    *,
    method: Method,
    rank: int | None = None,
    ratio: float | None = None,
    energy: float | None = None,
    density: float | None = None,
    svd: Svd | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    workers: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Plan:
    """Plan a model whose layers' linear maps are products of smaller ones.

    - `svd`: the nearest map of the rank, W ~ B A (PELA).
    - `svd-llm`: that whose outputs on text are nearest (arXiv 2403.07378, section 3.2).
    - `monarch`: the nearest Monarch matrix (arXiv 2204.00595, algorithm 1), blocks near the root.
    - `sparse-low-rank`: W ~ B A + S with few weights in S (the form of arXiv 2406.02214).

    Embeddings, norms, routers, biases and the head stay as they are.

    Args:
        statistics: of `surgery calibrate`, with grams: needed by svd-llm; with the other methods
            they tell the error of outputs.
        rank: of every map, or the most with `energy`; of every block with monarch.
        ratio: share of each map's weights to keep, floor(m n ratio / (m + n)) ranks.
        energy: keep this share of each squared length; the weights are read for it.
        density: share of weights in S; 0.03 by default.
        svd: how singular vectors are found; `randomized` by default, `gram` with `energy`.
        include, exclude: parts of module names, `glob:PATTERN` or `regex:PATTERN`.
        workers, memory, progress: for `energy`.

    Raises:
        RecipeError: an option makes no sense.
        CheckpointError: the statistics lack what is needed.
        PlanError: the model cannot be factored, with the reason.
    """
    ask = Ask(method=method, rank=rank, ratio=ratio, energy=energy, density=density, svd=svd)
    check_ask(ask)
    check_model(base)
    include, exclude = [*include], [*exclude]
    parts, linears = find_linears(base, include=include, exclude=exclude)
    check_maps(base, parts, linears)
    made = forms(linears, ask)
    grams = _grams(statistics, base, linears, method)
    sources = (base,) if statistics is None else (base, statistics)
    if energy is not None and not is_ahead():
        limits: dict[str, Any] = {"workers": workers, "memory": memory, "progress": progress}
        made = energy_forms(linears, made, ask, grams, sources=sources, limits=limits)
    asked = {**parameters(ask), "include": include, "exclude": exclude}
    steps = _steps(base, linears, made, ask, grams)
    return _plan(sources, steps, asked, made, notes(made, ask, _sizes(base, made)))


def _grams(
    statistics: Checkpoint | None, base: Checkpoint, linears: Sequence[Linear], method: Method
) -> dict[str, TensorInfo]:
    if statistics is None:
        if method in NEEDS:
            fact = "needs statistics of the model's activations"
            raise RecipeError(f"--method {method}", fact, "name text with --calibration")
        return {}
    from surgery.calibrate.statistics import open_statistics  # with numpy

    found = open_statistics(statistics, base)
    return {linear.module: found.gram(linear.module) for linear in linears}


def _steps(
    base: Checkpoint,
    linears: Sequence[Linear],
    made: Mapping[str, Form],
    ask: Ask,
    grams: Mapping[str, TensorInfo],
) -> tuple[Step, ...]:
    chosen = {linear.tensor.name: linear for linear in linears}
    steps = []
    for name, tensor in base.tensors.items():
        linear = chosen.get(name)
        if linear is None:
            outputs = ((name, TensorSpec(tensor.dtype, tensor.shape)),)
            steps.append(Step(inputs=(tensor,), outputs=outputs))
        else:
            form = made[linear.module]
            steps.append(factor_step(linear, form, ask, grams.get(linear.module)))
    return tuple(steps)


def _sizes(base: Checkpoint, made: Mapping[str, Form]) -> dict[str, int]:
    return {
        "model": sum(tensor.numel for tensor in base.tensors.values()),
        "maps": sum(form.outputs * form.inputs for form in made.values()),
    }


def _plan(
    sources: tuple[Checkpoint, ...],
    steps: tuple[Step, ...],
    asked: Mapping[str, Any],
    made: Mapping[str, Form],
    told: Sequence[str],
) -> Plan:
    base, *beside = sources
    used = {part.name for step in steps for part in step.inputs[1:]}
    unused = [name for found in beside for name in found.tensors if name not in used]
    return check_plan(
        Plan(
            operation="factor",
            parameters=asked,
            sources=sources,
            steps=steps,
            order=tuple(name for step in steps for name, _ in step.outputs),
            config=factored_config(base.config or {}, made),
            carried=base.carried,
            written={MODELLING_FILE: modelling_file()},
            dropped=dict.fromkeys(unused, "of the statistics, not asked for"),
            facts={
                "parameter_ratio": ratio(made, _sizes(base, made)),
                "factored": {name: form.told() for name, form in made.items()},
            },
            notes=(*base.notes, *told),
        )
    )


def in_all(told: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the share of all squared weights, and of all outputs', that is lost."""
    found = {}
    for name, part, whole in (
        ("error in all", "_lost", "_whole"),
        ("output error in all", "_lost_output", "_whole_output"),
    ):
        lost = sum(figures.get(part, 0.0) for figures in told.values())
        total = sum(figures.get(whole, 0.0) for figures in told.values())
        if total > 0:
            found[name] = lost / total
    return found
