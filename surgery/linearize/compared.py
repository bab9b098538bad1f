"""What a linearized model is measured beside: the models of the table that nobody keeps."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.disk import io_errors
from surgery.linearize.convert import linearize
from surgery.linearize.methods import METHODS
from surgery.linearize.table import ABLATED, BASELINE, UNTRAINED, Held, Row, measure
from surgery.run import run

if TYPE_CHECKING:
    from surgery.evaluate.pairs import Progress

CONFIG = "config.json"


def compared(
    base: Checkpoint,
    models: Mapping[str, Path],
    last: Path,
    asked: Mapping[str, Any],
    held: Held,
    *,
    progress: "Progress | None" = None,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> tuple[Row, ...]:
    """Measure the base, a window with sinks, the untrained model, its stages, and an ablation.

    Args:
        models: the untrained model and what each stage made, by name.
        last: that whose linear branch is left out.
        asked: what `linearize` was given beside the base.
        limits: of `run`.
    """
    with TemporaryDirectory(prefix="measured-", dir=last.parent) as scratch:
        rows = {BASELINE: Path(scratch) / BASELINE} if asked["method"] != BASELINE else {}
        for place in rows.values():
            run(baseline(base, asked), place, **limits)
        rows |= models
        if asked["method"] == BASELINE:
            rows = {BASELINE if n == UNTRAINED else n: place for n, place in rows.items()}
        with ablated(last, Path(scratch)) as without:
            if without is not None:
                rows[ABLATED] = without
            return measure(base.ref, rows, held, progress=progress)


def baseline(base: Checkpoint, asked: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a plan
    """Plan the window with sinks that takes no training: as wide, in the same layers.

    Methods without a window are measured beside that of its defaults.
    """
    own, sinks = METHODS[BASELINE].defaults, asked.get("sinks")
    window = asked.get("window") or METHODS[asked["method"]].defaults.get("window")
    window = window or own["window"]
    more = {"window": window, "sinks": min(own["sinks"] if sinks is None else sinks, window - 1)}
    kept = {name: asked[name] for name in ("keep_softmax", "sliding", "seed") if name in asked}
    return linearize(base, method=BASELINE, **kept, **more)


@contextmanager
def ablated(model: Path, scratch: Path) -> Iterator[Path | None]:
    """Give the same model without its linear branch; None where nothing would be left."""
    config = json.loads((model / CONFIG).read_text())
    mixer = config["mixer"]
    if not mixer["window"] or mixer["method"] == BASELINE:
        yield None
        return
    place = scratch / "without-linear-branch"
    with io_errors(place):
        shutil.copytree(model, place, copy_function=_link)
        (place / CONFIG).unlink()
        without = {**config, "mixer": {**mixer, "linear_branch": False}}
        (place / CONFIG).write_text(json.dumps(without))
    yield place


def _link(source: str, place: str) -> None:
    """Give a file a second name; a copy where the disk has none."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
