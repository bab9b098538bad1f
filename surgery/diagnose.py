"""How far two bases lie apart, beside what fine-tuning changed: layer by layer."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import fsum, sqrt
from threading import local
from typing import Any

from surgery.anatomy import PART_ORDER, Anatomy, anatomy
from surgery.checkpoint import Checkpoint
from surgery.compute import COMPUTABLE, Reading, use_one_thread
from surgery.engine import Progress
from surgery.errors import CheckpointError
from surgery.plan import Step, TensorSpec
from surgery.preflight import computing_workers
from surgery.slices import Item, Scratch, Sources, grid

CLOSE = 0.9  # cosine of two bases below which a difference is not expected to carry over
FIGURES = 8  # sums kept of every piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A layer, or a part outside the layers; C is the new base, A the old, B tuned from A.

    Attributes:
        bases: cosine of C and A.
        cosine: of C - A and B - A.
        ratio: ||C - A|| / ||B - A||.
        conflict: share of elements that both change, where they change against each other.
    """

    name: str
    elements: int
    bases: float | None
    cosine: float | None
    ratio: float | None
    conflict: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was measured before a transfer, and what to be warned of."""

    rows: tuple[Row, ...]
    total: Row
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def diagnose(
    new_base: Checkpoint,
    tuned: Checkpoint,
    old_base: Checkpoint,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure in one reading of all three how the bases lie, in float64.

    Tensors that the three do not share in one shape are left out.

    Args:
        workers: threads; the result does not depend on them.
        progress: called with bytes read and in all.

    Raises:
        StepError: a file cannot be read, or changes meanwhile.
    """
    steps = list(_steps(new_base, tuned, old_base))
    found: dict[str, list[tuple[float, ...]]] = {}
    parts = _anatomy(new_base)
    with Sources((new_base, tuned, old_base)) as sources:
        for name, sums in _measured(steps, sources, workers or computing_workers(), progress):
            found.setdefault(_group(parts, name), []).append(sums)
        sources.check_unchanged()
    rows = tuple(_row(name, found[name]) for name in sorted(found, key=_place))
    total = _row("all", [sums for group in found.values() for sums in group])
    return Diagnosis(rows=rows, total=total, warnings=tuple(_warnings(rows, total)))


def _steps(new_base: Checkpoint, tuned: Checkpoint, old_base: Checkpoint) -> Iterator[Step]:
    for name, tensor in new_base.tensors.items():
        inputs = tuple(s.tensors[name] for s in (new_base, tuned, old_base) if name in s.tensors)
        alike = {t.shape for t in inputs} == {tensor.shape} and len(inputs) == 3  # noqa: PLR2004
        if alike and all(t.dtype in COMPUTABLE for t in inputs):
            outputs = ((name, TensorSpec("F64", tensor.shape)),)
            yield Step(inputs=inputs, outputs=outputs, fn=lambda *_: None, elementwise=True)


def _measured(
    steps: list[Step], sources: Sources, workers: int, progress: Progress | None
) -> Iterator[tuple[str, tuple[float, ...]]]:
    own = local()

    def work(item: Item) -> tuple[float, ...]:
        use_one_thread()
        if not hasattr(own, "scratch"):
            own.scratch = Scratch()
        step = steps[item.step]
        reading = Reading(step, grid(step), sources, own.scratch, identify=False)
        parts = [_sums(*inputs) for _, inputs in reading.parts(item.start, item.count)]
        return tuple(fsum(column) for column in zip(*parts, strict=True))

    items = [item for n, step in enumerate(steps) for item in grid(step).pieces(n, "pass", 1)]
    total, done = sum(step.bytes_in for step in steps), 0
    with ThreadPoolExecutor(workers) as pool:
        for item, sums in zip(items, pool.map(work, items), strict=True):
            step = steps[item.step]
            done += step.bytes_in * item.count // max(step.outputs[0][1].numel, 1)
            if progress:
                progress(done, total)
            if sums:
                yield step.outputs[0][0], sums


def _sums(new: Any, tuned: Any, old: Any) -> tuple[float, ...]:  # noqa: ANN401 - tensors
    """Return elements, cc, aa, ca, xx, yy, xy, changed by both, and against each other."""
    import numpy as np

    moved, change = new - old, tuned - old
    pairs = ((new, new), (old, old), (new, old), (moved, moved), (change, change), (moved, change))
    dots = [float(a.dot(b)) for a, b in pairs]
    product = moved.mul_(change).numpy()
    both, against = np.count_nonzero(product), np.count_nonzero(product < 0)
    return (float(new.numel()), *dots, float(both), float(against))


def _anatomy(checkpoint: Checkpoint) -> Anatomy | None:
    try:
        return anatomy(checkpoint)
    except CheckpointError:
        return None


def _group(parts: Anatomy | None, name: str) -> str:
    place = parts.locate(name) if parts else None
    if place is not None:
        return f"layer {place[0]}"
    return parts.part(name) if parts else "other"


def _place(name: str) -> tuple[int, int]:
    """Order groups: the embedding, the layers, the rest."""
    word, _, number = name.partition(" ")
    if word == "layer":
        return 1, int(number)
    return (0, 0) if name == "embedding" else (2, PART_ORDER.index(name))


def _row(name: str, parts: Iterable[tuple[float, ...]]) -> Row:
    columns = [fsum(column) for column in zip(*parts, strict=True)] or [0.0] * (FIGURES + 1)
    count, cc, aa, ca, xx, yy, xy, both, against = columns
    return Row(
        name=name,
        elements=int(count),
        bases=_cosine(ca, cc, aa),
        cosine=_cosine(xy, xx, yy),
        ratio=sqrt(xx / yy) if yy else None,
        conflict=against / both if both else None,
    )


def _cosine(dot: float, first: float, second: float) -> float | None:
    return max(-1.0, min(1.0, dot / sqrt(first) / sqrt(second))) if first and second else None


def _warnings(rows: tuple[Row, ...], total: Row) -> Iterator[str]:
    if total.bases is not None and total.bases < CLOSE:
        yield (
            f"the bases are not close (cosine {total.bases:.2f}): the difference is not expected "
            "to carry over"
        )
        return
    far = [row.name for row in rows if row.bases is not None and row.bases < CLOSE]
    if far:
        yield f"the bases are not close in {len(far)} of {len(rows)} parts: {', '.join(far[:3])}"
    if total.ratio is None:
        yield "the tuned model does not differ from the old base"
