"""What trains of a student, and how it gets back onto disk."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.adapters import WEIGHTS
from surgery.plan import TensorSpec
from surgery.recover.adapter import adapter_config, adapter_tensors, write_config
from surgery.recover.lowrank import Lora, Samples, add_lora
from surgery.recover.masks import Masks
from surgery.recover.names import (
    Bundle,
    bundles,
    disk_names,
    names_of,
    only_renames,
    plain_name,
    stored_as,
)
from surgery.recover.output import TRAINED, open_trained
from surgery.recover.selected import (
    MATRIX,
    check_finite,
    check_student,
    handed_on,
    norms_of,
    select,
)
from surgery.recover.settings import Settings
from surgery.recover.sharded import gathered
from surgery.recover.targets import has_linears
from surgery.recover.tensor_file import code_of, specs_of, write_tensors

if TYPE_CHECKING:
    import torch


@dataclass(slots=True, kw_only=True)
class Trainable:
    """A model of which some parameters train.

    Attributes:
        model: of transformers, changed in place; call it for the forward pass.
        student: the checkpoint it was loaded from.
        mode: what trains, as asked.
        own: names of the model's own parameters that train, without wrappers.
        lora: the factors, with LoRA.
        masks: zeros that stay, of parameters that train.
        bundles: how own parameters get to the student's files.
        whole: own parameters that the adapter holds: norms.
    """

    model: Any
    student: Checkpoint
    mode: str
    own: frozenset[str]
    lora: Lora | None = None
    masks: Masks | None = None
    bundles: tuple[Bundle, ...] = ()
    whole: tuple[str, ...] = ()
    _names: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> "dict[str, torch.nn.Parameter]":
        """What trains, by names that are the same in every run; looked up, as sharding swaps it."""
        found = dict(self.model.named_parameters())
        return {name: found[name] for name in self._names}

    @property
    def count(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters.values())

    def groups(self, settings: Settings) -> list[dict[str, Any]]:
        """Return the optimiser's groups: weight decay acts on matrices only."""
        kinds: dict[tuple[bool, type], list[torch.nn.Parameter]] = defaultdict(list)
        for p in self.parameters.values():
            kinds[p.dim() >= MATRIX, type(p.data)].append(
                p
            )  # fused steps take shards by themselves
        decay = settings.weight_decay
        order = sorted(kinds.items(), key=lambda kind: not kind[0][0])
        return [
            {"params": ps, "weight_decay": decay if is_matrix else 0.0, "share": 1.0}
            for (is_matrix, _), ps in order
        ]

    def renew_masks(self) -> None:
        """Take masks anew, once weights are there that were not when the masks were taken."""
        if self.masks is not None:
            self.masks = self.masks.renewed(self._plain())

    def before_step(self) -> None:
        """Set gradients of zeros that stay to zero; call it before gradients are measured."""
        if self.masks is not None:
            self.masks.on_gradients(self._plain())

    def after_step(self) -> None:
        """Set zeros that stay to zero again."""
        if self.masks is not None:
            self.masks.on_weights(self._plain())

    def export(self, folder: Path, *, write: bool = True) -> None:
        """Write what was trained into a folder: an adapter, replaced tensors, or both.

        Every process of a sharded model calls it; one has `write`.
        """
        if write:
            folder.mkdir(parents=True, exist_ok=True)
        if self.lora is not None:
            tensors = adapter_tensors(self.model, self.lora, self._whole(), gathered)
            if write:
                write_config(folder, adapter_config(self.lora, self.student, self.whole))
                write_tensors(folder / WEIGHTS, specs_of(tensors), tensors.items())
        if self.bundles:
            specs = {name: spec for b in self.bundles for name, spec in self._told(b)}
            made = (pair for bundle in self.bundles for pair in self._stored(bundle))
            if write:
                write_tensors(folder / TRAINED, specs, made)
            else:
                for _ in made:
                    pass

    def _plain(self) -> "dict[str, torch.nn.Parameter]":
        """Return all parameters, under all names that they have without wrappers."""
        every = self.model.named_parameters(remove_duplicate=False)
        return {plain_name(name): p for name, p in every}

    def _whole(self) -> "dict[str, torch.nn.Parameter]":
        found = self._plain()
        return {name: found[name] for name in self.whole}

    def _stored(self, bundle: Bundle) -> "Iterator[tuple[str, torch.Tensor]]":
        found = self._plain()
        parts = [[n] for n in bundle.memory] if only_renames(self.model) else [bundle.memory]
        for names in parts:
            yield from stored_as(self.model, bundle, {n: gathered(found[n]) for n in names})

    def _told(self, bundle: Bundle) -> Iterator[tuple[str, TensorSpec]]:
        found = self._plain()
        code = code_of(*(found[name] for name in bundle.memory))
        for name in bundle.disk.values():
            yield name, TensorSpec(code, self.student.tensors[name].shape)


