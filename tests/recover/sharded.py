"""Run by torchrun: train a student in as many processes as there are, and export it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from healing import IDS, load
from surgery.checkpoint import open_checkpoint
from surgery.recover.distributed import World, add_up_gradients, held_by_all, joined, shard
from surgery.recover.settings import Settings
from surgery.recover.trainable import make_trainable


def main(student: Path, out: Path, mode: str) -> None:
    with joined("cpu") as world:
        train(world, student, out, mode)  # what it holds is let go of before the processes part


def train(world: World, student: Path, out: Path, mode: str) -> None:
    settings = Settings(train=mode, rank=8)
    model, _ = load(student)
    trainable = make_trainable(model, open_checkpoint(student), settings)
    parameters, whole = list(trainable.parameters.values()), mode == "full"
    shard(model.model.layers, parameters, world, whole=whole, half_precision=False)
    held = held_by_all(trainable.parameters.values(), world)
    optimiser = torch.optim.AdamW(trainable.groups(settings), lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        trainable.before_step()
        add_up_gradients(held, world)
        for parameter in held:
            parameter.grad /= world.size
        optimiser.step()
        trainable.after_step()
    trainable.export(out, write=world.is_first)
    world.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
