"""Run as a program, alone or by torchrun: one recovery, which may end itself anywhere."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recovering import ask_of
from surgery.recover import loop
from surgery.recover.run import recover
from surgery.recover.sources import Source

CALLS = ("fsync", "rename", "replace", "rmdir", "mkdir", "unlink")


def die_at(number: int) -> None:
    """Kill this process before the given change of the disk; write how many there were."""
    count = [0]

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **more)

        return call

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def at_step(number: int, act: Callable[[], None]) -> None:
    """Act in the middle of a step."""
    real = loop.Loop._step

    def step(self: loop.Loop, index: int) -> dict[str, Any]:
        if index == number:
            act()
        return real(self, index)

    loop.Loop._step = step  # type: ignore[method-assign]


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def main(student: str, out: Path, options: dict[str, Any]) -> int:
    if (call := options.pop("die_at_call", None)) is not None:
        die_at(call)
    if (step := options.pop("die_at_step", None)) is not None:
        at_step(step, send(signal.SIGKILL))
    if (step := options.pop("ask_at_step", None)) is not None:
        at_step(step, send(signal.SIGTERM))
    if "data" in options:
        options["data"] = tuple(Source(path) for path in options["data"])
    return 75 if recover(ask_of(Path(student), out, **options)).out is None else 0


if __name__ == "__main__":
    code = main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
    os._exit(code)  # torch with gloo aborts at the interpreter's end now and then
