"""The pass that reads both models and matches all groups, a few at a time."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.alignment.gains import Matched, gains_bytes, match
from surgery.alignment.mixtures import Arranged, Mixture, arrange, arranged_tensors
from surgery.alignment.moved import digest, reordered
from surgery.alignment.slots import Group, Slot
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.compute import stored_reader, use_one_thread
from surgery.errors import Interrupted, PlanError
from surgery.slices import Sources

if TYPE_CHECKING:
    import numpy as np

    Order = np.ndarray[Any, np.dtype[np.int64]]

Progress = Callable[[int, int], None]
MIXTURE = 256 << 20  # bytes that matching a mixture takes, whatever its size


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is to be matched; `units` tells whether hidden units inside experts are too."""

    groups: tuple[Group, ...]
    mixtures: tuple[Mixture, ...]
    units: bool

    @property
    def nbytes(self) -> int:
        """Bytes that are compared, where experts are compared once."""
        dense = sum(group.nbytes for group in self.groups)
        return dense + sum(mixture.nbytes for mixture in self.mixtures)

    def memory(self) -> tuple[str, int]:
        """Return what takes the most memory, and how much."""
        needs = [(group.name, gains_bytes(group)) for group in self.groups]
        needs += [(mixture.block.prefix, MIXTURE) for mixture in self.mixtures]
        return max(needs, key=lambda need: need[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was matched with what."""

    groups: tuple[tuple[Group, Matched], ...]
    mixtures: tuple[tuple[Mixture, Arranged], ...]

    def tensors(self, model: Checkpoint) -> dict[str, TensorInfo]:
        """Return the model's tensors in their order, moved ones as views."""
        made = self._dense()
        for mixture, found in self.mixtures:
            made |= arranged_tensors(mixture, found)
        return {name: made.get(name, tensor) for name, tensor in model.tensors.items()}

    def _dense(self) -> dict[str, TensorInfo]:
        import numpy as np

        tensors: dict[str, TensorInfo] = {}
        axes: dict[str, dict[str, Order]] = {}
        for group, found in self.groups:
            slots = [(slot, found.fine) for slot in group.fine]
            slots += [(slot, found.coarse) for slot in group.coarse]
            for slot, order in slots:
                assert isinstance(slot, Slot)  # noqa: S101 - only mixtures have others
                name, axis = slot.tensor.name, ("rows", "columns")[slot.axis]
                tensors[name] = slot.tensor
                whole = np.arange(slot.tensor.shape[slot.axis])
                slot.move(axes.setdefault(name, {}).setdefault(axis, whole), order)
        return {name: reordered(tensor, **axes[name]) for name, tensor in tensors.items()}

    def orders(self) -> "Iterator[Order]":
        """Every permutation, in the order of the model."""
        for _, found in self.groups:
            yield found.coarse
            yield found.fine
        for _, arranged in self.mixtures:
            yield arranged.order
            yield from (order for order in arranged.units if order is not None)

    def facts(self) -> dict[str, Any]:
        """Return what a record tells: a digest of the permutations, and what they gained."""
        told = {group.name: _told(found.fine, found) for group, found in self.groups}
        for mixture, arranged in self.mixtures:
            inside = [order for order in arranged.units if order is not None]
            units = {"units_moved": sum(_moved(order) for order in inside)}
            told[f"{mixture.block.prefix}.experts"] = _told(arranged.order, arranged) | units
        return {"permutations": digest(self.orders()), "groups": told}


def _told(order: "Order", found: Matched | Arranged) -> dict[str, Any]:
    return {
        "units": len(order),
        "moved": _moved(order),
        "cosine_before": round(found.before, 6),
        "cosine_after": round(found.after, 6),
    }


def _moved(order: "Order") -> int:
    import numpy as np

    return int((order != np.arange(len(order))).sum())


def carry_out(
    work: Work, sources: Sequence[Checkpoint], *, memory: int, progress: Progress | None
) -> Found:
    """Match everything, reading both models; the result does not depend on the threads.

    Raises:
        PlanError: one group takes more than the memory allowed.
        StepError: reading failed, or a file changed meanwhile.
    """
    largest, need = work.memory()
    if need > memory:
        fact = f"comparing its units takes {need >> 20} MiB, over the budget"
        raise PlanError(largest, fact, f"allow it with --memory {(need >> 20) + 1}M")
    use_one_thread()
    workers = max(1, min(os.cpu_count() or 1, memory // need))
    told = _Told(work.nbytes, progress)
    with Sources(sources) as opened:
        read = stored_reader(opened)
        pool = ThreadPoolExecutor(workers)
        try:
            jobs = [pool.submit(match, group, read, told.add) for group in work.groups]
            more = [
                pool.submit(arrange, mixture, read, told.add, units=work.units)
                for mixture in work.mixtures
            ]
            groups = [job.result() for job in jobs]
            mixtures = [job.result() for job in more]
        except BaseException:
            told.stop()
            opened.leave_open()  # a thread may be amid a large matching, and read again
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        opened.check_unchanged()
    return Found(
        groups=tuple(zip(work.groups, groups, strict=True)),
        mixtures=tuple(zip(work.mixtures, mixtures, strict=True)),
    )


class _Told:
    """Counts what was compared, and ends all comparing when it is to stop."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes that were compared."""
        if self._stopped.is_set():
            raise Interrupted("align", "was interrupted while it compared; nothing was written")
        with self._lock:
            self._done = min(self._done + count, self._total)
            if self._progress:
                self._progress(self._done, self._total)

    def stop(self) -> None:
        """Let every thread end at its next count."""
        self._stopped.set()
