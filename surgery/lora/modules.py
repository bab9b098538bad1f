"""Which stored tensors are weights of linear layers, and what models in memory call them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgery.anatomy import MIXER
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.adapted import canonical

Kind = Literal["linear", "conv1d", "other"]
# Matrices that no linear layer holds, by the name of their module: in files without a config.
NOT_LINEAR = re.compile(
    r"(^|\.)(wte|wpe|\w*embed\w*|router|gate|experts?|conv\w*)(\.|$)|norm|" + MIXER.pattern
)
MATRIX = 2  # axes


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model in memory.

    Attributes:
        name: such as model.layers.0.self_attn.q_proj.weight.
        kind: of its module; `conv1d` is a linear layer stored [in, out].
    """

    name: str
    kind: Kind

    @property
    def module(self) -> str:
        """The module's name."""
        return self.name.rpartition(".")[0]


def parameters(checkpoint: Checkpoint) -> tuple[dict[str, Parameter], tuple[str, ...]]:
    """Return parameters by stored name, and notes; tensors that are no parameter are left out.

    transformers is asked, where it knows the model: an adapter's names are those of modules in
    memory, which files spell differently. Otherwise the stored names and shapes tell.
    """
    from surgery.loading import CannotTell, empty_model

    try:
        model = empty_model(checkpoint)
    except CannotTell as reason:
        note = f"modules are named as on disk, because transformers was not asked: {reason}"
        return {name: _told_by_name(name, t) for name, t in checkpoint.tensors.items()}, (note,)
    built = {p.name: p for p in _built(model)}
    by_canonical: dict[tuple[str, ...], list[Parameter]] = {}
    for parameter in built.values():
        by_canonical.setdefault(canonical(parameter.name), []).append(parameter)
    return dict(_matched(checkpoint.tensors, built, by_canonical)), ()


def _told_by_name(name: str, tensor: TensorInfo) -> Parameter:
    module = name.removesuffix(".weight")
    linear = name != module and len(tensor.shape) == MATRIX and not NOT_LINEAR.search(module)
    return Parameter(name, "linear" if linear else "other")


def _built(model: Any) -> list[Parameter]:  # noqa: ANN401 - torch's module
    import torch

    found = []
    for name, module in model.named_modules():
        kind: Kind = "linear" if type(module) is torch.nn.Linear else "other"
        kind = "conv1d" if type(module).__name__ == "Conv1D" else kind
        for own, _ in module.named_parameters(recurse=False):
            at = f"{name}.{own}" if name else own
            found.append(Parameter(at, kind if own == "weight" else "other"))
    return found


def _matched(
    tensors: Mapping[str, TensorInfo],
    built: Mapping[str, Parameter],
    by_canonical: Mapping[tuple[str, ...], list[Parameter]],
) -> list[tuple[str, Parameter]]:
    found = []
    for name in tensors:
        fits = [built[name]] if name in built else by_canonical.get(canonical(name), [])
        if len(fits) == 1:
            found.append((name, fits[0]))
    return found
