"""Every average of parts that were trained apart, measured: what each part's data is worth."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

from surgery.errors import RecipeError
from surgery.evaluate.load import Loaded, load
from surgery.plan import TensorSpec
from surgery.soups.measure import Change, HeldOut, Judge, Result, open_sources, settle
from surgery.soups.sums import Parts, Rounding, Total, tensors_of

MOST_PARTS = 10
AGAINST = ("full", "best", "base")
Progress = Callable[[int, int], None]
Members = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """Bits per byte on one text, or on all; and the change from what all are compared with."""

    name: str
    bits_per_byte: float
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Subset:
    """One average.

    Attributes:
        parts: the names of its members; none for the base.
    """

    parts: tuple[str, ...]
    overall: Figure
    texts: tuple[Figure, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """All averages, the best first.

    Attributes:
        against: what the changes are from: "full", "best" or "base".
        reference: the members of that.
        held_out: SHA-256 of each text, by its name.
    """

    parts: tuple[str, ...]
    base: str | None
    against: str
    reference: tuple[str, ...]
    subsets: tuple[Subset, ...]
    held_out: Mapping[str, str]
    documents: int
    context: int
    bootstrap: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain dicts, lists, numbers and strings."""
        return {"format": "surgery-ablate-1", **asdict(self)}


def wanted_sizes(parts: int, sizes: Collection[int] | None, *, against: str) -> frozenset[int]:
    """Return the sizes of the averages to measure.

    Raises:
        RecipeError: a size that no average of these parts has.
    """
    odd = sorted(size for size in sizes or () if not 1 <= size <= parts)
    if odd:
        fact = f"asks for averages of {odd[0]} of {parts} parts"
        raise RecipeError("--sizes", fact, f"name sizes from 1 to {parts}")
    kept = frozenset(sizes or range(1, parts + 1))
    return kept | {parts} if against == "full" else kept


def count_subsets(parts: int, sizes: Collection[int]) -> int:
    """Return how many averages have these sizes."""
    return sum(comb(parts, size) for size in sizes)


