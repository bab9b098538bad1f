"""Drive generators of passes over arrays in memory, at any part size and with any sample."""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
import torch

from surgery.method import Place
from surgery.passes import Each, Slices
from surgery.plan import Part

Gen = Generator[Each, Any, Any]


def slices(models: Sequence[Any], part: Part) -> Slices:
    cut = [torch.from_numpy(m[part.start : part.start + part.count]) for m in models]
    return Slices(part, torch.zeros(part.count, dtype=cut[0].dtype), cut, Place(name="t"))


def sampled(models: Sequence[Any], count: int) -> Slices:
    """Pick blocks of 4 elements, as many as `count` needs, evenly; all where there are fewer."""
    total = len(models[0])
    if total <= count:
        return slices(models, Part(0, 0, total))
    starts = np.linspace(0, total - 4, count // 4).astype(int)
    where = (starts[:, None] + np.arange(4)).reshape(-1)
    return slices([m[where] for m in models], Part(0, 0, where.size))


def parts_of(total: int, size: int) -> list[Part]:
    return [Part(n, at, min(size, total - at)) for n, at in enumerate(range(0, total, size))]


def drive(
    generators: Sequence[Gen],
    tensors: Sequence[Sequence[Any]],
    *,
    part: int,
    sample: int = 1 << 16,
) -> tuple[list[Any], int]:
    """Run one generator per tensor together, as the engine does; return results and readings."""
    answers: list[Any] = [None] * len(generators)
    results: list[Any] = [None] * len(generators)
    going, readings = set(range(len(generators))), 0
    parked: dict[int, tuple[Each, list[Any]]] = {}
    while going:
        for n in sorted(going - set(parked)):
            try:
                each = generators[n].send(answers[n])
            except StopIteration as stop:
                results[n] = stop.value
                going.discard(n)
                continue
            if each.sample:
                found = [each.fn(sampled(tensors[n], sample))]
            else:
                readings += 1
                found = [each.fn(slices(tensors[n], p)) for p in parts_of(len(tensors[n][0]), part)]
            answers[n] = found
            if each.group:
                parked[n] = (each, found)
        if parked and set(parked) == going:
            last = parked[max(parked)][0]
            assert last.combine is not None
            combined = last.combine([parked[n][1] for n in sorted(parked)])
            for place, n in enumerate(sorted(parked)):
                answers[n] = (combined, place)
            parked = {}
    return results, readings
