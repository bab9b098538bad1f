"""What is trained has a name in memory and other names on disk: experts are fused, heads tied.

transformers' own conversion, the one that `save_pretrained` uses, tells the names on disk; so
what is written is what the student's files hold, and nothing else.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.adapted import Adapted
from surgery.errors import TrainError

if TYPE_CHECKING:
    import torch

NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Bundle:
    """Parameters that are converted together.

    Attributes:
        memory: their names in memory.
        disk: the names that the conversion gives those that train, and the student's names.
    """

    memory: tuple[str, ...]
    disk: Mapping[str, str]


def plain_name(name: str) -> str:
    """Return a parameter's name in the model without the wrappers of adapters."""
    return name.replace(".base_layer", "")


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a parameter is in, or None outside of them."""
    found = NUMBER.search(f".{name}.")
    return int(found[1]) if found else None


def names_of(model: "torch.nn.Module") -> dict[str, tuple[str, ...]]:
    """Return for each parameter, by its first name, all names that it has (ties, shared layers)."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(plain_name(name))
    return {found[0]: tuple(found) for found in names.values()}


def converted(model: Any, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":  # noqa: ANN401
    """Return tensors by the names that `save_pretrained` writes."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    return found


def only_renames(model: Any) -> bool:  # noqa: ANN401
    """Whether the files hold every parameter as it is in memory, whatever they call it."""
    from transformers.core_model_loading import WeightConverter

    every = getattr(model, "_weight_conversions", None) or ()
    return not any(isinstance(conversion, WeightConverter) for conversion in every)


def bundles(model: Any, student: Checkpoint, trained: Collection[str]) -> tuple[Bundle, ...]:  # noqa: ANN401
    """Return how parameters get from memory to the student's files, a layer at a time.

    Args:
        model: as transformers loaded it; only shapes are looked at.
        trained: first names of the parameters that train.

    Raises:
        TrainError: the student's files do not hold one of them in the shape that it would have.
    """
    place = _Place(model, student)
    layers: dict[int | None, list[str]] = defaultdict(list)
    for name in trained:
        layers[layer_of(name)].extend(place.stored_names(name))
    return tuple(place.bundle(names) for names in layers.values())


def disk_names(model: Any, student: Checkpoint) -> dict[str, tuple[str, ...]]:  # noqa: ANN401
    """Return for each parameter, by its first name, what the student's files call it.

    Raises:
        TrainError: they do not hold one.
    """
    place = _Place(model, student)
    return {
        name: tuple(place.bundle(place.stored_names(name)).disk.values()) for name in place.names
    }


class _Place:
    """The student's files, and the shapes of the model that was loaded from them."""

    def __init__(self, model: Any, student: Checkpoint) -> None:  # noqa: ANN401
        self.model, self.student = model, student
        self.files = Adapted(dict(student.tensors), None)
        self.names = names_of(model)
        self.shapes = {
            plain_name(name): tuple(p.shape)
            for name, p in model.named_parameters(remove_duplicate=False)
        }

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Return the names of a parameter under which the files hold it; all, if they tell none."""
        every = self.names[name]
        if len(every) == 1:
            return every
        return tuple(other for other in every if self._lost([other]) is None) or every[:1]

    def bundle(self, names: Iterable[str]) -> Bundle:
        """Convert what trains alone, or where that gives no tensor of the files, its layer."""
        chosen = list(names)
        lost = self._lost(chosen)
        if lost is None:
            return Bundle(tuple(chosen), self._found(self._empty(chosen)))
        layer = layer_of(chosen[0])
        whole = [n for n in self.shapes if layer_of(n) == layer]
        marks = converted(self.model, {n: self._mark(n, trains=n in chosen) for n in whole})
        touched = {name: mark for name, mark in marks.items() if bool(mark.any())}
        lost = self._odd(touched)
        if lost is not None:
            fact = f"holds no {lost[0]} of the shape {lost[1]}, which is trained in memory"
            raise TrainError(self.student.ref, fact, "another transformers may have written it")
        return Bundle(tuple(whole), self._found(touched))

    def _empty(self, names: Iterable[str]) -> "dict[str, torch.Tensor]":
        import torch

        shaped = {name: torch.empty(self.shapes[name], device="meta") for name in names}
        return converted(self.model, shaped)

    def _mark(self, name: str, *, trains: bool) -> "torch.Tensor":
        import torch

        return torch.tensor(trains).expand(self.shapes[name])

    def _lost(self, names: Iterable[str]) -> tuple[str, list[int]] | None:
        try:
            return self._odd(self._empty(names))
        except (RuntimeError, ValueError, IndexError):  # a part of what is converted is not there
            return next(iter(names)), []

    def _odd(self, tensors: "Mapping[str, torch.Tensor]") -> tuple[str, list[int]] | None:
        """Return the first that the files do not hold in that shape."""
        for name, tensor in tensors.items():
            own = self.files.find(name)
            if own is None or self.student.tensors[own].shape != tuple(tensor.shape):
                return name, list(tensor.shape)
        return None

    def _found(self, tensors: "Mapping[str, torch.Tensor]") -> dict[str, str]:
        return {name: self.files.find(name) or name for name in tensors}


def stored_as(
    model: Any,  # noqa: ANN401
    bundle: Bundle,
    parameters: "Mapping[str, torch.Tensor]",
) -> "Iterator[tuple[str, torch.Tensor]]":
    """Yield the student's names of what trains in a bundle, and the tensors as they are stored.

    Args:
        parameters: those of the bundle; where tensors are only renamed, any of them.
    """
    for name, tensor in converted(model, parameters).items():
        if name in bundle.disk:
            yield bundle.disk[name], tensor
