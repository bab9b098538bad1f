"""Speed and memory of linearized models beside the softmax model of the same shape.

    PYTHONPATH=. python -m benchmarks.linear_speed --work DIR [--device cuda] [--shape tiny|1b|8b]

Weights are random: time and memory do not depend on them. On a CPU one thread runs and seconds are
those that the thread had, so that others on the machine count little; on CUDA they are of the
clock, after everything before has ended. Softmax decodes from a cache of its full length that keys
are written into, torch's attention choosing its kernel. Every figure is kept in DIR; the page is
DIR/linear-speed.md.
"""

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.linear_speed_memory import cache_bytes, roomy, saved_bytes
from benchmarks.linear_speed_page import LENGTHS, SOFTMAX, page
from benchmarks.linear_speed_shapes import REPEATS, SHAPES, Arm, arms, build
from benchmarks.machine import describe
from benchmarks.stack import commit, say
from surgery.linearize.comparing import Pair, pass_through, relative_error
from surgery.linearize.methods import METHODS
from surgery.linearize.objective import keep_own_teacher
from surgery.models.linear_layer import converted

MEMORY = (torch.OutOfMemoryError, MemoryError)
KEPT_AT = (256, 1024, 4096)  # lengths at which what is kept is counted
TRAINED_AT = (512, 1024, 2048)  # lengths at which what training keeps is counted
BEGIN = 256  # tokens before decoding begins, where the state's size does not depend on them


