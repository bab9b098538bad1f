"""What an evaluation adds to the figures of texts where it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.checkpoint import open_checkpoint
from surgery.comparing import compare
from surgery.errors import RecipeError
from surgery.evaluate.answers import answer, check_lengths
from surgery.evaluate.choices import Questions, read_questions
from surgery.evaluate.documents import Document
from surgery.evaluate.gates import Gate, Gated, decide, parse_gate
from surgery.evaluate.harness import check_tasks, run_tasks
from surgery.evaluate.load import Loaded, Source, load
from surgery.evaluate.pairs import Settings
from surgery.evaluate.results import Against, Divergence, Evaluation, ModelFigures
from surgery.evaluate.samples import prompts, write_samples
from surgery.evaluate.speed import measure_speed
from surgery.evaluate.tasks import Outcome, Task, compare_tasks

# Figures that a gate can only limit beside a parent.
_COMPARED = ("kl", "kl_p50", "kl_p95", "kl_p99", "top1", "logit_rms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """What was asked for beyond the texts, checked."""

    samples: int
    speed: bool
    tasks: tuple[str, ...]
    questions: tuple[Questions, ...]
    normalize: str
    gates: tuple[Gate, ...]

    @classmethod
    def read(
        cls,
        *,
        samples: int,
        speed: bool,
        tasks: Sequence[str],
        pairs: Sequence[str | Path],
        normalize: str,
        gates: Sequence[str],
        children: int,
    ) -> "Extras":
        """Check all of it and read the files, before a model is loaded.

        Raises:
            RecipeError: Something was asked for that cannot be.
            CheckpointError: A file is missing or is not what it should be.
        """
        if samples < 0:
            raise RecipeError("--samples", f"{samples} is below 0", "give a number of documents")
        check_lengths(normalize)
        parsed = tuple(parse_gate(text) for text in gates)
        questions = read_questions([Path(path) for path in pairs])
        _check_names(questions, tasks)
        check_tasks(tasks)
        _check_gates(parsed, questions, tasks, children)
        return cls(
            samples=samples,
            speed=speed,
            tasks=tuple(tasks),
            questions=questions,
            normalize=normalize,
            gates=parsed,
        )

    @property
    def loads(self) -> bool:
        """Whether anything needs the models once more."""
        return bool(self.samples or self.speed or self.tasks or self.questions)


def _check_names(questions: Sequence[Questions], tasks: Sequence[str]) -> None:
    for each in questions:
        if each.name in {Path(task).stem for task in tasks}:
            fact = f"{each.name} is the name of a --pairs file too"
            raise RecipeError("--task", fact, "rename one, or leave one out")


def _check_gates(
    gates: Sequence[Gate], questions: Sequence[Questions], tasks: Sequence[str], children: int
) -> None:
    known = {each.name for each in questions}
    for gate in gates:
        place = f"--gate {gate.text}"
        if not children and (gate.needs_parent or gate.metric in _COMPARED):
            raise RecipeError(place, "there is no child to compare with a parent", "name one")
        # Names inside a group are known only once the harness has run it.
        if gate.task is not None and gate.task not in known and not tasks:
            fact = f"no task is called {gate.task}"
            raise RecipeError(place, fact, "add it with --task or --pairs")


def with_maps(
    models: Sequence[ModelFigures], sources: Sequence[Source]
) -> tuple[ModelFigures, ...]:
    """Add to each child how far its weights are from each parent's.

    Shapes: sources are the parents and then the children, as the models are.
    """
    opened = {source.ref: open_checkpoint(source.path) for source in sources}

    def measured(child: str, against: Against) -> Against:
        found = compare(opened[against.ref], opened[child])
        return replace(against, weights=found.as_dict())

    return tuple(
        replace(m, against=tuple(measured(m.ref, each) for each in m.against)) for m in models
    )


def with_extras(
    models: Sequence[ModelFigures],
    sources: Sequence[Source],
    documents: Sequence[Document],
    settings: Settings,
    extras: Extras,
    *,
    draws: int,
) -> tuple[tuple[ModelFigures, ...], tuple[Task, ...]]:
    """Load each model once more for samples, speed and tasks; one is in memory at a time."""
    if not extras.loads:
        return tuple(models), ()
    found, outcomes = [], {}
    for model, source in zip(models, sources, strict=True):
        loaded = load(source, device=settings.device, dtype=settings.dtype)
        given = prompts(documents, extras.samples) if extras.samples else []
        written = write_samples(loaded, source, given, context=settings.context)
        timed = measure_speed(loaded, context=settings.context) if extras.speed else None
        found.append(replace(model, samples=written, speed=timed))
        outcomes[model.ref] = _outcomes(loaded, source, settings, extras)
        del loaded  # before the next one is loaded
    if not extras.tasks and not extras.questions:
        return tuple(found), ()
    children = [m.ref for m in models if not m.parent]
    parents = [m.ref for m in models if m.parent]
    judged = compare_tasks(outcomes, children, parents, draws=draws, seed=settings.seed)
    return tuple(found), judged


def _outcomes(loaded: Loaded, source: Source, settings: Settings, extras: Extras) -> list[Outcome]:
    found = [
        answer(
            loaded,
            source.tokenizer,
            questions,
            mark=source.mark,
            context=settings.context,
            batch_tokens=settings.batch_tokens,
            normalize=extras.normalize,
        )
        for questions in extras.questions
    ]
    if extras.tasks:
        found += run_tasks(
            loaded,
            source.tokenizer,
            extras.tasks,
            context=settings.context,
            batch_tokens=settings.batch_tokens,
            seed=settings.seed,
        )
    return found


def decided(found: Evaluation, gates: Sequence[Gate]) -> tuple[Gated, ...]:
    """Return what the gates say of every child beside every parent, or of the models alone."""
    plain = {m.ref: _plain(m, found.tasks) for m in found.models}
    children = [m for m in found.models if not m.parent]
    if not children:
        alone = (decide(gates, m.ref, plain[m.ref]) for m in found.models)
        return tuple(each for some in alone for each in some)
    return tuple(
        each
        for child in children
        for against in child.against
        for each in decide(
            gates,
            child.ref,
            plain[child.ref] | _compared(against.overall.divergence),
            parent=against.ref,
            parents=plain[against.ref],
        )
    )


def _plain(model: ModelFigures, tasks: Sequence[Task]) -> dict[str, float | None]:
    found: dict[str, float | None] = {
        "bpb": model.overall.bits_per_byte,
        "ppl": model.overall.perplexity,
    }
    for task in tasks:
        for each in task.models:
            if each.model == model.ref:
                found[f"acc:{task.name}"] = each.value
    return found


def _compared(found: Divergence | None) -> dict[str, float | None]:
    if found is None:
        return {}
    values = (found.mean, found.median, found.p95, found.p99, found.agreement, found.logit_rms)
    return dict(zip(_COMPARED, values, strict=True))
