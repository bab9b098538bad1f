"""What the generator of a step tells of its tensor, and what its passes fold."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from operator import add
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from cli.report import figures
from surgery.apply import apply
from surgery.checkpoint import open_checkpoint
from surgery.errors import StepError
from surgery.method import Place, Tensor, merge
from surgery.passes import Each, Passes, merge_step
from surgery.plan import Plan, Tell, TensorSpec, check_plan
from surgery.run import dry_digests, planned_record, run
from surgery.verify import verify

COLUMNS = 129


@merge(source="none", rows=True, tells=("mean", "never"))
def centred(model: Tensor) -> Passes:
    """Subtract each column's mean, and tell the mean of all."""
    rows = model.shape[0]
    (sums,) = yield Each(lambda x: x.models[0].double().sum(0), fold=add)
    yield Tell(mean=sums.sum() / model.numel())
    return lambda x: x.models[0] - (sums / rows).to(x.models[0].dtype)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    held = {
        f"model.layers.{n}.w": torch.randn(rows, COLUMNS, generator=generator).bfloat16()
        for n, rows in enumerate((3, 9000, 700))
    }
    save_file(held, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def planned(file: Path, *, bare: bool = True) -> Plan:
    source = open_checkpoint(file)
    steps = [
        merge_step(
            centred,
            name=name,
            spec=TensorSpec("BF16", tensor.shape),
            base=None,
            models=[tensor],
            values={},
            place=Place(name=name),
        )
        for name, tensor in source.tensors.items()
    ]
    return Plan(
        operation="centre",
        parameters={},
        sources=(source,),
        steps=tuple(steps),
        order=tuple(source.tensors),
        config=None if bare else {},
    )


def means(file: Path) -> dict[str, dict[str, float]]:
    return {
        n: {"mean": pytest.approx(float(t.double().mean()))} for n, t in load_file(file).items()
    }


@pytest.mark.parametrize("bare", [True, False])
def test_the_record_holds_what_steps_tell(file: Path, tmp_path: Path, bare: bool) -> None:
    out = tmp_path / ("out.safetensors" if bare else "out")
    report = run(planned(file, bare=bare), out)
    assert report.record["told"] == means(file)
    assert dry_digests(planned(file, bare=bare))["told"] == report.record["told"]
    problems = [c.problems for c in verify(open_checkpoint(out), load=False) if c.name == "record"]
    assert problems == [()]


def test_a_plan_in_which_nothing_tells_records_nothing_told(tmp_path: Path) -> None:
    base = tiny.write(tmp_path / "base")
    assert "told" not in run(tiny.stacked(base), tmp_path / "out").record


def test_figures_do_not_move_what_is_planned_of_a_bare_file(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    run(planned(file), out)
    with safe_open(out, "pt") as found:
        record = json.loads(found.metadata()["surgery"])
    assert planned_record(planned(file))["headers"] == record["headers"]


def test_a_resumed_run_tells_what_the_first_had_told(file: Path, tmp_path: Path) -> None:
    plan = planned(file)

    def fails() -> Passes:
        raise StepError("disk", "broke")
        yield

    last = plan.steps[-1]
    broken = replace(plan, steps=(*plan.steps[:-1], replace(last, fn=fails)))
    with pytest.raises(StepError):
        run(broken, tmp_path / "out.safetensors", workers=1)
    report = run(plan, tmp_path / "out.safetensors")
    assert report.reused
    assert report.record["told"] == means(file)


@pytest.mark.parametrize("workers", [2, 4])
def test_a_fold_goes_in_the_order_of_the_parts(file: Path, tmp_path: Path, workers: int) -> None:
    run(planned(file), tmp_path / "one.safetensors", workers=1)
    run(planned(file), tmp_path / "many.safetensors", workers=workers)
    assert tiny.tree(tmp_path / "one.safetensors") == tiny.tree(tmp_path / "many.safetensors")
    held = load_file(file)
    for name, merged in load_file(tmp_path / "one.safetensors").items():
        assert torch.equal(merged, apply(centred, [held[name]]).bfloat16())
        assert torch.allclose(
            merged.double(), held[name].double() - held[name].double().mean(0), rtol=2**-8
        )


def test_a_figure_that_was_not_declared_is_a_fault(file: Path, tmp_path: Path) -> None:
    plan = check_plan(planned(file))
    steps = tuple(replace(step, tells=()) for step in plan.steps)
    with pytest.raises(AssertionError, match="untold"):
        run(replace(plan, steps=steps), tmp_path / "out.safetensors")


def test_figures_are_summed_up_in_a_line() -> None:
    told = {"a": {"t": 0.5, "u": 1}, "b": {"t": -1.25, "u": 1}, "c": {"t": 3.0, "one_more": 1.0}}
    assert list(figures(told)) == [
        "t: median 0.5 of 3 tensors, -1.25 (b) to 3 (c)",
        "u: 1 in each of 2 tensors",
        "one more: 1 (c)",
    ]


def test_a_prediction_worse_than_none_is_said() -> None:
    told = {"a": {"explained": -0.25}, "b": {"explained": 0.5}}
    assert list(figures(told))[1:] == [
        "explained below 0 in 1 of 2: there the prediction is worse than a guess of zero"
    ]
    assert len(list(figures({"b": {"explained": 0.5}}))) == 1
