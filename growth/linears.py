"""The linear maps of a model's layers, as they are stored."""

from collections.abc import Iterable
from dataclasses import dataclass

from surgery.alignment.groups import INPUTS_FIRST
from surgery.anatomy import MIXER, Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError
from surgery.layers.kinds import refuse_recursive
from surgery.lora.choice import Choice
from surgery.lora.modules import NOT_LINEAR

FLOATS = ("BF16", "F16", "F32", "F64")
MATRIX = 2


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear map.

    Attributes:
        module: its name, without `.weight`.
        tensor: its weight.
        swapped: stored [inputs, outputs], as GPT-2's are.
    """

    module: str
    tensor: TensorInfo
    swapped: bool

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.tensor.shape[1 if self.swapped else 0]

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.tensor.shape[0 if self.swapped else 1]


def find_linears(
    base: Checkpoint, *, include: Iterable[str] = (), exclude: Iterable[str] = ()
) -> tuple[Anatomy, list[Linear]]:
    """Return the linear maps of all layers; routers, norms and mixers of linear attention are none.

    Args:
        include, exclude: parts of module names, `glob:PATTERN` or `regex:PATTERN`.

    Raises:
        RecipeError: a filter matches nothing.
        PlanError: there are none, or one is stored in packed or quantised form.
    """
    refuse_recursive(base)
    parts = anatomy(base)
    swapped = parts.family in INPUTS_FIRST
    found: dict[str, Linear] = {}
    for name, tensor in base.tensors.items():
        located, module = parts.locate(name), name.removesuffix(".weight")
        if located is None or module == name or len(tensor.shape) != MATRIX:
            continue
        if parts.part(name) in {"norms", "router"} or MIXER.search(located[1]):
            continue
        if NOT_LINEAR.search(_own(located[1])):
            continue
        found[module] = Linear(module, tensor, swapped)
    chosen = Choice(include, exclude).pick(list(found))
    picked = [linear for module, linear in found.items() if module in chosen]
    if not picked:
        fact = "has no linear maps stored one by one in its layers"
        raise PlanError(base.ref, fact, "mixtures that are stored as one tensor are not supported")
    packed = next((x for x in picked if x.tensor.dtype not in FLOATS), None)
    if packed is not None:
        fact = f"is stored as {packed.tensor.dtype}"
        raise PlanError(packed.tensor.name, fact, "dequantise the checkpoint first")
    return parts, picked


def _own(rest: str) -> str:
    """Return the last part of a module's name: what it is, wherever it is."""
    return rest.removesuffix(".weight").rpartition(".")[2]