class Bench:
    """One model, and how its time is taken."""

    def __init__(self, arm: Arm, ask: argparse.Namespace) -> None:
        self.arm, self.shape, self.device = arm, SHAPES[ask.shape], ask.device
        self.budget = ask.budget
        self.model = build(arm, self.shape, self.device).eval()

    def ids(self, rows: int, length: int) -> Any:  # noqa: ANN401
        """Return tokens."""
        return torch.randint(self.shape.vocabulary, (rows, length), device=self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Return how long a call takes."""
        if self.device != "cuda":
            began = time.process_time()
            run()
            return time.process_time() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def prefill(self) -> dict[str, float | str]:
        """Return tokens a second by length, until a length takes too long or memory is short."""
        found: dict[str, float | str] = {}
        before = 0.0
        for length in LENGTHS:
            try:
                took = self.reading(self.ids(1, length), warm=not before)
            except MEMORY:
                return found | {str(length): "memory"}
            found[str(length)] = length / took
            growth = max(2.0, took / before) if before else 2.0
            if length < LENGTHS[-1] and took * growth > self.shape.limit:
                return found | {str(2 * length): "time"}
            before = took
        return found

    def reading(self, ids: torch.Tensor, *, warm: bool) -> float:
        """Return seconds, the better of two where there is time for them."""
        if warm:
            self.read(ids)
        took = self.seconds(lambda: self.read(ids))
        again = took < self.shape.limit / 4
        return min(took, self.seconds(lambda: self.read(ids))) if again else took

    def read(self, ids: Any) -> Any:  # noqa: ANN401
        """Return the cache of a text."""
        return self.model(ids, use_cache=True, logits_to_keep=1).past_key_values

    def kept(self) -> dict[str, int]:
        """Return bytes kept of a text by length."""
        return {str(n): cache_bytes(self.read(self.ids(1, n))) for n in KEPT_AT}

    def row_bytes(self) -> int:
        """Return the bytes that a row keeps when decoding ends."""
        if self.arm.method != SOFTMAX:
            return cache_bytes(self.read(self.ids(1, BEGIN)))
        token = cache_bytes(self.read(self.ids(1, BEGIN))) // BEGIN
        return token * self.shape.room

    def decode(self, rows: int) -> float:
        """Return tokens a second, of all rows together."""
        cache = self.begun(rows)
        ids = self.ids(rows, 1)
        self.model(ids, past_key_values=cache)

        def run() -> None:
            for _ in range(self.shape.steps - 1):
                self.model(ids, past_key_values=cache)

        took = self.seconds(run)
        if took < self.shape.limit / 10:
            took = min(took, *(self.seconds(run) for _ in range(REPEATS - 1)))
        return rows * (self.shape.steps - 1) / took

    def begun(self, rows: int) -> Any:  # noqa: ANN401
        """Return a cache with a text in it, the same in every row."""
        if self.arm.method == SOFTMAX:
            return roomy(self.model.config, rows, self.shape, self.device)
        cache = self.read(self.ids(1, BEGIN))
        cache.batch_repeat_interleave(rows)
        return cache

    def largest(self) -> dict[str, float]:
        """Return tokens a second at the largest power of two of rows that fits."""
        room = self.budget * 2**20
        if self.device == "cuda":
            torch.cuda.empty_cache()
            room = int(0.9 * torch.cuda.mem_get_info()[0])
        rows = min(1 << int(math.log2(max(room // self.row_bytes(), 1))), self.shape.rows)
        while rows:
            try:
                return {"rows": rows, "speed": self.decode(rows)}
            except MEMORY:
                rows //= 2
                drop(self.device)
        return {"rows": 0, "speed": 0.0}

    def training(self) -> dict[str, int]:
        """Return bytes that a forward pass keeps for its gradients by length, without the head."""
        found = {}
        for length in TRAINED_AT:
            with torch.enable_grad(), saved_bytes(self.model) as saved:
                self.model.model(self.ids(1, length), use_cache=False)
            found[str(length)] = sum(saved.values())
        return found

    def transfer(self) -> float | None:
        """Return tokens a second of the transfer stage, None where nothing is learnt; comes last.

        A step is a forward pass, gradients of every layer's own error, and AdamW.
        """
        if self.arm.method == SOFTMAX:
            return None
        self.model.requires_grad_(requires_grad=False)
        keep_own_teacher(self.model)
        modules = converted(self.model).values()
        trained = [p.requires_grad_() for m in modules for p in new_parameters(m, self.arm.method)]
        if not trained:
            return None
        optimiser = torch.optim.AdamW(trained)
        inputs = {"input_ids": self.ids(1, self.shape.piece)}

        def step() -> None:
            pass_through(self.model, inputs, each=learn, end=self.shape.layers)
            optimiser.step()
            optimiser.zero_grad()

        with torch.enable_grad():
            step()
            return self.shape.piece / min(self.seconds(step) for _ in range(2))


def learn(_: int, pair: Pair) -> None:
    """Take the gradients of one layer."""
    relative_error(pair).backward()


def new_parameters(module: Any, method: str) -> Iterator[torch.nn.Parameter]:  # noqa: ANN401
    """Yield what the transfer stage trains of a layer."""
    yield from module.mixer.parameters()
    for name in METHODS[method].projections:
        yield from getattr(module, name).parameters()


def drop(device: str) -> None:
    """Give memory back."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(arm: Arm, ask: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of one arm; what does not run says why."""
    try:
        bench = Bench(arm, ask)
        with torch.no_grad():
            return {
                "parameters": sum(p.numel() for p in bench.model.parameters()),
                "prefill": bench.prefill(),
                "one": bench.decode(1),
                "largest": bench.largest(),
                "kept": bench.kept(),
                "training": bench.training(),
                "transfer": bench.transfer(),
            }
    except (ValueError, *MEMORY) as error:
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def main() -> None:
    """Measure every arm in turn, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    parser.add_argument("--only", help="methods, with commas; softmax is always there")
    parser.add_argument("--budget", type=int, default=96, help="MiB of caches on a CPU")
    ask = parser.parse_args()
    if ask.device == "cpu":
        torch.set_num_threads(1)
    ask.work.mkdir(parents=True, exist_ok=True)
    facts = about(ask)
    began = time.perf_counter()
    for arm in arms(ask.device, ask.only):
        facts["arms"][arm.name] = measure(arm, ask)
        drop(ask.device)
        facts["seconds"] = time.perf_counter() - began
        say(f"{facts['seconds']:.0f} s: {arm.name} {json.dumps(facts['arms'][arm.name])}")
        (ask.work / "linear-speed.json").write_text(json.dumps(facts, indent=1) + "\n")
        (ask.work / "linear-speed.md").write_text(page(facts))


def about(ask: argparse.Namespace) -> dict[str, Any]:
    """Return where and what is measured."""
    machine = describe(ask.work)
    if ask.device == "cuda":
        machine["GPU"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "device": ask.device,
        "budget": ask.budget,
        "shape": {"name": ask.shape, **asdict(SHAPES[ask.shape])},
        "machine": machine,
        "versions": versions,
        "arms": {},
    }


if __name__ == "__main__":
    main()
