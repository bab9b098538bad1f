"""The same from Python."""

from pathlib import Path

import pytest

from engine import tiny
from growth.prune import prune
from growth.stack import stack
from surgery.checkpoint import open_checkpoint
from surgery.errors import RecipeError
from surgery.pipeline import Pipeline


def count(paths: list[Path], *, extra: int = 0) -> dict[str, int]:
    """Tensors of models: a measurement."""
    calls.append(len(paths))
    return {Path(p).name: len(open_checkpoint(p).tensors) + extra for p in paths}


calls: list[int] = []


def build(*, layers: str = "0", extra: int = 0) -> list[str]:
    with Pipeline("out") as made:
        deep = made.make("deep", stack, "a", factor=2)
        flat = made.make("flat", prune, deep, layers=layers)
        found = made.measure("tensors", count, ["a", deep, flat], extra=extra)
    assert found["deep"] == len(open_checkpoint("out/deep").tensors) + extra
    return [one.state for one in made.outcomes]


def test_each_step_runs_once_and_again_when_something_changed(here: Path) -> None:
    assert build() == ["made", "made", "measured"]
    assert build() == ["skipped"] * 3
    assert build(layers="1") == ["skipped", "made", "measured"]
    assert build(layers="1", extra=1) == ["skipped", "skipped", "measured"]


def test_a_measured_model_that_came_out_as_before_is_not_measured_again(here: Path) -> None:
    build()
    for name in ("deep", "flat"):
        Path("out", name).rename(name)
    assert build() == ["made", "made", "skipped"]


def test_the_output_is_the_operations(here: Path) -> None:
    from surgery.run import run

    build()
    run(stack(open_checkpoint("a"), factor=2), Path("by hand"))
    assert tiny.tree(Path("out/deep")) == tiny.tree(Path("by hand"))


def test_a_name_is_given_once(here: Path) -> None:
    with Pipeline("out") as made:
        made.make("deep", stack, "a", factor=2)
        with pytest.raises(RecipeError, match="name of an earlier step"):
            made.make("deep", stack, "a", factor=3)
