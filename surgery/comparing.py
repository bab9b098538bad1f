"""Compare two checkpoints slice by slice, on threads, in a few megabytes each."""

import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from time import monotonic

from surgery.anatomy import PART_ORDER, Anatomy, anatomy
from surgery.checkpoint import BITS, Checkpoint, TensorInfo, View, read_rows, row_shape
from surgery.compute import COMPUTABLE, as_tensor, stored_reader, use_one_thread
from surgery.difference import Difference, Mismatch, Side, State, TensorDifference
from surgery.engine import TICK, Progress
from surgery.errors import CheckpointError, PlanError
from surgery.measure import SCRATCH, Rulers, same_bytes
from surgery.preflight import MEMORY, default_workers
from surgery.slices import CHUNK, Scratch, Sources
from surgery.sums import Sums, add

WORKER_BYTES = 2 * CHUNK + SCRATCH  # what one thread holds: a slice of each side, and float64


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of a pair of tensors: `count` elements, or bytes where it is not computed with."""

    pair: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What one slice showed: whether the bytes are the same, and the sums where there are any."""

    same: bool
    sums: Sums | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tensors of one name and shape."""

    a: TensorInfo
    b: TensorInfo

    @property
    def is_computable(self) -> bool:
        """Whether both sides are stored as plain floating-point numbers."""
        return self.a.dtype in COMPUTABLE and self.b.dtype in COMPUTABLE

    @property
    def is_read(self) -> bool:
        """Whether anything can be told from the bytes."""
        return self.is_computable or (self.a.dtype == self.b.dtype and not self.row)

    @property
    def row(self) -> int:
        """Elements that a side made when it is read comes in; 0 where both are stored."""
        made = isinstance(self.a, View) or isinstance(self.b, View)
        return max(prod(row_shape(self.a.shape)), 1) if made else 0

    @property
    def nbytes(self) -> int:
        """Bytes to read of both."""
        return self.a.nbytes + self.b.nbytes if self.is_read else 0


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    workers: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Difference:
    """Compare tensors of the same name and shape; the result does not depend on the workers.

    Args:
        workers: threads; as many of them as the memory allows.
        memory: bytes of buffers to hold at once.
        progress: called about ten times a second with bytes done and in all.

    Raises:
        PlanError: the memory does not suffice for one thread.
        StepError: a file cannot be read, or changes meanwhile.
    """
    threads = min(workers or default_workers(), memory // WORKER_BYTES)
    if threads < 1:
        fact = f"{memory >> 20} MiB are less than one thread needs"
        raise PlanError("memory", fact, f"allow at least {(WORKER_BYTES >> 20) + 1}M")
    names = [name for name in a.tensors if name in b.tensors]
    shared = [Pair(a=a.tensors[name], b=b.tensors[name]) for name in names]
    pairs = [pair for pair in shared if pair.a.shape == pair.b.shape]
    notes: list[str] = []
    parts = _anatomy(a, b, notes)
    with Sources((a, b)) as sources:
        found = list(_differences(pairs, sources, parts, threads, progress))
        sources.check_unchanged()
    return Difference(
        a=_side(a),
        b=_side(b),
        tensors=tuple(found),
        only_in_a=tuple(name for name in a.tensors if name not in b.tensors),
        only_in_b=tuple(name for name in b.tensors if name not in a.tensors),
        mismatched=tuple(
            Mismatch(name=pair.a.name, shape_a=pair.a.shape, shape_b=pair.b.shape)
            for pair in shared
            if pair.a.shape != pair.b.shape
        ),
        modules=_modules(found),
        notes=tuple(notes),
    )


def _side(checkpoint: Checkpoint) -> Side:
    return Side(
        ref=checkpoint.ref,
        name=checkpoint.name,
        family=str((checkpoint.config or {}).get("model_type") or "unknown"),
        tensors=len(checkpoint.tensors),
        parameters=sum(t.numel for t in checkpoint.tensors.values()),
        bytes=checkpoint.nbytes,
        dtypes=tuple(sorted({t.dtype for t in checkpoint.tensors.values()})),
    )


def _anatomy(a: Checkpoint, b: Checkpoint, notes: list[str]) -> Anatomy | None:
    for checkpoint in (a, b):
        try:
            return anatomy(checkpoint)
        except CheckpointError as error:
            notes.append(f"no layers told apart: {error}")
    return None


def _modules(found: Iterable[TensorDifference]) -> tuple[str, ...]:
    """List modules by what they are for, then by name."""
    parts = {t.module: t.part for t in found if t.module is not None}
    return tuple(sorted(parts, key=lambda name: (PART_ORDER.index(parts[name]), name)))


def _differences(
    pairs: list[Pair],
    sources: Sources,
    parts: Anatomy | None,
    threads: int,
    progress: Progress | None,
) -> Iterator[TensorDifference]:
    slices = [piece for number, pair in enumerate(pairs) for piece in _cut(number, pair)]
    total = sum(pair.nbytes for pair in pairs)
    results = _run(slices, pairs, sources, threads, _Ticker(progress, total))
    seen: dict[int, list[Seen]] = defaultdict(list)
    for number, found in results:
        seen[number].append(found)
    for number, pair in enumerate(pairs):
        yield _judge(pair, seen[number], parts)


def _cut(number: int, pair: Pair) -> list[Slice]:
    """Cut a pair into slices whose bounds depend on dtype and shape alone."""
    if not pair.is_read:
        return []
    size, piece = pair.a.nbytes, CHUNK
    if pair.is_computable:
        size, piece = pair.a.numel, CHUNK * 8 // max(BITS[pair.a.dtype], BITS[pair.b.dtype])
        piece = max(piece // pair.row, 1) * pair.row if pair.row else piece
    return [Slice(number, at, min(piece, size - at)) for at in range(0, size, piece)]


class _Ticker:
    """Counts bytes and calls back now and then."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done, self._last = progress, total, 0, monotonic()

    def add(self, count: int) -> None:
        self._done += count
        if self._progress and monotonic() - self._last >= TICK:
            self._last = monotonic()
            self._progress(self._done, self._total)


