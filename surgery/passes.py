"""What a merge method of several passes asks for, and how any method becomes a step.

A method that needs a figure of the whole tensor (a norm, a threshold) is a generator function:

    @merge(source=...)
    def slerp(base: Tensor, other: Tensor, *, t: float) -> Passes:
        aa, ab, bb = yield total(lambda x: (dot(x.base, x.base), ...))
        ...
        return lambda x: ca * x.base + cb * x.models[0]

Its tensor arguments are meta tensors: shapes without data. Each pass is a function of `Slices`.
"""

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import TensorInfo
from surgery.method import Method, Place
from surgery.plan import Part, Pass, Step, Tell, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, np.dtype[Any]]

Function = Callable[["Slices"], Any]
Passes = Generator["Each | Tell", Any, Function]
BLOCK = 4096  # elements whose products float32 sums
SMALLEST, LARGEST = 1e-20, 1e20  # squares of slices beyond these are taken in float64


class Slices:
    """The same part of every input: floats, flat or [rows, columns] by the method's `rows`."""

    def __init__(
        self, part: Part, base: "Tensor | None", models: Sequence["Tensor"], place: Place
    ) -> None:
        self.part = part
        self._base = base
        self.models = models
        self._place = place

    @property
    def has_base(self) -> bool:
        """Whether there is a base."""
        return self._base is not None

    @property
    def base(self) -> "Tensor":
        """The base's slice."""
        assert self._base is not None  # noqa: S101 - a method without a base must not ask
        return self._base

    @cached_property
    def deltas(self) -> list["Tensor"]:
        """The slices of the task vectors, model - base; fresh tensors, to be changed in place."""
        return [model - self.base for model in self.models]

    def bits(
        self, model: int, *, kind: str = "uint32", stream: int = 0, count: int | None = None
    ) -> "Array":
        """Return random integers of a dtype, all bits random: `count`, or one for every element.

        Decided by seed, tensor name, model, part, and which `stream` of them is asked for.
        """
        import numpy as np

        text = f"{self._place.seed}\0{self._place.name}\0{model}\0{self.part.index}"
        text += f"\0{stream}" if stream else ""
        key = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
        wanted = self.part.count if count is None else count
        size = wanted * np.dtype(kind).itemsize
        raw = np.random.SFC64(np.random.SeedSequence(key.tolist())).random_raw(-(-size // 8))
        return raw.view(kind)[:wanted]


class Each:
    """Ask a function of every part; the answer is the list of what it returns, in order.

    Args:
        sample: ask once, for elements picked evenly from the whole tensor.
        group: ask all tensors of the merge, and combine their lists by `combine`; the answer is
            then what that made, and the tensor's place among them.
        fold: make one of what a part and all before it gave, and of what the next gives, so that
            no list is kept; the answer (with `group`, the tensor's list) then holds that one, or
            nothing where there are no parts.
    """

    def __init__(
        self,
        fn: Function,
        *,
        sample: bool = False,
        group: str = "",
        combine: Callable[[list[list[Any]]], Any] | None = None,
        fold: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self.fn, self.sample, self.group, self.combine = fn, sample, group, combine
        self.fold = fold


def total(fn: Callable[[Slices], Sequence[float]]) -> Generator[Each, Any, list[float]]:
    """Ask for numbers of every part and return their sums, exactly rounded: `yield from total`."""
    from math import fsum

    found: list[Sequence[float]] = yield Each(fn)
    return [fsum(column) for column in zip(*found, strict=True)]


def dot(a: "Tensor", b: "Tensor") -> float:
    """Return the dot product of two slices, as `dots` does."""
    return dots([a, b])[1]


def dots(slices: Sequence["Tensor"]) -> list[float]:
    """Return the dot products of slices: each with itself and with those behind it, in order.

    Tensors or numpy arrays give the same numbers: float32 products are summed in float32 over
    short blocks, and these in float64 (measured on 64 Ki elements: a third of the time that
    float64 takes, an error of 1e-8). Where squares could leave float32's range, all is float64.
    """
    import numpy as np

    flat = [_array(held).reshape(-1) for held in slices]
    with np.errstate(over="ignore"):
        squares = [_dot(held, held) for held in flat]
    if not all(SMALLEST < square < LARGEST for square in squares):
        flat = [held.astype(np.float64, copy=False) for held in flat]
        squares = [_dot(held, held) for held in flat]
    pairs = [[_dot(a, b) for b in flat[n:]] for n, a in enumerate(flat, start=1)]
    return [one for square, others in zip(squares, pairs, strict=True) for one in (square, *others)]


def _array(held: Any) -> "Array":  # noqa: ANN401 - of either library
    import numpy as np

    return held if isinstance(held, np.ndarray) else held.detach().cpu().numpy()


def _dot(a: "Array", b: "Array") -> float:
    """Sum over blocks, which no BLAS spreads over threads of its own."""
    import numpy as np

    whole = len(a) // BLOCK * BLOCK
    blocks = np.vecdot(a[:whole].reshape(-1, BLOCK), b[:whole].reshape(-1, BLOCK))
    return float(blocks.sum(dtype=np.float64)) + float(np.vecdot(a[whole:], b[whole:]))


def merge_step(
    method: Method,
    *,
    name: str,
    spec: TensorSpec,
    base: TensorInfo | None,
    models: Sequence[TensorInfo],
    values: Mapping[str, Any],
    place: Place,
) -> Step:
    """Return the step that merges one tensor.

    Args:
        base, models: equal shapes; views are welcome.
        values: the parameters resolved for this tensor, by keyword; tuples for per-model ones.
    """
    inputs = (base, *models) if base is not None else tuple(models)
    if not spec.numel:  # nothing to ask, and no figure of nothing
        return Step(
            outputs=((name, spec),),
            inputs=inputs,
            fn=lambda *tensors: tensors[0],
            elementwise=True,
            plain=True,
            why=method.name,
        )
    arguments = {**values, "place": place} if method.takes_place else dict(values)
    fn: Callable[..., Any]
    if method.kind == "passes":
        fn = _generator(method, inputs, base is not None, arguments, place)
    else:
        fn = _plain(method, base is not None, arguments)
    return Step(
        outputs=((name, spec),),
        inputs=inputs,
        fn=fn,
        elementwise=method.kind == "elementwise",
        passes=method.kind == "passes",
        rows=method.whole_rows(values),
        plain=method.is_plain(values),
        scratch=_scratch(method, arguments, spec, inputs, len(models)),
        streamed=method.holds is not None,
        why=method.name,
        key=repr((sorted(values.items()), place)),
        groups=tuple(f"{place.group}{group}" for group in method.groups(values)),
        tells=method.tells,
    )


def _scratch(
    method: Method,
    values: Mapping[str, Any],
    spec: TensorSpec,
    inputs: tuple[TensorInfo, ...],
    models: int,
) -> int:
    if method.holds:
        width = Step(outputs=(("", spec),), inputs=inputs).width
        return method.holds(values, spec.shape, models, width)
    return method.scratch * 8 * spec.numel if method.kind == "whole" else 0


def _plain(method: Method, has_base: bool, values: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda *tensors: method.call(tensors, has_base, values)


def _generator(
    method: Method,
    inputs: Sequence[TensorInfo],
    has_base: bool,
    values: Mapping[str, Any],
    place: Place,
) -> Callable[[], Generator[Pass | Tell, Any, Callable[..., Any]]]:
    def on_parts(fn: Function) -> Callable[..., Any]:
        def call(part: Part, *tensors: "Tensor") -> Any:  # noqa: ANN401 - what fn finds
            base, models = (tensors[0], tensors[1:]) if has_base else (None, tensors)
            return fn(Slices(part, base, models, place))

        return call

    def asked(each: Each) -> Pass:
        return Pass(
            fn=on_parts(each.fn),
            sample=each.sample,
            group=f"{place.group}{each.group}" if each.group else "",
            combine=each.combine,
            fold=each.fold,
        )

    def run() -> Generator[Pass | Tell, Any, Callable[..., Any]]:
        shapes = [_shape(tensor.shape, plain=method.is_plain(values)) for tensor in inputs]
        passes: Passes = method.call(shapes, has_base, values)
        answer = None
        while True:
            try:
                each = passes.send(answer)
            except StopIteration as stop:
                return on_parts(stop.value)
            answer = yield each if isinstance(each, Tell) else asked(each)

    return run


def _shape(shape: tuple[int, ...], *, plain: bool) -> Any:  # noqa: ANN401 - of either kind
    """Return a tensor without data, or an array without any of its own."""
    if plain:
        import numpy as np

        return np.broadcast_to(np.float32(0), shape)
    import torch

    return torch.empty(shape, device="meta")
