"""What differs between two models: linear layers to factorise, and modules to hold whole."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.compute import COMPUTABLE
from surgery.difference import TensorDifference
from surgery.errors import RecipeError
from surgery.lora.choice import Choice, parse_filter
from surgery.lora.decompose import block_rows
from surgery.lora.modules import Parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A linear layer that differs.

    Attributes:
        module: its name in memory.
        change: the squared length of the difference.
        swapped: stored [in, out].
    """

    module: str
    base: TensorInfo
    tuned: TensorInfo
    change: float
    swapped: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The stored shape."""
        return self.base.shape[0], self.base.shape[1]

    def blocks(self, base: Any, tuned: Any) -> Callable[[], Iterator[tuple[int, Any]]]:  # noqa: ANN401
        """Return what gives the difference in blocks of rows, from two `Stored` tensors."""
        rows, size = self.shape[0], block_rows(self.shape[1])

        def read() -> Iterator[tuple[int, Any]]:
            for at in range(0, rows, size):
                yield at, tuned[at : at + size].double() - base[at : at + size].double()

        return read


def find_targets(
    base: Checkpoint,
    tuned: Checkpoint,
    found: dict[str, Parameter],
    changed: dict[str, TensorDifference],
    choice: Choice,
) -> list[Target]:
    """Return the linear layers that differ and are asked for.

    Raises:
        RecipeError: a filter matches none.
    """
    linear = {
        name: p
        for name, p in found.items()
        if p.kind != "other"
        and {base.tensors[name].dtype, tuned.tensors[name].dtype} <= {*COMPUTABLE}
    }
    picked = choice.pick([p.module for p in linear.values()])
    return [
        Target(
            module=p.module,
            base=base.tensors[name],
            tuned=tuned.tensors[name],
            change=difference.sums.dd,
            swapped=p.kind == "conv1d",
        )
        for name, p in linear.items()
        if p.module in picked
        and (difference := changed.get(name)) is not None
        and difference.sums is not None
        and difference.sums.dd > 0
    ]


def held_whole(
    found: dict[str, Parameter],
    changed: dict[str, TensorDifference],
    taken: set[str],
    asks: Iterable[str],
) -> dict[str, Parameter]:
    """Return the tensors of modules to be held whole: all of a module's, if one of them differs.

    Of a module that is factorised it is the bias, if that differs.

    Raises:
        RecipeError: nothing that differs is asked for by a name.
    """
    targets = {found[name].module for name in taken}
    modules: dict[str, None] = {}
    biases: dict[str, None] = {}
    for text in asks:
        ask = parse_filter("--modules-to-save", text)
        fits = {n: p for n, p in found.items() if n in changed and ask.matches(p.module)}
        fits = {n: p for n, p in fits.items() if n not in taken}
        if not fits:
            fact = "matches no module that differs beside what is extracted"
            raise RecipeError(f"--modules-to-save {text}", fact)
        modules |= {p.module: None for p in fits.values() if p.module not in targets}
        biases |= {n: None for n, p in fits.items() if p.module in targets}
    return {name: p for name, p in found.items() if p.module in modules or name in biases}
