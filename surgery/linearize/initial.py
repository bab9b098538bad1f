"""How a new parameter begins, and the step that writes it."""

import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from surgery.plan import Step, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["constant", "identity", "last", "normal"]


@dataclass(frozen=True, slots=True)
class Start:
    """What a parameter is at first.

    Attributes:
        kind: `constant`; `identity`, ones on the diagonal of each matrix; `last`, ones in the last
            column; `normal`, drawn.
        value: the constant, or the deviation.
    """

    kind: Kind
    value: float = 0.0

    @property
    def drawn(self) -> bool:
        """Whether it depends on a seed."""
        return self.kind == "normal"


ZERO, ONE = Start("constant"), Start("constant", 1.0)
IDENTITY, LAST = Start("identity"), Start("last")


def constant(value: float) -> Start:
    """Return a start at one number."""
    return Start("constant", value)


def normal(deviation: float) -> Start:
    """Return a start at drawn numbers."""
    return Start("normal", deviation)


def first_value(start: Start, shape: tuple[int, ...], *, seed: str) -> "Tensor":
    """Return a parameter as it begins, in float64.

    Args:
        seed: of what is drawn; any text.
    """
    import torch

    match start.kind:
        case "identity":
            return torch.eye(*shape[-2:], dtype=torch.float64).expand(shape).contiguous()
        case "last":
            found = torch.zeros(shape, dtype=torch.float64)
            found[..., -1] = 1.0
            return found
        case "normal":
            numbers = hashlib.sha256(seed.encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(numbers, "little") >> 1)
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            return drawn * start.value
        case "constant":
            return torch.full(shape, start.value, dtype=torch.float64)


def start_step(name: str, shape: tuple[int, ...], start: Start, *, dtype: str, seed: int) -> Step:
    """Return the step that writes a new parameter."""
    own = f"{seed} {name}" if start.drawn else ""
    return Step(
        outputs=((name, TensorSpec(dtype, shape)),),
        fn=partial(first_value, start, shape, seed=own),
        why="begin",
        key=f"{start} {own}",
    )
