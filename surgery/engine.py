"""The only scheduler: threads that read, compute and write items of independent steps."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from surgery.checkpoint import BITS
from surgery.digest import LEAF, Digests, combine, leaf_digests
from surgery.plan import Step
from surgery.slices import Item, Scratch, Sources, cut, pieces

Progress = Callable[[int, int], None]  # bytes done, bytes in all
TICK = 0.1  # seconds between two looks at the workers
GRACE = 1.0  # seconds that workers get to end their item after an interrupt
AHEAD = 16  # items to read ahead


class Target(Protocol):
    """Where results go: an output on disk, or nowhere when only digests are wanted."""

    def write(self, name: str, at: int, view: memoryview) -> None:
        """Take a piece of the tensor."""

    def finish(self, line: Mapping[str, Any]) -> None:
        """Note a finished step."""

    def leave_open(self) -> None:
        """Keep descriptors open from now on: a thread that hangs may still use them."""


class DigestOnly:
    """A target that keeps nothing, to compare a run with its record."""

    def write(self, name: str, at: int, view: memoryview) -> None:
        """Drop the piece."""

    def finish(self, line: Mapping[str, Any]) -> None:
        """Note nothing."""

    def leave_open(self) -> None:
        """Hold nothing open."""


@dataclass(slots=True)
class _Pending:
    """What is not finished of one step, and the leaf digests so far, by tensor and start."""

    items: int
    leaves: dict[str, dict[int, list[bytes]]] = field(default_factory=lambda: defaultdict(dict))

    def digest(self, key: str) -> str:
        found = self.leaves.get(key, {})
        return combine(leaf for start in sorted(found) for leaf in found[start])


class Engine:
    """Runs steps on threads; the bytes it writes do not depend on their number or order."""

    def __init__(
        self, steps: Sequence[Step], sources: Sources, target: Target, *, memory: int
    ) -> None:
        self.steps = steps
        self.sources = sources
        self.target = target
        self.digests = Digests()
        self.done_bytes = 0
        self.total_bytes = sum(step.bytes_out for step in steps)
        self._items = deque(item for n, step in enumerate(steps) for item in cut(n, step))
        self._pending = {n: _Pending(0) for n in range(len(steps))}
        for item in self._items:
            self._pending[item.step].items += 1
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._budget = _Budget(memory)
        self._failure: BaseException | None = None

    def run(self, workers: int, progress: Progress | None = None) -> Digests:
        """Work until every step is finished, and return the digests.

        Raises:
            KeyboardInterrupt: passed on after the workers were told to stop.
            StepError: a read, write or computation failed.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(TICK)
                    self._tell(progress)
            self._tell(progress)
        except BaseException:
            self._stop.set()
            self._abandon([thread for thread in threads if thread.ident is not None])
            raise
        if self._failure:
            raise self._failure
        return self.digests

    def _abandon(self, threads: Sequence[threading.Thread]) -> None:
        """Give workers a moment to end; what those still need that hang in a call stays open.

        A closed descriptor's number goes to the next file that anybody opens.
        """
        for thread in threads:
            thread.join(GRACE / len(threads))
        if any(thread.is_alive() for thread in threads):
            self.sources.leave_open()
            self.target.leave_open()

    def _tell(self, progress: Progress | None) -> None:
        if progress:
            progress(self.done_bytes, self.total_bytes)

    def _work(self) -> None:
        scratch = Scratch()
        while not self._stop.is_set() and (item := self._next()):
            try:
                self._do(item, scratch)
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                self._stop.set()

    def _next(self) -> Item | None:
        with self._lock:
            if not self._items:
                return None
            item = self._items.popleft()
            ahead = self._items[AHEAD] if len(self._items) > AHEAD else None
        if ahead and self.steps[ahead.step].fn is None:
            for tensor in self.steps[ahead.step].inputs:
                self.sources.prefetch(tensor, ahead.start, ahead.count)
        return item

    def _do(self, item: Item, scratch: Scratch) -> None:
        step = self.steps[item.step]
        if step.fn is None:
            leaves = self._copy(step, item, scratch) if step.inputs else _zeros(step)
        elif step.elementwise:
            leaves = self._slice(step, item, scratch)
        else:
            with self._budget.hold(step.whole_bytes):
                leaves = self._whole(step)
        self._account(item, step, leaves)

    def _copy(self, step: Step, item: Item, scratch: Scratch) -> dict[str, list[bytes]]:
        view = scratch.take(0, item.count)
        self.sources.read(step.inputs[0], item.start, view)
        leaves = leaf_digests(view)
        for name, _ in step.outputs:
            self.target.write(name, item.start, view)
        return {_input_key(step, 0): leaves, **{name: leaves for name, _ in step.outputs}}

    def _slice(self, step: Step, item: Item, scratch: Scratch) -> dict[str, list[bytes]]:
        from surgery.compute import compute_slice, use_one_thread

        use_one_thread()
        inputs, outputs, leaves = [], [], {}
        for slot, tensor in enumerate(step.inputs):
            width = BITS[tensor.dtype] // 8
            view = scratch.take(slot, item.count * width)
            self.sources.read(tensor, item.start * width, view)
            leaves[_input_key(step, slot)] = leaf_digests(view)
            inputs.append((view, tensor.dtype))
        for slot, (_, spec) in enumerate(step.outputs, start=len(inputs)):
            size = item.count * BITS[spec.dtype] // 8
            outputs.append((scratch.take(slot, size), spec.dtype))
        assert step.fn is not None  # noqa: S101 - told by the caller
        compute_slice(step.fn, inputs, outputs, step.outputs[0][0])
        for (name, spec), (view, _) in zip(step.outputs, outputs, strict=True):
            leaves[name] = leaf_digests(view)
            self.target.write(name, item.start * BITS[spec.dtype] // 8, view)
        return leaves

    def _whole(self, step: Step) -> dict[str, list[bytes]]:
        from surgery.compute import compute_whole

        scratch = Scratch()
        inputs, outputs, leaves = [], [], {}
        for slot, tensor in enumerate(step.inputs):
            view = scratch.take(slot, tensor.nbytes)
            self.sources.read(tensor, 0, view)
            leaves[_input_key(step, slot)] = leaf_digests(view)
            inputs.append((view, tensor.dtype, tensor.shape))
        for slot, (_, spec) in enumerate(step.outputs, start=len(inputs)):
            outputs.append((scratch.take(slot, spec.nbytes), spec))
        assert step.fn is not None  # noqa: S101 - told by the caller
        compute_whole(step.fn, inputs, outputs, step.outputs[0][0])
        for (name, _), (view, spec) in zip(step.outputs, outputs, strict=True):
            leaves[name] = leaf_digests(view)
            for start, count in pieces(spec.nbytes):
                self.target.write(name, start, view[start : start + count])
        return leaves

    def _account(self, item: Item, step: Step, leaves: Mapping[str, list[bytes]]) -> None:
        pending = self._pending[item.step]
        with self._lock:
            for key, found in leaves.items():
                pending.leaves[key][item.start] = found
            pending.items -= 1
            self.done_bytes += item.weight
            if pending.items:
                return
            line = {
                "outputs": {name: pending.digest(name) for name, _ in step.outputs},
                "inputs": {k: pending.digest(k) for k in _input_keys(step)},
            }
            del self._pending[item.step]
            self.digests.add(line)
        self.target.finish(line)


def _input_keys(step: Step) -> list[str]:
    return [_input_key(step, slot) for slot in range(len(step.inputs))]


def _input_key(step: Step, slot: int) -> str:
    """Name an input so that it cannot be taken for an output: a path ends in a colon."""
    return f"{step.inputs[slot].file}:{step.inputs[slot].name}"


def _zeros(step: Step) -> dict[str, list[bytes]]:
    """Hash what is not written: a new shard's blocks read as zeros."""
    found = {}
    for name, spec in step.outputs:
        whole, rest = divmod(spec.nbytes, LEAF)
        full = leaf_digests(memoryview(bytes(LEAF))) if whole else []
        found[name] = full * whole + leaf_digests(memoryview(bytes(rest)))
    return found


class _Budget:
    """Bytes that whole-tensor steps may hold at once; others wait."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, need: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= need)
            self._free -= need
        try:
            yield
        finally:
            with self._changed:
                self._free += need
                self._changed.notify_all()
