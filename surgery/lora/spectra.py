"""Ranks by energy: a reading before the plan, for how fast each module's singular values fall."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.engine import Engine
from surgery.errors import PlanError
from surgery.lora.decompose import Method, decompose, scratch
from surgery.lora.targets import Target
from surgery.plan import Step, TensorSpec
from surgery.preflight import computing_workers
from surgery.slices import Sources


class Spectra:
    """Takes what the engine writes: float64 numbers by name."""

    def __init__(self) -> None:
        self._found: dict[str, bytearray] = {}
        self._lock = threading.Lock()

    def write(self, name: str, at: int, view: memoryview) -> None:
        """Take a piece."""
        with self._lock:
            held = self._found.setdefault(name, bytearray())
            held[at : at + len(view)] = view

    def finish(self, line: Mapping[str, Any]) -> None:
        """Note nothing."""

    def leave_open(self) -> None:
        """Hold nothing open."""

    def numbers(self, name: str) -> Any:  # noqa: ANN401 - numpy's array
        """Return what was written under a name."""
        import numpy as np

        return np.frombuffer(self._found[name], np.float64)


def energy_ranks(
    targets: Sequence[Target],
    most: Mapping[str, int],
    *,
    energy: float,
    method: Method,
    seed: int,
    sources: Sequence[Checkpoint],
    limits: Mapping[str, Any],
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the smallest rank per module that keeps the energy, and a note where none does.

    Args:
        most: the rank at most, by module.
        limits: workers, memory and progress.

    Raises:
        PlanError: a module does not fit into the memory.
    """
    steps = [_spectrum(target, most[target.module], method, seed) for target in targets]
    spectra = measured(steps, sources, "lora extract", limits)
    ranks, short = {}, []
    for target in targets:
        whole, *squares = spectra.numbers(target.module).tolist()
        ranks[target.module] = _smallest(squares, energy * whole)
        if sum(squares) < energy * whole * (1 - 1e-12):
            short.append(target.module)
    if not short:
        return ranks, ()
    told = f"{len(short)} modules keep less than the energy asked for at the highest rank"
    return ranks, (f"{told}: {short[0]}; a higher --rank allows more",)


def measured(
    steps: Sequence[Step], sources: Sequence[Checkpoint], place: str, limits: Mapping[str, Any]
) -> Spectra:
    """Run steps for the figures they give alone.

    Args:
        place: what to call the asker when a matrix does not fit.
        limits: `memory`, `workers` and `progress`.

    Raises:
        PlanError: a matrix does not fit into the memory.
    """
    need = max(step.whole_bytes for step in steps)
    if need > limits["memory"]:
        fact = f"needs {need / (1 << 20):.0f} MiB for its largest matrix, over the budget"
        raise PlanError(place, fact, f"allow it with --memory {need / (1 << 20) + 1:.0f}M")
    spectra = Spectra()
    with Sources(sources) as opened:
        engine = Engine(steps, opened, spectra, memory=limits["memory"])
        engine.run(limits["workers"] or computing_workers(), limits["progress"])
        opened.check_unchanged()
    return spectra


def _smallest(squares: Sequence[float], wanted: float) -> int:
    kept = 0.0
    for rank, square in enumerate(squares, 1):
        kept += square
        if kept >= wanted * (1 - 1e-12):
            return rank
    return len(squares)


def _spectrum(target: Target, rank: int, method: Method, seed: int) -> Step:
    def fn(base: Any, tuned: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        made = decompose(
            target.blocks(base, tuned),
            target.shape,
            rank=rank,
            method=method,
            seed=f"{seed}\0{target.base.name}",
        )
        yield made.s.new_tensor([made.whole])
        yield made.s.square()

    return Step(
        outputs=((target.module, TensorSpec("F64", (rank + 1,))),),
        inputs=(target.base, target.tuned),
        fn=fn,
        streamed=True,
        scratch=scratch(target.shape, rank, method),
        why="measure",
    )
