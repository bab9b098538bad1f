"""Models whose weights go from their files straight into the shards of several processes.

The model is built on the meta device and sharded there. Then every process reads its own rows of
every tensor, a few megabytes at a time; what cannot be sharded it reads whole. Buffers that no
file holds (RoPE's frequencies) are made by the model's own code.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from surgery.checkpoint.adapted import Adapted
from surgery.errors import CheckpointError
from surgery.evaluate.load import Loaded, Source, load
from surgery.recover.ask import Ask
from surgery.recover.distributed import World, shard
from surgery.recover.names import (
    converted,
    disk_names,
    names_of,
    only_renames,
    plain_name,
)
from surgery.recover.sharded import DTYPES

if TYPE_CHECKING:
    import torch

DRAWN = frozenset({"default", "gaussian"})  # starts of LoRA that do not look at weights
READ = 16 << 20  # bytes at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A model without values, and where they lie.

    Attributes:
        loaded: on the meta device but for the buffers that no file holds.
        homes: the stored tensor of every parameter and persistent buffer, by its plain name.
    """

    loaded: Loaded
    homes: Mapping[str, TensorInfo]

    def fill(self, world: World) -> None:
        """Give the model its values; it is sharded by now.

        Raises:
            CheckpointError: a file became shorter, or holds NaN or infinity.
        """
        import torch

        model = self.loaded.model
        _make_room(model, world.device)
        odd = [0.0] * len(self.homes)
        numbers = {name: number for number, name in enumerate(self.homes)}
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                home = self.homes.get(plain_name(name))
                if home is not None:
                    odd[numbers[plain_name(name)]] += not _read(home, tensor, world)
        found = world.total(*odd)
        for name, count in zip(self.homes, found, strict=True):
            if count:
                fact = f"holds NaN or infinity in {name}"
                raise CheckpointError(
                    self.loaded.path, fact, "see `surgery inspect`, and make it again"
                )


def streams(ask: Ask, world: World) -> bool:
    """Return whether a student may be spread: nothing needs the weights before they are sharded.

    Starts of LoRA that look at weights or activations do, and so does choosing documents.
    """
    settings = ask.settings
    drawn = settings.train != "lora" or settings.lora_init in DRAWN
    return world.size > 1 and drawn and settings.select is None


def load_empty(source: Source, world: World, dtype: Any) -> Spread | None:  # noqa: ANN401
    """Build a model without values; None where its files cannot be read part by part.

    Experts that are fused and whatever else transformers converts are read whole.

    Raises:
        TrainError: a tensor is missing, left over or of another shape.
    """
    loaded = load(source, device=world.device, dtype=dtype, empty=True)
    checkpoint = open_checkpoint(source.path)
    if not only_renames(loaded.model) or not _make_buffers(loaded.model, world.device):
        return None
    homes = _homes(loaded.model, checkpoint)
    plain = all(type(home) is TensorInfo and home.dtype in DTYPES for home in homes.values())
    return Spread(loaded=loaded, homes=homes) if plain else None


def load_shared(source: Source, world: World, dtype: Any) -> Loaded:  # noqa: ANN401
    """Load a model that does not train: sharded where there are several processes.

    Raises:
        TrainError: as `load`.
    """
    spread = load_empty(source, world, dtype) if world.size > 1 else None
    if spread is None:
        return load(source, device=world.device, dtype=dtype)
    model: Any = spread.loaded.model
    model.requires_grad_(requires_grad=False)
    layers = layers_of(model, open_checkpoint(source.path))
    shard(layers, (), world, whole=True, half_precision=False, root=model)
    spread.fill(world)
    return spread.loaded


def layers_of(model: Any, checkpoint: Checkpoint) -> "list[torch.nn.Module]":  # noqa: ANN401
    """Return a model's decoder layers."""
    return list(model.get_submodule(anatomy(checkpoint).stack.prefix).children())


def _homes(model: Any, checkpoint: Checkpoint) -> dict[str, TensorInfo]:  # noqa: ANN401
    names = names_of(model)
    homes = {
        other: checkpoint.tensors[disk[0]]
        for first, disk in disk_names(model, checkpoint).items()
        for other in names[first]
    }
    derived = dict(model.named_non_persistent_buffers())
    files = Adapted(dict(checkpoint.tensors), None)
    for name, buffer in model.named_buffers():
        if name not in derived:
            (stored,) = converted(model, {name: buffer})
            homes[name] = checkpoint.tensors[files.find(stored) or stored]
    return homes


def _make_buffers(model: Any, device: "torch.device") -> bool:  # noqa: ANN401
    """Let the model make the buffers that no file holds; tell whether all of them were made.

    They are made twice, over different numbers: what was not written differs.
    """
    found = [[value.clone() for value in _made(model, device, start)] for start in (0, 1)]
    return all(bool((a == b).all()) for a, b in zip(*found, strict=True))


def _made(
    model: Any,  # noqa: ANN401
    device: "torch.device",
    start: int,
) -> "Iterator[torch.Tensor]":
    import torch
    from transformers import PreTrainedModel

    names = [name.rpartition(".") for name, _ in model.named_non_persistent_buffers()]
    for place, _, leaf in names:
        module = model.get_submodule(place)
        module._buffers[leaf] = torch.full_like(getattr(module, leaf), start, device=device)
    for place in dict.fromkeys(place for place, _, _ in names):
        parts = place.split(".") if place else []
        above = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
        owner = next(m for m in map(model.get_submodule, above) if isinstance(m, PreTrainedModel))
        with torch.no_grad(), torch.random.fork_rng():
            owner._init_weights(model.get_submodule(place))
    for place, _, leaf in names:
        yield getattr(model.get_submodule(place), leaf)


def _make_room(model: "torch.nn.Module", device: "torch.device") -> None:
    """Give every tensor of a model memory on the device; what is shared stays so."""
    import torch

    made: dict[int, torch.Tensor] = {}
    old = []  # so that no id is given twice
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.device == device:
                    continue
                if id(tensor) not in made:
                    old.append(tensor)
                    room = (
                        torch.empty_like(tensor, device=device)
                        if tensor.is_meta
                        else tensor.detach().to(device)
                    )
                    if isinstance(tensor, torch.nn.Parameter):
                        room = torch.nn.Parameter(room, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = room
                table[name] = made[id(tensor)]  # type: ignore[assignment]


def _read(home: TensorInfo, tensor: "torch.Tensor", world: World) -> bool:
    """Read this process's rows of a stored tensor; tell whether they are finite."""
    import torch
    from torch.distributed.tensor import DTensor

    first, part = 0, tensor
    if isinstance(tensor, DTensor):
        part = tensor.to_local()
        first = world.rank * -(-tensor.shape[0] // world.size)  # as torch.chunk has it
    stored = getattr(torch, DTYPES[home.dtype])
    flat = part.detach().view(-1)
    start = first * math.prod(home.shape[1:]) * stored.itemsize
    sound, step = True, READ // stored.itemsize
    with home.file.open("rb", buffering=0) as file:
        file.seek(home.offset + start)
        for at in range(0, flat.numel(), step):
            piece = flat[at : at + step]
            raw = bytearray(len(piece) * stored.itemsize)
            if file.readinto(raw) != len(raw):
                raise CheckpointError(home.file, "became shorter after it was checked")
            piece.copy_(torch.frombuffer(raw, dtype=stored))
            sound = sound and (not piece.is_floating_point() or bool(piece.isfinite().all()))
    return sound
