"""The output as a whole: its tensors in order, its layers, what is left behind."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.method import Method
from surgery.recipe.inputs import Model
from surgery.recipe.outline import Output, lanes, outputs_of
from surgery.recipe.schema import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What the output is made of.

    Attributes:
        donor: the model that config and files come from.
        outputs: in the order of the file.
        layers: of the output; None where the models have no one stack.
        layer_map: per new layer the donor's layer that it stands for; None where none moves.
        vocabulary: names of embeddings and heads.
        dropped: tensors of sources that reach no output, with the reason.
    """

    donor: Model
    outputs: tuple[Output, ...]
    layers: int | None
    layer_map: tuple[int, ...] | None = None
    vocabulary: frozenset[str] = frozenset()
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def depth(self, output: Output) -> float | None:
        """Return 0 for a tensor of the first layer, 1 for the last; None outside."""
        if output.layer is None or self.layers is None:
            return None
        return output.layer / (self.layers - 1) if self.layers > 1 else 0.0


def lay_out_recipe(recipe: Recipe, models: Mapping[str, Model], method: Method) -> Layout:
    """Find the outputs of a recipe and the inputs of each.

    Raises:
        PlanError: the models do not fit together.
    """
    donor = models[recipe.donor]
    (lane,) = lanes(recipe, models, method)
    outputs = tuple(outputs_of(lane))
    parts = donor.parts
    return Layout(
        donor=donor,
        outputs=outputs,
        layers=parts.layers if parts else None,
        vocabulary=frozenset(n for n in (parts.embedding, parts.head) if n)
        if parts
        else frozenset(),
    )
