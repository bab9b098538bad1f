"""The evaluation panel: models against texts, and children against their parent."""

from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from surgery.errors import RecipeError
from surgery.evaluate.documents import read_documents
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
    parent: str | Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int = 8192,
    device: str = "cpu",
    dtype: str | None = None,
    bootstrap: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure models on texts: bits per byte, and divergence and difference from a parent.

    The parent is the one named, else the first model. Every token is scored once, in a window
    of `context` tokens that moves by `stride`; by default the shortest limit of the models, at
    most 2048, and half of it. Parent and child see the same windows. At most two models are in
    memory. Progress is called with a description, tokens fed, and tokens to feed.

    Raises:
        RecipeError: An option makes no sense for these models or this machine.
        CheckpointError: A text, a config or a tokenizer is missing or broken.
        TrainError: A model cannot be loaded whole, or cannot be scored.
    """
    _check(models, batch_tokens=batch_tokens, bootstrap=bootstrap)
    documents = read_documents([Path(text) for text in texts])
    with ExitStack() as scratch:
        sources = [open_source(model, scratch) for model in _ordered(models, parent)]
        length = _context(sources, context)
        step = max(1, length // 2) if stride is None else stride
        check_windows(length, step)
        place = find_device(device)
        settings = Settings(
            context=length,
            stride=step,
            batch_tokens=batch_tokens,
            device=place,
            dtype=find_dtype(dtype, place),
            progress=progress,
        )
        scored = score_all(sources, documents, settings)
    return Evaluation(
        models=tabulate(documents, scored, draws=bootstrap, seed=seed),
        context=length,
        stride=step,
        batch_tokens=batch_tokens,
        device=str(place),
        bootstrap=bootstrap,
        seed=seed,
        versions={name: version(name) for name in ("torch", "transformers", "tokenizers")},
    )


def _check(models: Sequence[str | Path], *, batch_tokens: int, bootstrap: int) -> None:
    if not models:
        raise RecipeError("eval", "no model is named", "give one or more model directories")
    if batch_tokens < 1:
        raise RecipeError("--batch-tokens", f"{batch_tokens} is no batch", "give 1 or more")
    if bootstrap < 1:
        raise RecipeError("--bootstrap", f"{bootstrap} draws are none", "give 1000 or more")


def _ordered(models: Sequence[str | Path], parent: str | Path | None) -> list[str]:
    refs = [str(model) for model in models]
    first = refs[0] if parent is None else str(parent)
    if first in refs:
        refs.remove(first)
    return [first, *refs]


def _context(sources: Sequence[Source], asked: int | None) -> int:
    """Return one context for all models: figures over different contexts do not compare."""
    tight = min(sources, key=lambda s: s.limit or _CONTEXT_CAP)
    limits = [s.limit for s in sources if s.limit is not None]
    if asked is None:
        return min([_CONTEXT_CAP, *limits])
    if limits and asked > min(limits):
        fact = f"{asked} is above the {tight.limit} tokens of {tight.path}"
        raise RecipeError("--context", fact, "lower it")
    return asked
