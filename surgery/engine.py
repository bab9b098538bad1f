"""The only scheduler: threads that read, compute and write items of independent steps."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

from surgery.checkpoint import BITS, TensorInfo, View
from surgery.digest import LEAF, Digests, Leaves, checksums, combine, leaf_digests
from surgery.plan import Pass, Step, Tell
from surgery.slices import Item, Scratch, Sources, cut, grid, last_items, pieces

Progress = Callable[[int, int], None]  # bytes done, bytes in all
TICK = 0.1  # seconds between two looks at the workers
GRACE = 1.0  # seconds that workers get to end their item after an interrupt
AHEAD = 16  # items to read ahead
EARLY = 256 << 20  # bytes to ask for before the first item


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
    """Where one step stands.

    Attributes:
        items: unfinished items of what is being done.
        leaves: digests so far, by tensor and start.
        passes, request: the running generator, and what it asked for last.
        found: what the parts of the request gave, by start, with how many elements they have.
        folded, reached: what the request folds into one, and of how many elements.
        told: figures for the record.
        last: the function of the last reading.
        parked: waits for the other steps of its group.
    """

    items: int
    leaves: dict[str, dict[int, list[bytes]]] = field(default_factory=lambda: defaultdict(dict))
    passes: Generator[Pass | Tell, Any, Callable[..., Any]] | None = None
    request: Pass | None = None
    found: dict[int, tuple[int, list[Any]]] = field(default_factory=dict)
    folded: list[Any] = field(default_factory=list)
    reached: int = 0
    told: dict[str, float] = field(default_factory=dict)
    last: Callable[..., Any] | None = None
    parked: bool = False

    def digest(self, key: str) -> str:
        found = self.leaves.get(key, {})
        return combine(leaf for start in sorted(found) for leaf in found[start])

    def add_found(self, item: Item, found: list[Any]) -> None:
        """Keep what an item found; fold what follows on what is folded already."""
        self.found[item.start] = (item.count, found)
        fold = self.request.fold if self.request else None
        while fold and self.reached in self.found:
            count, parts = self.found.pop(self.reached)
            self.reached += count
            for part in parts:
                self.folded = [fold(self.folded[0], part)] if self.folded else [part]

    def take_found(self) -> list[Any]:
        found = [one for start in sorted(self.found) for one in self.found[start][1]]
        found = self.folded + found
        self.found, self.folded, self.reached = {}, [], 0
        return found

    def ask_next(self, answer: Any, step: Step) -> Pass:  # noqa: ANN401 - what the pass found
        """Give the generator its answer, and take what it tells and what it asks for next."""
        assert self.passes is not None  # noqa: S101 - told by the caller
        asked = self.passes.send(answer)
        while isinstance(asked, Tell):
            assert asked.figures.keys() <= set(step.tells), "untold figures"  # noqa: S101
            self.told.update(asked.figures)
            asked = self.passes.send(None)
        self.request = asked
        return asked


class Engine:
    """Runs steps on threads; the bytes it writes do not depend on their number or order."""

    def __init__(
        self,
        steps: Sequence[Step],
        sources: Sources,
        target: Target,
        *,
        memory: int,
        finished: Collection[int] = (),
    ) -> None:
        """Take the steps of a plan; those `finished` are only asked what their groups need."""
        self.steps = steps
        self.sources = sources
        self.target = target
        self.digests = Digests()
        self.done_bytes = 0
        self._finished = frozenset(finished)
        groups = {g for n, step in enumerate(steps) if n not in self._finished for g in step.groups}
        todo = [
            n
            for n, step in enumerate(steps)
            if n not in self._finished or groups.intersection(step.groups)
        ]
        self.total_bytes = sum(
            steps[n].bytes_out * (len(steps[n].groups) + (n not in self._finished)) for n in todo
        )
        self._items = deque(item for n in todo for item in cut(n, steps[n]))
        self._pending = {n: _Pending(0) for n in todo}
        for item in self._items:
            self._pending[item.step].items += 1
        self._groups = {g: [n for n in todo if g in steps[n].groups] for g in groups}
        self._copied = {_key(t) for step in steps if step.is_copy for t in step.inputs}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)
        self._busy = 0
        self._budget = _Budget(memory)
        self._failure: BaseException | None = None

    def run(self, workers: int, progress: Progress | None = None) -> Digests:
        """Work until every step is finished, and return the digests.

        Raises:
            KeyboardInterrupt: passed on after the workers were told to stop.
            StepError: a read, write or computation failed.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        self._read_early()
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
        assert not self._pending, "a step waits for a group that never met"  # noqa: S101
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
        while item := self._next():
            try:
                with _unwarned(self.steps[item.step]):
                    self._do(item, scratch)
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                self._stop.set()
            with self._more:
                self._busy -= 1
                self._more.notify_all()

    def _next(self) -> Item | None:
        with self._more:
            while not self._items and self._busy and not self._stop.is_set():
                self._more.wait(TICK)  # what others do may give more
            if not self._items or self._stop.is_set():
                return None
            item = self._items.popleft()
            self._busy += 1
            ahead = self._items[AHEAD] if len(self._items) > AHEAD else None
        if ahead:
            self._prefetch(ahead)
        return item

    def _read_early(self) -> None:
        """Let the disk read while the first worker loads what computes, which takes a second."""
        asked = 0
        for item in self._items:
            if asked > EARLY or self.steps[item.step].is_copy:
                return
            self._prefetch(item)
            asked += item.weight or self.steps[item.step].bytes_in

    def _prefetch(self, item: Item) -> None:
        """Ask for what an item will read, where that is known."""
        for tensor in self.steps[item.step].inputs:
            if item.phase == "copy":
                self.sources.prefetch(tensor, item.start, item.count)
            elif item.phase in {"map", "pass"} and not isinstance(tensor, View):
                width = BITS[tensor.dtype] // 8
                self.sources.prefetch(tensor, item.start * width, item.count * width)
            elif item.phase == "open" and not isinstance(tensor, View):
                self.sources.prefetch(tensor, 0, tensor.nbytes)

    def _do(self, item: Item, scratch: Scratch) -> None:
        step = self.steps[item.step]
        leaves: Mapping[str, list[bytes]] = {}
        if item.phase == "copy":
            leaves = self._copy(step, item, scratch)
        elif item.phase == "zeros":
            leaves = _zeros(step)
        elif item.phase == "digest":
            leaves = self._digest(step.stored[item.tensor], item, scratch)
        elif item.phase == "map":
            leaves = self._map(step, item, scratch)
        elif item.phase == "whole":
            with self._budget.hold(step.whole_bytes):
                leaves = self._stream(item, step) if step.streamed else self._whole(step)
        elif item.phase == "open":
            assert step.fn is not None  # noqa: S101 - a step of passes has one
            self._pending[item.step].passes = step.fn()
        else:
            self._ask(step, item, scratch)
        self._account(item, step, leaves)

    def _copy(self, step: Step, item: Item, scratch: Scratch) -> dict[str, list[bytes]]:
        view = scratch.take(0, item.count)
        self.sources.read(step.inputs[0], item.start, view)
        leaves = leaf_digests(view)
        for name, _ in step.outputs:
            self.target.write(name, item.start, view)
        return {_key(step.inputs[0]): leaves, **{name: leaves for name, _ in step.outputs}}

    def _digest(self, tensor: TensorInfo, item: Item, scratch: Scratch) -> dict[str, list[bytes]]:
        view = scratch.take(0, item.count)
        self.sources.read(tensor, item.start, view)
        return {_key(tensor): checksums(view)}

    def _ask(self, step: Step, item: Item, scratch: Scratch) -> None:
        from surgery.compute import Reading, ask, use_one_thread

        use_one_thread()
        pending = self._pending[item.step]
        assert pending.request is not None  # noqa: S101 - what the item was made for
        reading = Reading(step, grid(step), self.sources, scratch, identify=False)
        sampled = item.phase == "sample"
        parts = reading.sample() if sampled else reading.parts(item.start, item.count)
        found = ask(pending.request, parts)
        with self._lock:
            pending.add_found(item, found)

    def _map(self, step: Step, item: Item, scratch: Scratch) -> dict[str, list[bytes]]:
        places = grid(step)
        widths = [BITS[spec.dtype] // 8 for _, spec in step.outputs]
        backend = _backend(step)
        reading = backend.Reading(step, places, self.sources, scratch)
        room = min(places.chunk, item.count)
        buffers = [
            scratch.take(slot, room * width)
            for slot, width in enumerate(widths, start=len(step.inputs))
        ]
        hashed = [Leaves(leaf_digests) for _ in widths]
        fn = self._pending[item.step].last or _flat(step)
        parts = reading.parts(item.start, item.count)
        for start, count in backend.write_parts(fn, parts, step.outputs, buffers):
            for (name, _), view, width, leaves in zip(
                step.outputs, buffers, widths, hashed, strict=True
            ):
                filled = view[: count * width]
                leaves.feed(filled)
                self.target.write(name, start * width, filled)
        found = {_key(step.inputs[slot]): leaves.end() for slot, leaves in reading.leaves.items()}
        outputs = zip(step.outputs, hashed, strict=True)
        return {**found, **{name: leaves.end() for (name, _), leaves in outputs}}

    def _whole(self, step: Step) -> dict[str, list[bytes]]:
        from surgery.compute import compute_whole

        plain = [n for n, tensor in enumerate(step.inputs) if not isinstance(tensor, View)]
        hashed = {slot: Leaves(checksums) for slot in plain}
        results = compute_whole(step, self.sources, hashed)
        leaves = {_key(step.inputs[slot]): found.end() for slot, found in hashed.items()}
        for view, name in results:
            leaves[name] = leaf_digests(view)
            for start, count in pieces(len(view)):
                self.target.write(name, start, view[start : start + count])
        return leaves

    def _stream(self, item: Item, step: Step) -> dict[str, list[bytes]]:
        from surgery.stored import stream

        plain = [n for n, tensor in enumerate(step.inputs) if not isinstance(tensor, View)]
        hashed = {slot: Leaves(checksums) for slot in plain}
        written = {name: Leaves(leaf_digests) for name, _ in step.outputs}
        at = dict.fromkeys(written, 0)
        told: dict[str, float] = {}
        for name, view in stream(step, self.sources, hashed, told):
            self.target.write(name, at[name], view)
            written[name].feed(view)
            at[name] += len(view)
        assert told.keys() <= set(step.tells), "untold figures"  # noqa: S101
        self._pending[item.step].told.update(told)
        found = {_key(step.inputs[slot]): each.end() for slot, each in hashed.items()}
        return {**found, **{name: each.end() for name, each in written.items()}}

    def _account(self, item: Item, step: Step, leaves: Mapping[str, list[bytes]]) -> None:
        pending = self._pending[item.step]
        with self._lock:
            for key, found in leaves.items():
                pending.leaves[key][item.start] = found
            pending.items -= 1
            if item.phase not in {"pass", "sample"}:
                self.done_bytes += item.weight
            if pending.items:
                return
        if pending.passes is None:
            self._finish(item.step, step)
        elif item.phase == "open":
            self._advance(item.step, None)
        elif pending.request and pending.request.group:
            self._park(item.step, pending.request)
        else:
            self._advance(item.step, pending.take_found())

    def _finish(self, number: int, step: Step) -> None:
        with self._lock:
            pending = self._pending.pop(number)
            line: dict[str, Any] = {
                "outputs": {name: pending.digest(name) for name, _ in step.outputs},
                "inputs": {k: pending.digest(k) for k in self._identified(step)},
            }
            if pending.told:
                line["told"] = {step.outputs[0][0]: pending.told}
            self.digests.add(line)
        self.target.finish(line)

    def _identified(self, step: Step) -> list[str]:
        """Name the inputs that this step identifies: what is copied somewhere, the copy does."""
        keys = [_key(tensor) for tensor in step.stored]
        return [key for key in keys if step.is_copy or key not in self._copied]

    def _advance(self, number: int, answer: Any) -> None:  # noqa: ANN401 - what the pass found
        """Give a generator the answer to its request, and schedule what it asks for next."""
        pending, step = self._pending[number], self.steps[number]
        try:
            request = pending.ask_next(answer, step)
        except StopIteration as stop:
            pending.last, pending.passes, pending.request = stop.value, None, None
            if number in self._finished:
                with self._lock:
                    del self._pending[number]
                return
            items = last_items(number, step)
        else:
            sampled = [Item(number, "sample")] if request.sample else []
            items = sampled or grid(step).pieces(number, "pass", 0)
        with self._more:
            pending.items = len(items)
            self._items.extendleft(reversed(items))
            self._more.notify_all()

    def _park(self, number: int, request: Pass) -> None:
        """Wait for the group; the last to come answers all of them, in the order of the plan."""
        members = self._groups[request.group]
        with self._lock:
            self._pending[number].parked = True
            self.done_bytes += self.steps[number].bytes_out
            waiting = [self._pending[n] for n in members]
            if not all(one.parked and _asks(one, request.group) for one in waiting):
                return
            for one in waiting:
                one.parked = False
        assert request.combine is not None  # noqa: S101 - a group has one
        combined = request.combine([one.take_found() for one in waiting])
        for place, member in enumerate(members):
            self._advance(member, (combined, place))


def _unwarned(step: Step) -> AbstractContextManager[Any]:
    """Keep numpy from printing what it thinks of NaN and infinity: results are checked."""
    if step.fn is None:
        return nullcontext()
    import numpy as np

    return np.errstate(all="ignore")


def _backend(step: Step) -> ModuleType:
    """Return what computes a step: numpy where it is enough, so that torch is not loaded."""
    from surgery import arrays

    if arrays.can_compute(step):
        return arrays
    from surgery import compute

    compute.use_one_thread()
    return compute


def _asks(pending: _Pending, group: str) -> bool:
    return pending.request is not None and pending.request.group == group


def _flat(step: Step) -> Callable[..., Any]:
    """Turn an elementwise function into one of a part; none gives each output what it is given."""
    fn, copies = step.fn, len(step.outputs)
    return lambda _, *inputs: fn(*inputs) if fn else inputs * copies


def _key(tensor: TensorInfo) -> str:
    """Name an input so that it cannot be taken for an output: a path ends in a colon."""
    return f"{tensor.file}:{tensor.name}"


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
