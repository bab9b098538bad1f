"""One process or many: models sharded by FSDP2, layer by layer under one root.

Where only a few parameters train (LoRA, norms), those are held by every process beside the sharded
frozen ones, and get their gradients summed here.
"""

import gc
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import TrainError

if TYPE_CHECKING:
    import torch

PATIENCE = 3600  # seconds that a process waits for the others: the first one writes alone


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run.

    Attributes:
        rank: this one's number; the first writes.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: "torch.device"

    @property
    def is_first(self) -> bool:
        """Whether this process tells and writes."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """Return the sums of numbers over all processes, in float64."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def agree(self, *, wish: bool) -> bool:
        """Return whether any process wishes it."""
        return self.total(float(wish))[0] > 0

    def wait(self) -> None:
        """Wait for all."""
        self.total(0.0)


@contextmanager
def joined(device: str) -> "Iterator[World]":
    """Join the processes that torchrun has started, or be the only one.

    Raises:
        TrainError: the device is not there, or the others cannot be reached.
    """
    import torch

    from surgery.evaluate.load import find_device

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, find_device(device))
        return
    from datetime import timedelta

    from torch import distributed

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    place = find_device(f"{device}:{local}" if device == "cuda" else device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "nccl" if place.type == "cuda" else "gloo"
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=PATIENCE))
    except (RuntimeError, ValueError) as error:
        fact = f"cannot reach the other processes ({str(error)[:200]})"
        raise TrainError("torchrun", fact, "see MASTER_ADDR and MASTER_PORT") from error
    try:
        yield World(rank, size, place)
    finally:
        gc.collect()  # gloo aborts if a sharded model outlives its processes' group
        distributed.destroy_process_group()


def shard(
    layers: "Sequence[torch.nn.Module]",
    trained: "Iterable[torch.nn.Parameter]",
    world: World,
    *,
    whole: bool,
    half_precision: bool,
    root: "torch.nn.Module | None" = None,
) -> None:
    """Shard the decoder layers over the processes, and with `root` all that is around them.

    Layers that share weights are gathered together: what is in two groups would be summed twice.

    Args:
        whole: all parameters that train are sharded with the others; else each process holds them.
        half_precision: gather and compute in bfloat16; gradients are summed in float32.
        root: the model that is called; its embedding and head stay gathered from its forward pass
            until the gradients are there, or until `put_away`.

    Raises:
        TrainError: layers that share parameters, without a root to hold them.
    """
    if world.size == 1:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    alone = _unshared(layers)
    if root is None and len(alone) < len(layers):
        fact = "has layers that share weights, which several processes cannot shard"
        raise TrainError("the student", fact, "run it in one process")
    apart = set() if whole else set(trained)
    wide = torch.float32 if half_precision else None
    policy = MixedPrecisionPolicy(torch.bfloat16 if half_precision else None, wide)
    mesh = init_device_mesh(world.device.type, (world.size,))
    together = [layer for layer in layers if layer not in alone]
    # Gradients of the root are summed because backward passes get to groups inside of it, so that
    # layers that share weights are a group of their own.
    groups: list[Any] = [*alone, *([together] if together else []), *([root] if root else [])]
    for group in groups:
        modules = group if isinstance(group, list) else [group]
        # What has no rows cannot be sharded.
        own = {p for m in modules for p in m.parameters() if p in apart or not p.dim()}
        fully_shard(
            group,
            mesh=mesh,
            mp_policy=policy,
            ignored_params=own,
            # Without a root a layer is one itself, and would stay whole after its forward pass.
            reshard_after_forward=None if group is root else True,
        )


def _unshared(layers: "Sequence[torch.nn.Module]") -> "list[torch.nn.Module]":
    """Return the layers none of whose parameters is another one's too."""
    users = Counter(id(p) for layer in layers for p in set(layer.parameters()))
    return [layer for layer in layers if all(users[id(p)] == 1 for p in layer.parameters())]


def held_by_all(
    parameters: "Iterable[torch.nn.Parameter]", world: World
) -> "list[torch.nn.Parameter]":
    """Return the parameters that every process holds whole; none where there is one process."""
    from torch.distributed.tensor import DTensor

    return [p for p in parameters if world.size > 1 and not isinstance(p, DTensor)]


def put_away(model: "torch.nn.Module") -> None:
    """Leave a sharded model's embedding and head to the shards, after a pass without gradients."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def add_up_gradients(held: "Sequence[torch.nn.Parameter]", world: World) -> None:
    """Sum the gradients of what every process holds."""
    if world.size == 1 or not held:
        return
    from torch import distributed

    for parameter in held:
        if parameter.grad is None:
            import torch

            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)


def gradient_norm(parameters: "Iterable[torch.nn.Parameter]", world: World) -> float:
    """Return the length of all gradients, sharded ones counted once."""
    import torch
    from torch.distributed.tensor import DTensor

    alone: list[torch.Tensor] = []
    spread: list[torch.Tensor] = []
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is None:
            continue
        sharded = isinstance(gradient, DTensor)
        local = gradient.to_local() if sharded else gradient
        norm = torch.linalg.vector_norm(local, dtype=torch.float32)
        (spread if sharded else alone).append(norm)
    return float((world.total(_squared(spread))[0] + _squared(alone)) ** 0.5)


def _squared(norms: "list[torch.Tensor]") -> float:
    """Return the sum of squares, waiting for the device once."""
    import torch

    return float(torch.stack(norms).double().square().sum()) if norms else 0.0
