"""The greedy soup: models added to an average one by one, where held-out documents gain."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from surgery.evaluate.load import Source
from surgery.plan import TensorSpec
from surgery.soups.measure import Change, HeldOut, Judge, Result, open_sources, settle
from surgery.soups.sums import Parts, Rounding, Total, tensors_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One model that was tried, in the order of trying.

    Attributes:
        model: what the user typed.
        alone: its own figure, by which models are sorted.
        soup: the figure of the soup with it.
        change: against the soup before it; None for the first model.
        added: whether the soup with it was better, strictly.
    """

    model: str
    name: str
    alone: float
    soup: float
    change: Change | None
    added: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Greedy:
    """What was tried, and what came out.

    Attributes:
        unit: "bits per byte", of which less is better, or "accuracy".
        documents: how many decided.
        held_out: SHA-256 of each file that was named, by its name.
        tasks: tasks by name.
    """

    unit: str
    decisions: tuple[Decision, ...]
    documents: int
    held_out: Mapping[str, str]
    tasks: tuple[str, ...]
    context: int
    bootstrap: int
    seed: int

    @property
    def chosen(self) -> list[str]:
        """The models of the soup, the best first."""
        return [each.model for each in self.decisions if each.added]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, models by their last part only."""
        told = asdict(self)
        for each in told["decisions"]:
            del each["model"]
        return {**told, "decisions": list(told["decisions"]), "tasks": list(self.tasks)}


def evaluations(models: int) -> int:
    """Return how many times held-out documents are scored: each model, then each soup."""
    return 2 * models - 1


def greedy_soup(
    models: Sequence[str],
    held_out: HeldOut,
    outputs: Mapping[str, TensorSpec],
    *,
    context: int | None = None,
    batch_tokens: int = 8192,
    device: str = "cpu",
    bootstrap: int = 2000,
    seed: int = 0,
    memory: int = 1 << 30,
    progress: Progress | None = None,
) -> Greedy:
    """Choose models whose average is best on held-out documents, greedily.

    Models are sorted by their own figure, the best first and equal ones as they were named. Each
    is added if the average with it is better than without. Two models and one sum of weights are
    in memory at most, beside `memory` bytes of weights that need not be loaded twice.

    Args:
        outputs: tensors of the average as `outputs_of` gives them: what is measured is rounded as
            it would be written.
        progress: called with evaluations done and in all.

    Raises:
        RecipeError: an option makes no sense for these models or this machine.
        TrainError: a model cannot be loaded whole, cannot be scored, or is of another build.

    Source: "Model soups", arXiv 2203.05482, algorithm 1. The printed algorithm adds a model where
    the soup is as good (>=); the authors' code, and this, only where it is better (>).
    """
    with ExitStack() as scratch:
        sources = open_sources(models, scratch)
        settings = settle(
            sources, context=context, batch_tokens=batch_tokens, device=device, seed=seed
        )
        parts = Parts(sources=sources, settings=settings, memory=memory)
        trial = _Trial(
            parts=parts,
            judge=Judge(held_out=held_out, settings=settings),
            rounding=Rounding(outputs=outputs),
            draws=bootstrap,
            tick=_counter(progress, evaluations(len(models))),
        )
        decisions = trial.run()
    return Greedy(
        unit=held_out.unit,
        decisions=tuple(decisions),
        documents=trial.documents,
        held_out=dict(held_out.digests),
        tasks=held_out.tasks,
        context=settings.context,
        bootstrap=bootstrap,
        seed=seed,
    )


def _counter(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


@dataclass(slots=True, kw_only=True)
class _Trial:
    """One choice of a soup, while it is made."""

    parts: Parts
    judge: Judge
    rounding: Rounding
    draws: int
    tick: Callable[[], None]
    documents: int = 0

    def run(self) -> list[Decision]:
        alone = [self._alone(number) for number in range(len(self.parts.sources))]
        self.documents = len(alone[0].values)
        order = sorted(range(len(alone)), key=lambda n: _rank(alone[n]))
        return self._decide(order, alone)

    def _alone(self, number: int) -> Result:
        found = self.judge.measure(self.parts.load(number), self._source(number))
        self.tick()
        return found

    def _decide(self, order: Sequence[int], alone: Sequence[Result]) -> list[Decision]:
        """Try each model in turn; the best one's config and tokenizer are the soup's."""
        best = order[0]
        shell, result = self.parts.load(best), alone[best]
        soup = Total.of(tensors_of(shell), self.rounding)
        decisions = [self._told(best, alone, result, None, added=True)]
        for number in order[1:]:
            state = self.parts.state(number)
            soup.write(shell, state)
            found = self.judge.measure(shell, self._source(best))
            self.tick()
            change = found.beside(result, draws=self.draws, seed=self.judge.settings.seed)
            better = found.beats(result)
            decisions.append(self._told(number, alone, found, change, added=better))
            if better:
                soup, result = soup.plus(state), found
        return decisions

    def _told(
        self,
        number: int,
        alone: Sequence[Result],
        found: Result,
        change: Change | None,
        *,
        added: bool,
    ) -> Decision:
        source = self._source(number)
        return Decision(
            model=source.ref,
            name=source.name,
            alone=alone[number].figure,
            soup=found.figure,
            change=change,
            added=added,
        )

    def _source(self, number: int) -> Source:
        return self.parts.sources[number]


def _rank(found: Result) -> float:
    return found.figure if found.lower else -found.figure
