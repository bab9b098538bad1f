"""Sums of models' weights, and their means as weights of one loaded model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.checkpoint import open_checkpoint
from surgery.errors import TrainError
from surgery.evaluate.load import Loaded, Source, load
from surgery.evaluate.pairs import Settings
from surgery.plan import TensorSpec
from surgery.recipe.tensors import FLOATS, widest

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]

_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_HALVES = ("BF16", "F16")


def tensors_of(loaded: Loaded) -> dict[str, "torch.Tensor"]:
    """Return every tensor that a model keeps, once where several names share one."""
    found, seen = {}, set()
    for name, tensor in loaded.model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if key not in seen or not tensor.numel():
            found[name] = tensor
        seen.add(key)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """To which dtype each tensor of an average is rounded, as in the file it would be written to.

    Attributes:
        outputs: tensors of that file. One that goes by another name inside the model, as fused
            experts do, is rounded to the widest dtype among them.
    """

    outputs: Mapping[str, TensorSpec]

    def of(self, name: str) -> str:
        """Return the code of a tensor's dtype."""
        spec = self.outputs.get(name)
        if spec is not None:
            return spec.dtype
        return widest([s.dtype for s in self.outputs.values() if s.dtype in FLOATS])

    def sums(self, name: str) -> "torch.dtype":
        """Return what a tensor is summed in: float32 for what is written in 16 bits, else float64.

        It is what the engine averages in.
        """
        import torch

        return torch.float32 if self.of(name) in _HALVES else torch.float64

    def mean(self, name: str, total: "torch.Tensor", count: int) -> "torch.Tensor":
        """Return a mean, rounded as it would be written."""
        import torch

        mean: torch.Tensor = (total * (1 / count)).to(getattr(torch, _TORCH[self.of(name)]))
        return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """The sum of the weights of models.

    Attributes:
        tensors: sums by name; of what holds no floats, the one value that all share.
        count: how many models.
    """

    tensors: State
    count: int
    rounding: Rounding

    @classmethod
    def of(cls, state: State, rounding: Rounding) -> "Total":
        """Begin with one model; its tensors are copied."""
        tensors = {
            name: tensor.to(_sum_dtype(name, tensor, rounding), copy=True)
            for name, tensor in state.items()
        }
        return cls(tensors=tensors, count=1, rounding=rounding)

    def plus(self, state: State) -> "Total":
        """Return the sum with one more model: one addition a tensor."""
        added = dict(self._added(state))
        return Total(tensors=added, count=self.count + 1, rounding=self.rounding)

    def write(self, loaded: Loaded, more: State | None = None) -> None:
        """Make a model in memory the mean of what is summed, and of one more if given."""
        count = self.count + (more is not None)
        added = self.tensors.items() if more is None else self._added(more)
        held = tensors_of(loaded)
        for name, total in added:
            if total.is_floating_point():
                held[name].copy_(self.rounding.mean(name, total, count))

    def _added(self, state: State) -> Iterator[tuple[str, "torch.Tensor"]]:
        for name, total in self.tensors.items():
            one = state[name].to(total.device)
            if total.is_floating_point():
                yield name, total + one
                continue
            if not one.equal(total):
                fact = "holds whole numbers that differ between the models"
                raise TrainError(name, fact, "such a tensor is copied, not averaged: make it equal")
            yield name, total


def _sum_dtype(name: str, tensor: "torch.Tensor", rounding: Rounding) -> "torch.dtype":
    return rounding.sums(name) if tensor.is_floating_point() else tensor.dtype


@dataclass(slots=True, kw_only=True)
class Parts:
    """Models that are averaged; their weights stay in memory while there is room for them.

    Attributes:
        memory: bytes of weights to keep; those of other models are loaded each time.
    """

    sources: Sequence[Source]
    settings: Settings
    memory: int
    _kept: dict[int, State] = field(default_factory=dict)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def load(self, number: int) -> Loaded:
        """Load a model, to be run and overwritten; keep a copy of its weights if there is room.

        Raises:
            TrainError: it cannot be loaded, or holds other tensors than the first that was.
        """
        source = self.sources[number]
        loaded = load(source, device=self.settings.device, dtype=self.settings.dtype)
        state = tensors_of(loaded)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            odd = min({k for k, _ in shapes.items() ^ self._shapes.items()})
            fact = f"holds other tensors than the first model, such as {odd}"
            raise TrainError(source.ref, fact, "average models of one build")
        if number not in self._kept:
            self._keep(number, state)
        return loaded

    def state(self, number: int) -> State:
        """Return the weights of a model, from memory or else loaded."""
        if number in self._kept:
            return self._kept[number]
        return tensors_of(self.load(number))

    def _keep(self, number: int, state: State) -> None:
        dtype = _stored_dtype(self.sources[number])
        needed = sum(t.numel() * dtype.itemsize for t in state.values())
        if needed + self._held(*self._kept.values()) > self.memory:
            return
        self._kept[number] = {
            name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in state.items()
        }

    @staticmethod
    def _held(*states: State) -> int:
        return sum(tensor.nbytes for state in states for tensor in state.values())


def _stored_dtype(source: Source) -> "torch.dtype":
    """Return the dtype that holds every weight of a model as its file does."""
    import torch

    codes = {t.dtype for t in open_checkpoint(source.path).tensors.values()} & set(FLOATS)
    found: torch.dtype = getattr(torch, _TORCH[widest(sorted(codes)) if codes else "F64"])
    return found