def ablate(
    models: Sequence[str],
    held_out: HeldOut,
    outputs: Mapping[str, TensorSpec],
    *,
    base: str | None = None,
    against: str = "full",
    sizes: Collection[int] | None = None,
    context: int | None = None,
    batch_tokens: int = 8192,
    device: str = "cpu",
    bootstrap: int = 2000,
    seed: int = 0,
    memory: int = 4 << 30,
    progress: Progress | None = None,
) -> Ablation:
    """Measure the plain average of every subset of parts on held-out texts.

    Subsets are walked as a tree, each below the one without its last part, whose sum it reuses:
    one addition of weights a subset. As many sums as the largest subset has parts but one, one
    model, and `memory` bytes of the parts' weights are in memory.

    Args:
        outputs: tensors of an average as `outputs_of` gives them: what is measured is rounded as
            `surgery soup` would write it.
        base: what the parts were trained from, measured beside them.
        against: what changes are from: the average of all parts, the best average, or the base.
        sizes: how many parts averages have; all sizes by default.
        progress: called with averages measured and in all.

    Raises:
        RecipeError: an option makes no sense for these models or this machine.
        TrainError: a model cannot be loaded whole, cannot be scored, or is of another build.

    Source: "Scalable Data Ablation Approximations for Language Models through Modular Training
    and Merging", arXiv 2410.15661: averages stand in for models trained on the union
    of their parts' data.
    """
    chosen = wanted_sizes(len(models), sizes, against=against)
    with ExitStack() as scratch:
        sources = open_sources([*models, *([base] if base else [])], scratch)
        settings = settle(
            sources, context=context, batch_tokens=batch_tokens, device=device, seed=seed
        )
        judge = Judge(held_out=held_out, settings=settings)
        found: dict[Members, Result] = {}
        total = count_subsets(len(models), chosen) + bool(base)
        if base:
            loaded = load(sources[-1], device=settings.device, dtype=settings.dtype)
            found[()] = judge.measure(loaded, sources[-1])
            del loaded  # before the parts are loaded
        parts = Parts(sources=sources[: len(models)], settings=settings, memory=memory)
        walk = _Walk(parts=parts, judge=judge, rounding=Rounding(outputs=outputs), sizes=chosen)
        for members, result in walk.run():
            found[members] = result
            if progress is not None:
                progress(len(found), total)
    names = _names([source.name for source in sources])
    reference = _reference(found, against, len(models))
    table = _Table(held_out=held_out, reference=found[reference], draws=bootstrap, seed=seed)
    ranked = sorted(found, key=lambda members: (found[members].figure, members))
    return Ablation(
        parts=tuple(names[: len(models)]),
        base=names[-1] if base else None,
        against=against,
        reference=tuple(names[n] for n in reference),
        subsets=tuple(table.row([names[n] for n in m], found[m]) for m in ranked),
        held_out=dict(held_out.digests),
        documents=len(held_out.documents),
        context=settings.context,
        bootstrap=bootstrap,
        seed=seed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Walk:
    """A walk over subsets; the first member of each gives config and tokenizer, as in a soup."""

    parts: Parts
    judge: Judge
    rounding: Rounding
    sizes: frozenset[int]

    def run(self) -> Iterator[tuple[Members, Result]]:
        for root, source in enumerate(self.parts.sources):
            if not self._leads((root,)):
                continue
            shell = self.parts.load(root)
            if 1 in self.sizes:
                yield (root,), self.judge.measure(shell, source)
            if max(self.sizes) > 1:
                total = Total.of(tensors_of(shell), self.rounding)
                yield from self._below((root,), total, shell)
            del shell  # before the next one is loaded

    def _below(
        self, members: Members, total: Total, shell: Loaded
    ) -> Iterator[tuple[Members, Result]]:
        size = len(members) + 1
        for number in range(members[-1] + 1, len(self.parts.sources)):
            here = (*members, number)
            if not self._leads(here):
                continue
            state = self.parts.state(number)
            inner = size < max(self.sizes) and number + 1 < len(self.parts.sources)
            grown = total.plus(state) if inner else None
            if size in self.sizes:
                grown.write(shell) if grown else total.write(shell, state)
                yield here, self.judge.measure(shell, self.parts.sources[members[0]])
            del state  # before what lies below loads another
            if grown is not None:
                yield from self._below(here, grown, shell)

    def _leads(self, members: Members) -> bool:
        """Whether it, or a subset below it, has a size that is asked for."""
        most = len(members) + len(self.parts.sources) - 1 - members[-1]
        return any(len(members) <= size <= most for size in self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    """Makes rows of results, each beside the reference."""

    held_out: HeldOut
    reference: Result
    draws: int
    seed: int

    def row(self, parts: Sequence[str], found: Result) -> Subset:
        domains = self.held_out.domains
        return Subset(
            parts=tuple(parts),
            overall=self._figure("overall", found, range(len(found.values))),
            texts=tuple(self._figure(name, found, places) for name, places in domains.items()),
        )

    def _figure(self, name: str, found: Result, places: Sequence[int]) -> Figure:
        mine, other = found.only(places), self.reference.only(places)
        change = mine.beside(other, draws=self.draws, seed=self.seed)
        return Figure(name=name, bits_per_byte=mine.figure, change=change)


def _reference(found: Mapping[Members, Result], against: str, parts: int) -> Members:
    if against == "full":
        return tuple(range(parts))
    if against == "base":
        return ()
    return min((m for m in found if m), key=lambda members: (found[members].figure, members))


def _names(names: Sequence[str]) -> list[str]:
    """Number names that are told apart by nothing else."""
    found: list[str] = []
    for name in names:
        count, told = 1, name
        while told in found:
            count += 1
            told = f"{name}-{count}"
        found.append(told)
    return found
