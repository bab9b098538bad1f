"""Run a model over text, and write what its activations show to a small safetensors file.

Plans that need activations (which layers to drop, which units, which weights) read that file as
one more source. So a measurement is taken once, can be looked at, and a plan stays arithmetic on
stored tensors.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.anatomy import anatomy
from surgery.calibrate.observe import KINDS, Observer, find_linears, observers_for, shared_inputs
from surgery.calibrate.rows import TokenRows, plan_token_rows, row_length
from surgery.calibrate.statistics import (
    Statistics,
    StatisticsFile,
    identify,
    open_statistics,
    read_numbers,
)
from surgery.checkpoint import open_checkpoint
from surgery.errors import RecipeError, TrainError
from surgery.evaluate.documents import read_documents
from surgery.evaluate.load import Loaded, find_device, find_dtype, load, open_source

__all__ = ["Calibration", "Statistics", "calibrate", "open_statistics", "read_numbers"]

Progress = Callable[[int, int], None]
MEMORY = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a calibration did.

    Attributes:
        out: the file.
        tensors, nbytes: how many it holds, and their size.
        rows, tokens: of text that the model was run over.
        passes: how often it was run over them, since all statistics did not fit at once.
    """

    out: Path
    tensors: int
    nbytes: int
    rows: int
    tokens: int
    passes: int


def calibrate(
    model: str | Path,
    texts: Sequence[Path],
    out: Path,
    *,
    collect: Collection[str],
    context: int | None = None,
    samples: int = 128,
    batch_tokens: int = 4096,
    device: str = "cpu",
    dtype: str | None = None,
    memory: int = MEMORY,
    force: bool = False,
    note: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run a model over text and write statistics of its activations to `out`.

    Text is cut into rows of `context` tokens that do not overlap; no row is padded, so nothing
    has to be masked. `collect` names one or more of

    - `layers`: `cosine` [L+1, L+1], the mean over tokens of the cosine between the residual stream
      before layer i and before layer j (L: after the last), and `angle.last` [L+1, L+1], the mean
      over rows of the angle between them at the last token, in units of pi;
    - `inputs`: for every linear map of a layer `NAME.square` [in], the sum over tokens of its
      squared inputs, and `NAME.absolute` [in], the sum over rows of the squared mean magnitude;
    - `grams`: `NAME.gram` [in, in], the sum over tokens of the products of its inputs. Maps that
      read the same input share one, under the first one's name.

    Args:
        context: tokens of a row; by default what the model takes, at most 2048.
        samples: rows at most.
        batch_tokens: tokens fed at once.
        dtype: what to compute in; float32 on the CPU, as stored elsewhere.
        memory: bytes of statistics held at once; more are collected in several passes.
        note: strings to keep in the file's header.
        progress: called with rows done and rows in all, over all passes.

    Raises:
        RecipeError: an option makes no sense, or `out` exists and `force` is not given.
        CheckpointError: the model or a text cannot be opened.
        TrainError: the model does not load whole, or its activations are not finite.
    """
    sizes = {"samples": samples, "batch_tokens": batch_tokens}
    _check(collect, context=context, out=out, force=force, **sizes)
    documents = read_documents(texts)
    place = find_device(device)
    base = open_checkpoint(model)
    parts = anatomy(base)
    with ExitStack() as scratch:
        source = open_source(model, scratch)
        rows = plan_token_rows(
            source.tokenizer,
            documents,
            mark=source.mark,
            context=row_length(context, source.limit),
            samples=samples,
        )
        loaded = load(source, device=place, dtype=find_dtype(dtype, place))
    linears = find_linears(loaded, parts.stack.prefix)
    aliases = shared_inputs(loaded, linears) if "grams" in collect else {}
    groups = observers_for(collect, loaded, parts, linears, aliases, memory=memory)
    specs = {
        name: spec for group in groups for seen in group for name, spec in seen.specs().items()
    }
    told = {
        **(note or {}),
        "surgery": "statistics",
        "model": identify(base),
        "collected": ",".join(sorted(collect)),
        "rows": str(len(rows.rows)),
        "tokens": str(rows.tokens),
        "aliases": json.dumps(aliases, sort_keys=True),
    }
    with StatisticsFile(out, specs, told) as file:
        _collect(loaded, rows, groups, file, batch_tokens=batch_tokens, progress=progress)
    nbytes = sum(spec.nbytes for spec in specs.values())
    return Calibration(
        out=out,
        tensors=len(specs),
        nbytes=nbytes,
        rows=len(rows.rows),
        tokens=rows.tokens,
        passes=len(groups),
    )


def _collect(
    loaded: Loaded,
    rows: TokenRows,
    groups: Sequence[Sequence[Observer]],
    file: StatisticsFile,
    *,
    batch_tokens: int,
    progress: Progress | None,
) -> None:
    """Run the model over all rows once for each group, and write what the group has seen."""
    import torch

    done = 0
    with torch.inference_mode():
        for group in groups:
            for batch in rows.batches(batch_tokens):
                _observe(loaded, group, batch)
                done += len(batch)
                if progress:
                    progress(done, len(groups) * len(rows.rows))
            for observer in group:
                file.write(observer.results())


def _check(
    collect: Collection[str],
    *,
    samples: int,
    context: int | None,
    batch_tokens: int,
    out: Path,
    force: bool,
) -> None:
    strange = next((kind for kind in collect if kind not in KINDS), None)
    if strange is not None or not collect:
        fact = f"{strange!r} is no kind of statistics" if collect else "names no statistics"
        raise RecipeError("--collect", fact, f"there are {', '.join(KINDS)}")
    if samples < 1:
        raise RecipeError(f"--samples {samples}", "is below 1", "128 is usual")
    if context is not None and context < 2:  # noqa: PLR2004 - one token has no neighbour
        raise RecipeError(f"--context {context}", "is below 2", "512 is usual")
    if batch_tokens < 1:
        raise RecipeError(f"--batch-tokens {batch_tokens}", "is below 1", "4096 is usual")
    if out.suffix != ".safetensors":
        raise RecipeError(out, "does not end in .safetensors", "name a file, not a directory")
    if out.exists() and not force:
        raise RecipeError(out, "exists already", "give --force to replace it")


def _observe(loaded: Loaded, observers: Sequence[Observer], batch: Any) -> None:  # noqa: ANN401
    import torch

    ids_bt = torch.from_numpy(batch).to(loaded.device)
    with ExitStack() as hooks:
        for observer in observers:
            for handle in observer.attach():
                hooks.callback(handle.remove)
        try:
            loaded.model(input_ids=ids_bt, use_cache=False)
        except (RuntimeError, ValueError, IndexError) as error:
            fact = f"the forward pass fails ({type(error).__name__}: {str(error)[:200]})"
            raise TrainError(loaded.path, fact, "lower --batch-tokens or --context") from error
    for observer in observers:
        observer.end_of_batch()
