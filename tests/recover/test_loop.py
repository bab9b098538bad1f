"""What a step computes: batches, weights of losses, skips, ways back, the same series always."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from recovering import BASE, TEXT, ask_of, figures, losses, recovered
from surgery.errors import StepError, TrainError
from surgery.recover.batch import Batch
from surgery.recover.distributed import World
from surgery.recover.figures import Figures
from surgery.recover.interrupts import Asked
from surgery.recover.loop import Loop
from surgery.recover.session import Session, opened
from surgery.recover.sources import Source

ALONE = World(0, 1, torch.device("cpu"))


def close(one: list[float], other: list[float], within: float) -> bool:
    return len(one) == len(other) and float(np.abs(np.subtract(one, other)).max()) < within


@pytest.mark.parametrize("taught", [pytest.param(False, marks=pytest.mark.slow), True])
def test_losses_do_not_depend_on_how_much_is_fed_at_once(taught, student, tmp_path) -> None:
    teacher = {"teacher": str(BASE)} if taught else {}
    found = []
    for micro in (64, 192, 4096):
        out = tmp_path / f"{micro}"
        recovered(student("pruned"), out, micro_tokens=micro, tokens=4 * 256, **teacher)
        found.append(losses(out))
    assert all(close(found[0], other, 1e-5) for other in found[1:])


def first_step(student: Path, out: Path, act, **options) -> None:
    """Open a run and let `act` look at it."""
    with opened(ask_of(student, out, **options), ALONE) as session:
        act(Loop(session, Asked()), session)


@pytest.mark.parametrize("micro", [64, 128, 192])
def test_gradients_add_up_to_those_of_the_whole_batch(micro, student, tmp_path) -> None:
    """The mean over the tokens of the step, however documents fill the batches."""
    ragged = tmp_path / "ragged.jsonl"
    texts = [json.loads(line)["text"] for line in TEXT.read_text().splitlines()]
    ragged.write_text(
        "".join(json.dumps({"text": t[: 20 + 9 * n]}) + "\n" for n, t in enumerate(texts))
    )

    def act(loop: Loop, session: Session) -> None:
        batch = Batch.of(session.rows, range(4), ALONE.device)
        logits = session.loaded.model(**batch.inputs(session.loaded.model)).logits
        whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets)
        whole.backward()
        wanted = {n: p.grad.clone() for n, p in session.trainable.parameters.items()}
        loop.optimisers.zero()
        taken = {}
        loop._take = lambda ps, norm: taken.update(
            {n: p.grad.clone() for n, p in session.trainable.parameters.items()}
        )
        told = loop._step(0)
        assert told["loss"] == pytest.approx(whole.item(), abs=1e-6)
        assert all(torch.allclose(taken[n], wanted[n], atol=1e-6, rtol=1e-4) for n in wanted)
        norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
        assert told["gradient_norm"] == pytest.approx(norm, rel=1e-5)

    options = {"train": "full", "micro_tokens": micro, "data": (Source(ragged),)}
    first_step(student("pruned"), tmp_path / "out", act, **options)


def test_the_first_loss_is_that_of_the_student_alone(student, tmp_path) -> None:
    """Rows are scored one document at a time by transformers itself."""

    def act(loop: Loop, session: Session) -> None:
        total, count = 0.0, 0
        for index in range(4):
            row = session.rows.row(index)
            starts = [*np.flatnonzero(row.positions == 0).tolist(), len(row.ids)]
            for first, last in pairwise(starts):
                ids = torch.from_numpy(row.ids[first:last])[None]
                targets = torch.from_numpy(row.targets[first:last])
                with torch.no_grad():
                    logits = session.loaded.model(input_ids=ids).logits[0]
                nats = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
                total, count = total + float(nats), count + int((targets >= 0).sum())
        assert loop._step(0)["loss"] == pytest.approx(total / count, abs=1e-5)

    first_step(student("pruned"), tmp_path / "out", act)


def test_large_gradients_are_clipped_to_the_bound(student, tmp_path) -> None:
    def act(loop: Loop, session: Session) -> None:
        seen = []
        loop.optimisers.step = lambda: seen.extend(
            p.grad for p in session.trainable.parameters.values()
        )
        told = loop._step(0)
        assert told["gradient_norm"] > 0.01
        assert math.sqrt(sum(float(g.square().sum()) for g in seen)) == pytest.approx(
            0.01, rel=1e-3
        )

    first_step(student("pruned"), tmp_path / "out", act, clip=0.01, train="full")


def poisoned(monkeypatch, bad: dict[int, float]) -> None:
    """Let the objective give a loss that is no number, or far too large, at some steps."""
    real = Loop._backward
    told = Loop._step

    def step(self, number):
        self.poison = bad.get(number)
        return told(self, number)

    def backward(self, batch, tokens):
        sums = real(self, batch, tokens)
        return sums if self.poison is None else {**sums, "loss": self.poison * tokens}

    monkeypatch.setattr(Loop, "_step", step)
    monkeypatch.setattr(Loop, "_backward", backward)


def test_a_step_out_of_bounds_is_skipped_and_counted(student, tmp_path, monkeypatch) -> None:
    poisoned(monkeypatch, {3: math.nan, 5: math.inf})
    found = recovered(student("pruned"), tmp_path / "out")
    verdicts = [one["verdict"] for one in figures(tmp_path / "out")]
    assert [n for n, verdict in enumerate(verdicts) if verdict == "skip"] == [3, 5]
    assert found.curve.skipped == found.told["steps_skipped"] == 2
    assert [loss for _, loss in found.told["losses"]][3:6:2] == [None, None]
    json.loads((tmp_path / "out" / "surgery.json").read_text(), parse_constant=pytest.fail)


def test_a_run_goes_back_to_good_weights_and_on_with_the_data(
    student, tmp_path, monkeypatch
) -> None:
    """Every weight is spoilt where nothing was saved; after going back the loss is as before."""
    poisoned(monkeypatch, dict.fromkeys(range(4, 9), math.nan))
    real = Loop._step

    def step(self, number):
        if number == 4:
            with torch.no_grad():
                for parameter in self.session.trainable.parameters.values():
                    parameter.mul_(50)
        return real(self, number)

    monkeypatch.setattr(Loop, "_step", step)
    recovered(student("pruned"), tmp_path / "out", tokens=12 * 256, save_steps=4, train="norms")
    told = figures(tmp_path / "out")
    assert [one["verdict"] for one in told][4:9] == ["skip"] * 4 + ["roll back"]
    assert max(one["loss"] for one in told[9:]) < 2 * told[0]["loss"]


def test_a_run_that_cannot_go_on_ends_in_a_sentence(student, tmp_path, monkeypatch) -> None:
    poisoned(monkeypatch, dict.fromkeys(range(100), math.nan))
    with pytest.raises(TrainError, match="no step can be taken"):
        recovered(student("pruned"), tmp_path / "out", tokens=12 * 256)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "muon", "train": "full"},
        {"checkpointing": True},
        pytest.param({"precision": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"lora_init": "pissa"}, marks=pytest.mark.slow),
        {"lora_init": "eva"},
        pytest.param({"schedule": "rex"}, marks=pytest.mark.slow),
    ],
)
def test_options_train_and_write(options, student, tmp_path) -> None:
    found = recovered(student("pruned"), tmp_path / "out", held_out=(TEXT,), **options)
    assert found.curve.after < found.curve.before


def test_recomputing_layers_changes_no_loss(student, tmp_path) -> None:
    for name, checkpointing in (("plain", False), ("again", True)):
        recovered(student("pruned"), tmp_path / name, checkpointing=checkpointing)
    assert close(losses(tmp_path / "plain"), losses(tmp_path / "again"), 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of what it looks at
def test_compiling_layers_changes_no_loss(student, tmp_path) -> None:
    for name, compiled in (("plain", False), ("fast", True)):
        recovered(student("pruned"), tmp_path / name, compile=compiled)
    assert close(losses(tmp_path / "plain"), losses(tmp_path / "fast"), 1e-4)


def test_replayed_rows_are_among_the_others(student, tmp_path) -> None:
    replay = (Source(TEXT.with_name("recall.jsonl")),)
    found = recovered(student("pruned"), tmp_path / "out", replay=replay)
    files = [Path(file["path"]).name for file in found.told["data"]["files"]]
    assert files == ["mix.jsonl", "recall.jsonl"]


def test_an_output_that_computes_something_else_is_told(student, tmp_path, monkeypatch) -> None:
    from surgery.recover import run

    real = run._cost
    calls = []

    def cost(*args, **more):
        calls.append(1)
        return real(*args, **more) + 0.5 * (len(calls) > 1)

    monkeypatch.setattr(run, "_cost", cost)
    with pytest.raises(TrainError, match="on rows where the trained model has"):
        recovered(student("pruned"), tmp_path / "out")


def test_figures_are_cut_whole_and_torn_lines_dropped(tmp_path) -> None:
    figures = Figures(tmp_path)
    for step, loss in enumerate([1.0, math.nan, 3.0]):
        figures.add({"step": step, "loss": loss})
    figures.path.write_text(figures.path.read_text() + '{"step": 3, "lo')
    assert np.array_equal(figures.cut(9), [1.0, math.nan, 3.0], equal_nan=True)
    assert np.array_equal(figures.cut(2), [1.0, math.nan], equal_nan=True)
    assert len(figures.path.read_text().splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_figures_on_a_full_disk_are_a_sentence() -> None:
    figures = Figures(Path("/dev"))
    figures.path = Path("/dev/full")
    with pytest.raises(StepError, match="free some space"):
        figures.add({"step": 0, "loss": 1.0})
