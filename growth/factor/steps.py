"""The steps that factor one map, and that measure what each rank of it is worth."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from growth.factor.ask import Ask, ranked
from growth.factor.form import Form
from growth.factor.numbers import (
    dense,
    lost,
    low_rank,
    monarch,
    sparse_low_rank,
    spectrum,
    whitened_low_rank,
)
from growth.linears import Linear
from growth.recurse.factor import scratch as svd_scratch
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.compute import torch_dtype
from surgery.lora.spectra import measured
from surgery.plan import Step, Tell, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

DOUBLE = 8  # bytes
OF_OUTPUTS = ("output_error", "_lost_output", "_whole_output")


def factor_step(linear: Linear, form: Form, ask: Ask, gram: TensorInfo | None) -> Step:
    """Return the step that writes a map's factors and tells how far they are from it.

    `error` is |W - W'|^2 / |W|^2 with W' as it is stored; where there is a Gram matrix,
    `output_error` is |(W - W') X|^2 / |W X|^2.
    """
    stored = linear.tensor.dtype

    def fn(weight: Any, *beside: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        w = whole(weight, swapped=linear.swapped)
        grams = beside[0][...] if beside else None
        parts = _rounded(_factors(form, ask, w, grams, linear), stored, w.dtype)
        yield from parts
        change = dense(form, parts).neg_().add_(w)
        yield Tell(**_shares(lost(w, change, None if grams is None else grams.to(w.dtype))))

    names = ("error", "_lost", "_whole", *(OF_OUTPUTS if gram else ()))
    outputs = form.specs(stored).items()
    return Step(
        inputs=(linear.tensor, *((gram,) if gram else ())),
        outputs=tuple((f"{linear.module}.{name}", spec) for name, spec in outputs),
        fn=fn,
        streamed=True,
        scratch=_scratch(form, ask, grams=gram is not None),
        why=ask.method,
        key=repr((form, ask)),
        tells=names,
    )


def whole(weight: Any, *, swapped: bool) -> "Tensor":  # noqa: ANN401 - `Stored`
    """Return a map as [outputs, inputs]."""
    found: Tensor = weight[...]
    return found.T.contiguous() if swapped else found


def _factors(
    form: Form, ask: Ask, w: "Tensor", gram: "Tensor | None", linear: Linear
) -> "Sequence[Tensor]":
    svd, seed = ask.decomposed_by, linear.module
    if ask.method == "monarch":
        return monarch(w, form)
    if ask.method == "sparse-low-rank":
        return sparse_low_rank(w, form, dtype=torch_dtype(linear.tensor.dtype), svd=svd, seed=seed)
    if ask.method == "svd-llm":
        assert gram is not None  # noqa: S101 - planned with it
        return whitened_low_rank(w, gram, form.rank, svd=svd, seed=seed)
    return low_rank(w, form.rank, svd=svd, seed=seed)


def _rounded(parts: "Sequence[Tensor]", stored: str, dtype: Any) -> "list[Tensor]":  # noqa: ANN401
    """Return factors as they are stored, in floats; places stay integers."""
    kept = torch_dtype(stored)
    return [p.to(kept).to(dtype) if p.is_floating_point() else p for p in parts]


def _shares(found: Mapping[str, float]) -> dict[str, float]:
    shares = {"error": _share(found["_lost"], found["_whole"])}
    if "_lost_output" in found:
        shares["output_error"] = _share(found["_lost_output"], found["_whole_output"])
    return {**shares, **found}


def _share(part: float, all_of_it: float) -> float:
    return max(part, 0.0) / all_of_it if all_of_it > 0 else 0.0


def _scratch(form: Form, ask: Ask, *, grams: bool) -> int:
    """Return the bytes held: the map, and its decomposition or its change, whichever is more."""
    size, few = form.outputs * form.inputs, form.inputs**2
    parts = 3 * DOUBLE * form.numbers
    match ask.method:
        case "monarch":
            need = 5 * DOUBLE * size
        case "sparse-low-rank":
            need = 5 * DOUBLE * size + svd_scratch(form.shape, form.rank, ask.decomposed_by, DOUBLE)
        case "svd-llm":
            need = DOUBLE * (2 * size + 2 * few)
            need += svd_scratch(form.shape, form.rank, ask.decomposed_by, DOUBLE)
        case _:
            need = svd_scratch(form.shape, form.rank, ask.decomposed_by, DOUBLE)
    held = DOUBLE * (2 * size + (2 * few if grams else 0))  # the map, perhaps turned; Gram matrix
    return held + parts + max(need, 4 * DOUBLE * size)


def energy_forms(
    chosen: Sequence[Linear],
    most: Mapping[str, Form],
    ask: Ask,
    grams: Mapping[str, TensorInfo],
    *,
    sources: Sequence[Checkpoint],
    limits: Mapping[str, Any],
) -> dict[str, Form]:
    """Return the forms with the smallest ranks that keep the energy; reads the weights.

    Args:
        most: forms with the rank at most.
        limits: workers, memory and progress.

    Raises:
        PlanError: a matrix does not fit into the memory.
    """
    assert ask.energy is not None  # noqa: S101 - asked for
    steps = [_spectrum(x, most[x.module], ask, grams.get(x.module)) for x in chosen]
    spectra = measured(steps, sources, "--energy", limits)
    found = {}
    for name, form in most.items():
        wanted = smallest(spectra.numbers(name).tolist(), ask.energy)
        found[name] = ranked(form, min(wanted, form.rank))
    return found


def smallest(squares: Sequence[float], energy: float) -> int:
    """Return how many of the falling squares make up the share, at least one."""
    wanted, kept = energy * sum(squares) * (1 - 1e-12), 0.0
    for rank, square in enumerate(squares, 1):
        kept += square
        if kept >= wanted:
            return rank
    return len(squares)


def _spectrum(linear: Linear, form: Form, ask: Ask, gram: TensorInfo | None) -> Step:
    beside = (gram,) if gram is not None and ask.method == "svd-llm" else ()

    def fn(weight: Any, *given: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        w = whole(weight, swapped=linear.swapped)
        yield spectrum(form, w, given[0][...] if given else None)

    return Step(
        outputs=((linear.module, TensorSpec("F64", (form.most,))),),
        inputs=(linear.tensor, *beside),
        fn=fn,
        streamed=True,
        scratch=_scratch(form, ask, grams=bool(beside)),
        why="measure",
    )
