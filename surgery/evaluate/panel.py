"""The evaluation panel: models against texts and tasks, and children against their parents."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from surgery.errors import RecipeError
from surgery.evaluate.documents import read_documents
from surgery.evaluate.extras import Extras, decided, with_extras, with_maps
from surgery.evaluate.figures import tabulate
from surgery.evaluate.load import Source, find_device, find_dtype, open_source
from surgery.evaluate.pairs import Progress, Settings, score_all
from surgery.evaluate.results import Evaluation
from surgery.evaluate.windows import check_windows

# Longer contexts cost quadratically and change little; a longer one has to be asked for.
_CONTEXT_CAP = 2048


def evaluate(
    models: Sequence[str | Path],
    texts: Sequence[str | Path],
    *,
    parent: str | Path | Sequence[str | Path] | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
    device: str = "cpu",
    dtype: str | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    maps: bool = False,
    samples: int = 0,
    speed: bool = False,
    tasks: Sequence[str] = (),
    pairs: Sequence[str | Path] = (),
    normalize: str = "none",
    gates: Sequence[str] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Measure models on texts: bits per byte, and divergence and difference from parents.

    The parents are those named, else the first model. Every token is scored once, in a window
    of `context` tokens that moves by `stride`; by default the shortest limit of the models, at
    most 2048, and half of it. Parent and child see the same windows. At most two models are in
    memory. Progress is called with a description, tokens fed, and tokens to feed.

    Args:
        maps: compare weights and layers with every parent as well.
        samples: let every model go on behind the beginnings of so many documents.
        speed: time every model.
        tasks: of lm-evaluation-harness, by name or file.
        pairs: files of questions.
        normalize: what log-probabilities of choices are divided by.
        gates: limits; whether they hold is in the result, and raises nothing.

    Raises:
        RecipeError: An option makes no sense for these models or this machine.
        CheckpointError: A text, a config or a tokenizer is missing or broken.
        TrainError: A model cannot be loaded whole, or cannot be scored.
    """
    _check(models, batch_tokens=batch_tokens, bootstrap=bootstrap)
    documents = read_documents([Path(text) for text in texts])
    refs, parents = _ordered(models, parent)
    asked: dict[str, Any] = {"tasks": tasks, "pairs": pairs, "normalize": normalize}
    children = len(refs) - parents
    extras = Extras.read(samples=samples, speed=speed, gates=gates, children=children, **asked)
    with ExitStack() as scratch:
        sources = [open_source(ref, scratch) for ref in refs]
        length = shared_context(sources, context)
        step = max(1, length // 2) if stride is None else stride
        check_windows(length, step)
        place = find_device(device)
        windows: dict[str, Any] = {
            "context": length,
            "stride": step,
            "batch_tokens": batch_tokens,
        }
        settings = Settings(
            **windows,
            device=place,
            dtype=find_dtype(dtype, place),
            progress=progress,
            maps=maps,
            seed=seed,
        )
        scored = score_all(sources, documents, settings, parents=parents)
        found = tabulate(documents, scored, draws=bootstrap, seed=seed)
        found = with_maps(found, sources) if maps else found
        found, judged = with_extras(found, sources, documents, settings, extras, draws=bootstrap)
    evaluation = Evaluation(
        models=found,
        **windows,
        device=str(place),
        bootstrap=bootstrap,
        seed=seed,
        versions={name: version(name) for name in ("torch", "transformers", "tokenizers")},
        tasks=judged,
    )
    return replace(evaluation, gates=decided(evaluation, extras.gates))


def _check(models: Sequence[str | Path], *, batch_tokens: int, bootstrap: int) -> None:
    if not models:
        raise RecipeError("eval", "no model is named", "give one or more model directories")
    if batch_tokens < 1:
        raise RecipeError("--batch-tokens", f"{batch_tokens} is no batch", "give 1 or more")
    if bootstrap < 1:
        raise RecipeError("--bootstrap", f"{bootstrap} draws are none", "give 1000 or more")


def _ordered(
    models: Sequence[str | Path], parent: str | Path | Sequence[str | Path] | None
) -> tuple[list[str], int]:
    """Return all models, parents first, and how many those are."""
    refs = [str(model) for model in models]
    named = [parent] if isinstance(parent, str | Path) else list(parent or ())
    parents = list(dict.fromkeys(str(each) for each in named)) or refs[:1]
    for each in parents:
        if each in refs:
            refs.remove(each)
    return [*parents, *refs], len(parents)


def shared_context(sources: Sequence[Source], asked: int | None) -> int:
    """Return one context for all models: figures over different contexts do not compare."""
    tight = min(sources, key=lambda s: s.limit or _CONTEXT_CAP)
    limits = [s.limit for s in sources if s.limit is not None]
    if asked is None:
        return min([_CONTEXT_CAP, *limits])
    if limits and asked > min(limits):
        fact = f"{asked} is above the {tight.limit} tokens of {tight.path}"
        raise RecipeError("--context", fact, "lower it")
    return asked
