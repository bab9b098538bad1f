"""A run of one or two processes on the CPU; as a program, one of two."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from surgery.errors import SurgeryError
from surgery.recover.checkpoints import Checkpoints
from surgery.recover.distributed import World, add_up_gradients
from surgery.recover.state import restore, training_state

ROWS = 8
KINDS = ("adamw", "muon")


class Model(torch.nn.Module):
    """Shards of unequal size, a frozen layer, and a scale that all hold."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = torch.nn.Linear(6, 7)
        self.frozen = torch.nn.Linear(7, 7).requires_grad_(requires_grad=False)
        self.last = torch.nn.Linear(7, 3, bias=False)
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.frozen(self.first(x).tanh())
        found: torch.Tensor = self.last(hidden) * self.scale
        return found


class Run:
    """Model and optimisers in one of `world.size` processes."""

    def __init__(self, world: World, kind: str) -> None:
        self.world, self.model = world, Model()
        if world.size > 1:
            for layer in (self.model.first, self.model.frozen, self.model.last):
                fully_shard(layer)
        chosen = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = chosen
        matrices = [p for p in chosen.values() if p.dim() == 2 and kind == "muon"]
        others = [p for p in chosen.values() if p.dim() != 2 or kind != "muon"]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=0.01)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=0.02))

    def train(self, start: int, stop: int) -> list[float]:
        return [self.step(step) for step in range(start, stop)]

    def step(self, step: int) -> float:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step))
        share = x.chunk(self.world.size)[self.world.rank]
        loss = self.model(share).square().mean()
        loss.backward()
        add_up_gradients([self.model.scale], self.world)
        assert self.model.scale.grad is not None
        self.model.scale.grad /= self.world.size
        for optimizer in self.optimizers:
            optimizer.step()
        return self.world.total(loss.item())[0] / self.world.size

    def save(self, folder: Path, step: int, **options: Any) -> None:
        with Checkpoints(folder, world=self.world, **options) as checkpoints:
            checkpoints.save(step, training_state(self.parameters, self.optimizers, self.world))

    def load(self, folder: Path, **options: Any) -> int:
        with Checkpoints(folder, world=self.world, **options) as checkpoints:
            found = checkpoints.load_newest()
        assert found
        restore(found[1], self.parameters, self.optimizers, self.world)
        return found[0]


def refusal(act: Callable[[], object]) -> list[str]:
    """Return kind and sentence of the error that an act must end with."""
    try:
        act()
    except SurgeryError as error:
        return [type(error).__name__, str(error)]
    return ["none"]


def refuse(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def take_part(root: Path, world: World, kind: str) -> dict[str, Any]:
    told: dict[str, Any] = {}
    run = Run(world, kind)
    run.train(0, 3)
    run.save(root / "two", 3)
    told["two"] = run.train(3, 6)
    told["random"] = torch.rand(1).item()

    again = Run(world, kind)
    again.load(root / "two")
    told["two again"] = again.train(3, 6)
    told["random again"] = torch.rand(1).item()

    other = Run(world, kind)
    told["step"] = other.load(root / "one")
    other.save(root / "one_again", 3)
    told["one"] = other.train(3, 6)
    told["random other"] = torch.rand(1).item()

    real = os.write
    if world.is_first:
        os.write = refuse
    told["full"] = refusal(lambda: other.save(root / "two", 6))
    os.write = real
    told["after"] = Run(world, kind).load(root / "two")
    told["locked"] = refusal(lambda: other.load(root / "locked"))
    told["settings"] = refusal(lambda: other.load(root / "one", settings={"lr": 1}))
    return told


def main(root: Path, rank: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{root}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    world = World(rank, 2, torch.device("cpu"))
    told = {kind: take_part(root / kind, world, kind) for kind in KINDS}
    (root / f"told{rank}.json").write_text(json.dumps(told))
    distributed.destroy_process_group()
    # torch 2.13 with FSDP2 on gloo aborts at the interpreter's end once in some twenty runs
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