def _run(
    slices: list[Slice], pairs: list[Pair], sources: Sources, threads: int, ticker: _Ticker
) -> Iterator[tuple[int, Seen]]:
    """Work on threads and give the results in the order of the slices."""
    own = threading.local()

    def work(piece: Slice) -> Seen:
        pair = pairs[piece.pair]
        if not hasattr(own, "scratch"):
            own.scratch = Scratch()
        views = _read(piece, pair, sources, own.scratch)
        same = pair.a.dtype == pair.b.dtype and same_bytes(*views)
        if not pair.is_computable:
            return Seen(same)
        if not hasattr(own, "rulers"):
            own.rulers = Rulers()
        return Seen(same, _sums(pair, views, own.rulers, same=same))

    with ThreadPoolExecutor(threads) as pool:
        futures: list[Future[Seen]] = [pool.submit(work, piece) for piece in slices]
        try:
            for piece, future in zip(slices, futures, strict=True):
                yield piece.pair, future.result()
                ticker.add(sum(_widths(pairs[piece.pair])) * piece.count)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _widths(pair: Pair) -> tuple[int, int]:
    """Return bytes per element of each side; slices that are not computed with count bytes."""
    return (BITS[pair.a.dtype] // 8, BITS[pair.b.dtype] // 8) if pair.is_computable else (1, 1)


def _read(
    piece: Slice, pair: Pair, sources: Sources, scratch: Scratch
) -> tuple[memoryview, memoryview]:
    width_a, width_b = _widths(pair)
    a, b = scratch.take(0, piece.count * width_a), scratch.take(1, piece.count * width_b)
    _fill(a, pair.a, piece.start, sources)
    _fill(b, pair.b, piece.start, sources)
    return a, b


def _fill(view: memoryview, tensor: TensorInfo, start: int, sources: Sources) -> None:
    """Read a side from its element `start` on, rounded to its dtype where it is made."""
    if not isinstance(tensor, View):
        width = BITS[tensor.dtype] // 8 if tensor.dtype in COMPUTABLE else 1
        sources.read(tensor, start * width, view)
        return
    row = max(prod(row_shape(tensor.shape)), 1)
    target = as_tensor(view, tensor.dtype)
    use_one_thread()
    rows = read_rows(stored_reader(sources), tensor, start // row, target.numel() // row)
    target.copy_(rows.reshape(-1))


def _sums(pair: Pair, views: tuple[memoryview, memoryview], rulers: Rulers, *, same: bool) -> Sums:
    if same:
        return rulers.alike(views[0], pair.a.dtype)
    return rulers.apart((views[0], pair.a.dtype), (views[1], pair.b.dtype))


def _judge(pair: Pair, results: list[Seen], parts: Anatomy | None) -> TensorDifference:
    state, sums, note = _verdict(pair, results)
    place = parts.locate(pair.a.name) if parts else None
    return TensorDifference(
        name=pair.a.name,
        layer=place[0] if place else None,
        module=module_name(place[1]) if place else None,
        part=parts.part(pair.a.name) if parts else "other",
        dtype_a=pair.a.dtype,
        dtype_b=pair.b.dtype,
        shape=pair.a.shape,
        state=state,
        sums=sums,
        note=note,
    )


def module_name(rest: str) -> str:
    """Name the module of a tensor inside a layer; experts of all numbers are one module."""
    return re.sub(r"(?<=\.)[0-9]+(?=\.|$)", "*", rest.removesuffix(".weight"))


def _verdict(pair: Pair, seen: list[Seen]) -> tuple[State, Sums | None, str | None]:
    if not pair.is_read:
        return "differs", None, f"{pair.a.dtype} and {pair.b.dtype} are not compared"
    identical = pair.a.dtype == pair.b.dtype and all(piece.same for piece in seen)
    measured = [piece.sums for piece in seen if piece.sums]
    sums = add(measured) if measured and all(part.is_sound for part in measured) else None
    if identical:
        return "identical", sums, None
    if not pair.is_computable:
        return "differs", None, f"{pair.a.dtype} is compared by bytes only"
    if measured and sums is None:
        return "differs", None, "NaN, infinity or values too large to square"
    return "compared", sums, None
