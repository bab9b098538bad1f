"""Tell which number each tensor gets, and why."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from surgery.method import Scalar
from surgery.recipe.compile import Compiled


@dataclass(frozen=True, slots=True)
class Row:
    """One parameter of one tensor.

    Attributes:
        model: whose value it is; empty where it is one for all.
        why: the place in the recipe, and the filter or the point of the gradient.
    """

    tensor: str
    parameter: str
    model: str
    value: Scalar
    why: str

    @property
    def shown(self) -> str:
        """The value as a person reads it."""
        return f"{self.value:.6g}" if isinstance(self.value, float) else str(self.value).lower()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a plain table."""
        return asdict(self)


def explain(compiled: Compiled) -> tuple[Row, ...]:
    """Return a row for every parameter, model and tensor, in the plan's order."""
    return tuple(_rows(compiled))


def _rows(compiled: Compiled) -> Iterator[Row]:
    for tensor, choices in compiled.choices.items():
        for choice in choices:
            models = choice.models or ("",)
            for model, decided in zip(models, choice.each, strict=True):
                yield Row(tensor, choice.parameter.name, model, decided.value, decided.why)
