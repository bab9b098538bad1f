"""The only scheduler: threads that read, compute and write items of independent steps."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from surgery.checkpoint import BITS, View
from surgery.digest import Digests, combine
from surgery.errors import StepError, SurgeryError
from surgery.items import (
    Found,
    Target,
    ask_item,
    copy_item,
    digest_item,
    key_of,
    map_item,
    stream_step,
    unwarned,
    whole_step,
    zeros_step,
)
from surgery.plan import Pass, Step, Tell
from surgery.slices import Item, Scratch, Sources, cut, grid, last_items

Progress = Callable[[int, int], None]  # bytes done, bytes in all
TICK = 0.1  # seconds between two looks at the workers
GRACE = 1.0  # seconds that workers get to end their item after an interrupt
AHEAD = 16  # items to read ahead
EARLY = 256 << 20  # bytes to ask for before the first item


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
        self._copied = {key_of(t) for step in steps if step.is_copy for t in step.inputs}
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
        while items := self._next():
            item, ahead = items
            try:
                if ahead:
                    self._prefetch(ahead)
                self._do(item, scratch)
            except BaseException as error:
                with self._lock:
                    self._failure = self._failure or error
                self._stop.set()
            with self._more:
                self._busy -= 1
                self._more.notify_all()

    def _next(self) -> tuple[Item, Item | None] | None:
        """Return an item to do, and one to read ahead for."""
        with self._more:
            while not self._items and self._busy and not self._stop.is_set():
                self._more.wait(TICK)  # what others do may give more
            if not self._items or self._stop.is_set():
                return None
            item = self._items.popleft()
            self._busy += 1
            ahead = self._items[AHEAD] if len(self._items) > AHEAD else None
        return item, ahead

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
        try:
            with unwarned(step):
                self._account(item, step, self._seen(item, step, scratch))
        except (SurgeryError, AssertionError):
            raise
        except Exception as error:
            if step.fn is None:
                raise
            fact = f"{step.why} failed ({type(error).__name__}: {error})"
            raise StepError(step.outputs[0][0], fact, "--debug shows where") from error

    def _seen(self, item: Item, step: Step, scratch: Scratch) -> Found:
        """Do the item, and return the digests of what was read and written."""
        sources, target = self.sources, self.target
        match item.phase:
            case "copy":
                found = copy_item(step, item, scratch, sources, target)
            case "zeros":
                found = zeros_step(step)
            case "digest":
                found = digest_item(step.stored[item.tensor], item, scratch, sources)
            case "map":
                last = self._pending[item.step].last
                found = map_item(step, item, scratch, sources, target, last=last)
            case "whole":
                found = self._whole(step, self._pending[item.step].told)
            case "open":
                assert step.fn is not None  # noqa: S101 - a step of passes has one
                found, self._pending[item.step].passes = {}, step.fn()
            case "pass" | "sample":
                found = self._ask(item, step, scratch)
        return found

    def _whole(self, step: Step, told: dict[str, float]) -> Found:
        with self._budget.hold(step.whole_bytes):
            if step.streamed:
                return stream_step(step, self.sources, self.target, told)
            return whole_step(step, self.sources, self.target)

    def _ask(self, item: Item, step: Step, scratch: Scratch) -> Found:
        pending = self._pending[item.step]
        assert pending.request is not None  # noqa: S101 - what the item was made for
        found = ask_item(step, item, scratch, self.sources, pending.request)
        with self._lock:
            pending.add_found(item, found)
        return {}

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
        keys = [key_of(tensor) for tensor in step.stored]
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


def _asks(pending: _Pending, group: str) -> bool:
    return pending.request is not None and pending.request.group == group


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
