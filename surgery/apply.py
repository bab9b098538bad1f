"""Merge tensors in memory, by any method: for notebooks, and for what holds its tensors anyway."""

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError
from surgery.method import Method, Place
from surgery.passes import Passes, Slices
from surgery.plan import Part, Tell
from surgery.slices import PART, part_size

if TYPE_CHECKING:
    from torch import Tensor


def apply(
    method: Method,
    models: Sequence["Tensor"],
    *,
    base: "Tensor | None" = None,
    name: str = "tensor",
    depth: float | None = None,
    vocabulary: bool = False,
    seed: int = 0,
    part: int = PART,
    **parameters: Any,  # noqa: ANN401 - the method's own
) -> "Tensor":
    """Merge tensors and return the result in float32, or float64 where the inputs are.

    Args:
        models: equal shapes, any float dtype; on one device.
        base: where the method takes one.
        name, depth, seed, vocabulary: what the method may know of the tensor, as `Place` tells.
        part: elements that a method of several passes sees at once.
        parameters: by the name that users write, `lambda_` for lambda; a single number stands
            for every model.

    Raises:
        RecipeError: a parameter is unknown, missing or out of range.
    """
    values = resolve(method, parameters, len(models))
    place = Place(name=name, depth=depth, seed=seed, vocabulary=vocabulary)
    if method.takes_place:
        values["place"] = place
    if (base is None) == (method.base == "required") and method.base != "optional":
        fact = "needs a base" if base is None else "takes no base"
        raise RecipeError(method.name, fact)
    tensors = [_floats(t) for t in ([base] if base is not None else []) + list(models)]
    if not tensors[0].numel():
        return tensors[0].clone()
    if method.kind == "elementwise":  # on flat slices, as in a run
        flat: Tensor = method.call([t.reshape(-1) for t in tensors], base is not None, values)
        return flat.view(tensors[0].shape)
    if method.kind != "passes":
        result = method.call(tensors, base is not None, values)
        return _joined(result, tensors[0]) if method.holds else result
    import numpy as np

    call = partial(method.call, has_base=base is not None, values=values)
    with np.errstate(all="ignore"):  # NaN and infinity show in the result
        return _in_passes(call, tensors, place, rows=method.whole_rows(values), size=part)


def resolve(method: Method, parameters: dict[str, Any], models: int) -> dict[str, Any]:
    """Return every parameter's value by keyword, checked; per-model ones as tuples.

    Raises:
        RecipeError: a parameter is unknown, missing or out of range.
    """
    given = {name.rstrip("_"): value for name, value in parameters.items()}
    for name in given:
        method.parameter(name, method.name)
    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        if parameter.required and name not in given:
            raise RecipeError(method.name, f"needs the parameter {name}", parameter.bounds.help)
        value = given.get(name, parameter.default)
        if not parameter.per_model:
            values[parameter.keyword] = parameter.check(value, method.name)
            continue
        each = list(value) if isinstance(value, list | tuple) else [value] * models
        if len(each) != models:
            fact = f"{name} has {len(each)} values for {models} models"
            raise RecipeError(method.name, fact)
        values[parameter.keyword] = tuple(parameter.check(v, method.name) for v in each)
    if method.check:
        method.check(values)
    return values


def _joined(pieces: Iterator["Tensor"], like: "Tensor") -> "Tensor":
    import torch

    flat = [like.new_empty(0), *(piece.reshape(-1) for piece in pieces)]
    return torch.cat(flat).view(like.shape)


def _floats(tensor: "Tensor") -> "Tensor":
    return tensor if tensor.element_size() == 8 else tensor.float()  # noqa: PLR2004 - bytes


def _in_passes(
    call: "partial[Passes]",
    tensors: Sequence["Tensor"],
    place: Place,
    *,
    rows: bool,
    size: int,
) -> "Tensor":
    import torch

    has_base = bool(call.keywords["has_base"])
    shape, total = tensors[0].shape, tensors[0].numel()
    row = (total // max(shape[0], 1) if len(shape) > 1 else total) if rows else 1
    step = part_size(max(row, 1), size)
    flat = [t.reshape(-1, row) if rows else t.reshape(-1) for t in tensors]

    def slices(start: int, count: int, *, sample: bool = False) -> Slices:
        cut = [t[start // row : (start + count) // row] for t in flat]
        part = Part(-1 if sample else start // step, start, count)
        return Slices(part, cut[0] if has_base else None, cut[has_base:], place)

    places = [(at, min(step, total - at)) for at in range(0, total, step)]
    passes = call([t.to("meta") for t in tensors])
    answer: Any = None
    while True:
        try:
            each = passes.send(answer)
        except StopIteration as stop:
            done = [stop.value(slices(*at)).reshape(-1) for at in places]
            return torch.cat(done).view(shape)
        if isinstance(each, Tell):
            answer = None
            continue
        asked = [slices(0, total, sample=True)] if each.sample else [slices(*at) for at in places]
        found = [each.fn(x) for x in asked]
        if each.fold and found:
            found = [reduce(each.fold, found)]
        answer = (each.combine([found]), 0) if each.combine else found
