"""A training run of a few milliseconds that may die anywhere; also a program, see `main`."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # what is imported once here is not imported by every child
import torch.distributed.tensor

from surgery.recover.checkpoints import Checkpoints
from surgery.recover.distributed import World
from surgery.recover.guard import Guard
from surgery.recover.state import restore, training_state

STEPS, EVERY = 17, 3
BAD = {4: math.nan, 10: 1e6, 11: 1e6}  # added to the losses of these steps
CALLS = ("open", "mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")
STATE = {"weights": {"a": torch.arange(6.0).reshape(2, 3)}, "progress": {"x": 1 / 3}}
ALONE = World(0, 1, torch.device("cpu"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(folder: Path, *steps: int, **options: Any) -> Checkpoints:
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        checkpoints.save(step, STATE)
    return checkpoints


def start() -> tuple[torch.nn.Sequential, list[torch.optim.Optimizer]]:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Dropout(0.3), torch.nn.Linear(7, 3))
    matrix = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return model, [torch.optim.Muon(matrix, lr=0.01), torch.optim.AdamW(others, lr=0.05)]


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    """Depends on the step, the weights and all generators."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    noise = np.random.normal() + random.gauss(0, 1)  # noqa: NPY002
    return (model(x) - 0.01 * noise).square().mean() + BAD.get(step, 0.0)


def train(folder: Path, *, steps: int = STEPS, **options: Any) -> list[list[Any]]:
    """Return step, loss and verdict of every step, those before a resume included."""
    with Checkpoints(folder, **options) as checkpoints:
        return _train(checkpoints, steps)


def _train(checkpoints: Checkpoints, steps: int) -> list[list[Any]]:
    model, optimizers = start()
    parameters, guard = dict(model.named_parameters()), Guard(4.0, patience=2, window=8)
    series: list[list[Any]] = []
    found = checkpoints.load_newest()
    if found:
        restore(found[1], parameters, optimizers, ALONE)
        guard.restore(found[1]["guard"])
        series = list(found[1]["progress"]["series"])
    for step in range(len(series), steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        verdict = guard.judge(loss.item(), norm)
        series.append([step, repr(loss.item()), verdict])
        if verdict == "take":
            for optimizer in optimizers:
                optimizer.step()
        elif verdict == "roll back":
            good = checkpoints.load_newest()
            assert good
            restore(good[1], parameters, optimizers, ALONE, chance=False)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            facts = {"progress": {"series": series}, "guard": guard.state()}
            state = training_state(parameters, optimizers, ALONE, **facts)
            checkpoints.save(step + 1, state, tokens=48 * (step + 1))
    return series


def count_calls(number: int | None, *, after: bool) -> list[int]:
    """Count changes of the disk from now on; die by SIGKILL beside the given one."""
    count = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            mine, count[0] = count[0], count[0] + 1
            if mine == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(*args, **more)
            if mine == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    return count


def in_child(act: Callable[[], object]) -> int:
    """Fork, act, and return the child's process id; the caller has not computed anything."""
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
    except BaseException as error:
        sys.stderr.write(f"{error!r}\n")
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write_series(folder: Path, out: Path) -> None:
    out.write_text(json.dumps(train(folder)))


def die_and_resume(root: Path, name: str, number: int, *, after: bool) -> dict[str, Any]:
    def act() -> None:
        count_calls(number, after=after)
        train(root / name)

    died = ended(in_child(act))
    return {"died": died, **resumed(root, name)}


def kill_and_resume(root: Path, name: str, seconds: float) -> dict[str, Any]:
    pid = in_child(lambda: train(root / name))
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return {"died": ended(pid), **resumed(root, name)}


def resumed(root: Path, name: str) -> dict[str, Any]:
    out = root / f"{name}.json"
    code = ended(in_child(lambda: write_series(root / name, out)))
    return {"code": code, "series": json.loads(out.read_text()) if out.exists() else None}


def main(root: Path, points: int) -> None:
    """Write what became of runs that died at `points` points, and of one that did not."""
    torch.set_num_threads(1)

    def dry() -> None:
        count = count_calls(None, after=False)
        began = time.monotonic()
        train(root / "whole")
        (root / "calls").write_text(json.dumps([count[0], time.monotonic() - began]))

    assert ended(in_child(dry)) == 0
    calls, seconds = json.loads((root / "calls").read_text())
    draw = random.Random(11)
    told = {"whole": resumed(root, "whole")}
    for number in sorted(draw.sample(range(calls), points)):
        after = draw.random() < 0.5
        told[f"call {number}"] = die_and_resume(root, f"call{number}", number, after=after)
    for number in range(points // 4):
        told[f"time {number}"] = kill_and_resume(root, f"time{number}", draw.uniform(0, seconds))
    (root / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