def make_trainable(
    model: Any,  # noqa: ANN401
    student: Checkpoint,
    settings: Settings,
    *,
    samples: Samples = (),
    part: bool = False,
) -> Trainable:
    """Freeze what does not train, add factors where asked, and check that all of it can be written.

    Args:
        model: the student as transformers loaded it; changed in place.
        samples: inputs of the model, for starts of LoRA that look at them.
        part: the model holds some layers of the student alone.

    Raises:
        RecipeError: what is asked for does not fit the student.
        CheckpointError: the student is quantised, holds NaN, or has adapters.
        TrainError: its files do not hold what would be trained.
    """
    check_student(student)
    own = select(model, student, settings, part=part)
    check_finite(model, student)
    masked = _masked(model, student)
    # A model that is nothing but low-rank factors trains those: they need none beside them.
    is_lora = settings.train == "lora" and (has_linears(model) or own <= norms_of(model))
    norms = own & norms_of(model) if is_lora else frozenset()
    routes = bundles(model, student, sorted(own - norms))
    names = names_of(model)
    lora = add_lora(model, settings, masked=masked, samples=samples) if is_lora else None
    trainable = Trainable(
        model=model,
        student=student,
        mode=settings.train,
        own=own,
        lora=lora,
        bundles=routes,
        whole=tuple(sorted(norms)),
    )
    _freeze(trainable)
    sparse = [name for name in sorted(own) if masked.intersection(names[name])]
    if sparse:
        found = trainable._plain()
        trainable.masks = Masks({name: found[name] for name in sparse})
    if lora is not None:
        _check_adapter(trainable)
    return trainable


def _freeze(trainable: Trainable) -> None:
    """Let only what was chosen train, and list its names."""
    factors = set(trainable.lora.names()) if trainable.lora else set()
    names = []
    for name, parameter in trainable.model.named_parameters():
        trains = name in factors or plain_name(name) in trainable.own
        parameter.requires_grad_(trains)
        if trains:
            names.append(name)
    trainable._names = tuple(names)


def _masked(model: Any, student: Checkpoint) -> frozenset[str]:  # noqa: ANN401
    """Return names in memory of the weights that the record calls sparse.

    Experts that are one parameter in memory keep all their zeros if one expert is called so.
    """
    told = handed_on(student).get("masked")
    wanted = {f"{module}.weight" for module in told} if isinstance(told, list) else set()
    if not wanted:
        return frozenset()
    names = names_of(model)
    found = disk_names(model, student).items()
    return frozenset(other for n, disk in found if wanted & {*disk} for other in names[n])


def _check_adapter(trainable: Trainable) -> None:
    """Refuse a base whose files do not hold what the adapter would change, before any step."""
    with TemporaryDirectory(prefix="surgery-") as scratch:
        folder = Path(scratch)
        assert trainable.lora is not None  # noqa: S101 - told by the caller
        tensors = adapter_tensors(trainable.model, trainable.lora, trainable._whole(), _shape)
        write_config(folder, adapter_config(trainable.lora, trainable.student, trainable.whole))
        write_tensors(folder / WEIGHTS, specs_of(tensors), ())
        open_trained(trainable.student, folder)


def _shape(parameter: "torch.Tensor") -> "torch.Tensor":
    import torch

    return torch.empty(parameter.shape, device="meta")
