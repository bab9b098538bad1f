"""Checkpoints of a run: whatever happens to them, the run goes on as if nothing had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recover.small_run import ALONE, EVERY, STATE, STEPS, names, save, start, train
from surgery.errors import CheckpointError, RecipeError, TrainError
from surgery.recover.checkpoints import Checkpoints
from surgery.recover.manifest import canonical, digest
from surgery.recover.state import restore, training_state

FILES = ("MANIFEST.json", "state.json", "weights.safetensors", "optimizer.safetensors",
         "random.safetensors")  # fmt: skip
HALF = 9  # a multiple of EVERY in the middle of the run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The series of a run that nothing happened to."""
    return train(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped; copy it."""
    folder = tmp_path_factory.mktemp("half") / "run"
    train(folder, steps=HALF)
    return folder


@pytest.fixture
def half(halfway: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(place: float) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[int(place * (len(raw) - 1))] ^= 1
        path.write_bytes(raw)

    return act


def tear(path: Path) -> None:
    """Lose what was written after the first block, but not the size."""
    raw = path.read_bytes()
    kept = min(4096, len(raw) // 2)
    path.write_bytes(raw[:kept] + bytes(len(raw) - kept))


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def remove(path: Path) -> None:
    path.unlink()


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARM = {
    "empty": empty, "truncated": truncate, "torn": tear, "grown": grow, "missing": remove,
    "a folder": become_folder, "first bit": flip(0), "bit in the middle": flip(0.5),
    "last bit": flip(1),
}  # fmt: skip


def test_a_run_in_two_parts_has_the_series_of_one(half: Path, whole: list[list[Any]]) -> None:
    assert train(half) == whole


def test_the_series_holds_every_verdict(whole: list[list[Any]]) -> None:
    assert {verdict for _, _, verdict in whole} == {"take", "skip", "roll back"}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_file_of_the_newest_is_passed_over(
    name: str, harm: str, half: Path, whole: list[list[Any]]
) -> None:
    HARM[harm](half / f"step-{HALF:08d}" / name)
    told: list[str] = []
    assert train(half, tell=told.append) == whole
    assert f"step-{HALF:08d}.bad" in names(half)
    assert name in told[0]
    assert told[0].endswith(f"now named step-{HALF:08d}.bad")
    assert "is the newest sound checkpoint" in told[1]


def test_without_a_sound_one_the_run_starts_anew_and_tells(
    half: Path, whole: list[list[Any]]
) -> None:
    for folder in half.glob("step-*"):
        truncate(folder / "weights.safetensors")
    told: list[str] = []
    assert train(half, tell=told.append) == whole
    assert told[-1] == f"{half}: holds no sound checkpoint; the run starts anew"


def test_a_flipped_bit_anywhere_in_a_manifest_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 1).close()
    path = tmp_path / "step-00000001" / "MANIFEST.json"
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.load_newest() is None
        (tmp_path / "step-00000001.bad").rename(tmp_path / "step-00000001")


def test_a_second_bad_one_of_a_step_takes_another_name(tmp_path: Path) -> None:
    for _ in range(2):
        with save(tmp_path, 1) as checkpoints:
            remove(tmp_path / "step-00000001" / "state.json")
            assert checkpoints.load_newest() is None
    assert {"step-00000001.bad", "step-00000001.bad2"} <= set(names(tmp_path))


def test_a_checkpoint_under_anothers_name_is_no_checkpoint(tmp_path: Path) -> None:
    with save(tmp_path, 1) as checkpoints:
        shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000007")
        found = checkpoints.load_newest()
        assert found
        assert found[0] == 1
        assert "holds step 1" in checkpoints.notes[0]


def test_what_was_being_written_is_ignored_and_swept(half: Path, whole: list[list[Any]]) -> None:
    shutil.copytree(half / f"step-{HALF:08d}", half / "step-00000999.tmp")
    assert train(half) == whole
    assert not list(half.glob("*.tmp"))


def test_latest_names_the_newest_but_is_not_trusted(half: Path, whole: list[list[Any]]) -> None:
    assert (half / "LATEST").read_text() == f"step-{HALF:08d}\n"
    (half / "LATEST").write_text("step-00000777\n")
    assert train(half) == whole
    assert (half / "LATEST").read_text() == f"step-{STEPS:08d}\n"


def test_a_state_comes_back_bit_by_bit(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16().t(), "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4), "bytes": torch.arange(7, dtype=torch.uint8),
        "flags": torch.tensor([True, False]), "long": torch.tensor([2**62]),
    }  # fmt: skip
    facts = {"progress": {"nan": float("nan"), "third": 1 / 3}, "nothing": {}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"weights": tensors, **facts}, tokens=77)
        found = checkpoints.load_newest()
    assert found
    step, saved = found
    state = saved.state()
    assert (step, repr(state["progress"]), state["nothing"]) == (5, repr(facts["progress"]), {})
    for name, tensor in tensors.items():
        assert state["weights"][name].dtype == tensor.dtype
        assert torch.equal(state["weights"][name], tensor)


def test_the_manifest_tells_what_is_there(tmp_path: Path) -> None:
    Checkpoints(tmp_path, settings={"lr": 0.5}).save(5, STATE, tokens=77, score=1.5)
    told = json.loads((tmp_path / "step-00000005" / "MANIFEST.json").read_bytes())
    assert (told["step"], told["tokens"], told["score"]) == (5, 77, 1.5)
    assert told["settings_digest"] == digest({"lr": 0.5})
    assert set(told["versions"]) == {"surgery", "torch", "python"}
    assert set(told["files"]) == {"weights.safetensors", "state.json"}


def test_the_last_ones_stay(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, keep=2).close()
    assert names(tmp_path) == ["LATEST", "lock", "step-00000003", "step-00000004"]


def test_the_best_stays_and_is_found(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep=1, keep_best=True) as checkpoints:
        for step, score in enumerate((3.0, 1.0, 2.0, None)):
            checkpoints.save(step, STATE, score=score)
        assert [n for n in names(tmp_path) if n[0] == "s"] == ["step-00000001", "step-00000003"]
        best = checkpoints.load_best()
        assert best
        assert best[0] == 1


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    with save(tmp_path, 3) as checkpoints:
        checkpoints.save(3, {"progress": "again"})
        found = checkpoints.load_newest()
    assert found
    assert found[1].state() == {"progress": "again"}
    assert names(tmp_path) == ["LATEST", "lock", "step-00000003"]


def test_a_run_that_starts_anew_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    with save(tmp_path, 3, 6) as checkpoints:
        checkpoints.forget(after=-1)
        checkpoints.save(0, STATE)
        found = checkpoints.load_newest()
        assert found
        assert found[0] == 0


def test_a_limit_asks_for_an_earlier_one(tmp_path: Path) -> None:
    with save(tmp_path, 3, 6, keep=2) as checkpoints:
        found = checkpoints.load_newest(limit=5)
        assert found
        assert found[0] == 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lr": 0.1, "losses": {"kl": 1}}, "--lr 0.1: the run in .* was started with 0.2"),
        ({"lr": 0.2, "losses": {"ce": 1}}, '--losses {"ce":1}: .* was started with {"kl":1}'),
        ({"lr": 0.2}, r'--losses \(not given\): .* started with {"kl":1}'),
        ({"lr": 0.2, "losses": {"kl": 1}, "batch_tokens": 8}, "--batch-tokens 8: .*not given"),
    ],
)
def test_other_settings_are_refused_by_the_name_of_the_option(
    given: dict[str, Any], told: str, tmp_path: Path
) -> None:
    save(tmp_path, 1, settings={"lr": 0.2, "losses": {"kl": 1}}).close()
    checkpoints = Checkpoints(tmp_path, settings=given)
    with pytest.raises(RecipeError, match=told + ".*; give the same again"):
        checkpoints.load_newest()
    assert "step-00000001" in names(tmp_path)
    checkpoints.close()


def test_a_later_format_is_not_taken_for_damage(tmp_path: Path) -> None:
    save(tmp_path, 1).close()
    path = tmp_path / "step-00000001" / "MANIFEST.json"
    told = json.loads(path.read_bytes()) | {"format": 2}
    del told["digest"]
    path.write_bytes(canonical({**told, "digest": digest(told)}))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(CheckpointError, match="update"):
        checkpoints.load_newest()
    assert "step-00000001" in names(tmp_path)


def test_none_kept_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--keep 0: is below 1"):
        Checkpoints(tmp_path, keep=0)


def test_only_what_trains_is_saved(half: Path) -> None:
    saved = Checkpoints(half).load_newest()
    assert saved
    model, _ = start()
    wanted = set(dict(model.named_parameters()))
    assert set(saved[1].tensors["weights"]) == wanted
    assert {name.partition("/")[0] for name in saved[1].tensors["optimizer"]} == wanted


def test_no_file_is_a_pickle(half: Path) -> None:
    for path in half.glob("step-*/*"):
        assert path.suffix in {".safetensors", ".json"}


def test_going_back_keeps_the_random_numbers(half: Path) -> None:
    model, optimizers = start()
    with Checkpoints(half) as checkpoints:
        found = checkpoints.load_newest()
        assert found
        before = torch.get_rng_state()
        restore(found[1], dict(model.named_parameters()), optimizers, ALONE, chance=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_parameter_without_a_gradient_gets_no_moments_on_resume(tmp_path: Path) -> None:
    model, optimizers = start()
    model[0](torch.ones(2, 6)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, training_state(dict(model.named_parameters()), optimizers, ALONE))
        found = checkpoints.load_newest()
        assert found
        again, others = start()
        restore(found[1], dict(again.named_parameters()), others, ALONE)
    assert [len(o.state) for o in others] == [len(o.state) for o in optimizers] == [1, 1]


class TestMisfits:
    """States that are not the run's."""

    def given(self, tmp_path: Path) -> tuple[Any, dict[str, Any], list[torch.optim.Optimizer]]:
        train(tmp_path, steps=EVERY)
        found = Checkpoints(tmp_path).load_newest()
        assert found
        model, optimizers = start()
        return found[1], dict(model.named_parameters()), optimizers

    def test_another_shape(self, tmp_path: Path) -> None:
        saved, parameters, _ = self.given(tmp_path)
        parameters["0.bias"] = torch.nn.Parameter(torch.zeros(9))
        sgd = torch.optim.SGD(parameters.values())
        with pytest.raises(CheckpointError, match=r"'0.bias/exp_avg', which the optimiser"):
            restore(saved, parameters, [sgd], ALONE)
        with pytest.raises(CheckpointError, match=r"'0.bias' as F32 \[7\], .* needs F32 \[9\]"):
            saved.fill("weights", "0.bias", parameters["0.bias"].detach())

    def test_one_that_the_run_does_not_train(self, tmp_path: Path) -> None:
        saved, parameters, optimizers = self.given(tmp_path)
        del parameters["0.bias"]
        with pytest.raises(CheckpointError, match=r"holds '0.bias', which the run does not train"):
            restore(saved, parameters, optimizers, ALONE)

    def test_one_that_was_not_saved(self, tmp_path: Path) -> None:
        saved, parameters, optimizers = self.given(tmp_path)
        parameters["new"] = torch.nn.Parameter(torch.zeros(1))
        with pytest.raises(CheckpointError, match=r"has no 'new', which the run trains"):
            restore(saved, parameters, optimizers, ALONE)

    def test_an_optimiser_of_something_else(self, tmp_path: Path) -> None:
        _, parameters, _ = self.given(tmp_path)
        strange = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        strange.param_groups[0]["params"][0].grad = torch.ones(2)
        strange.step()
        with pytest.raises(TrainError, match="trains a parameter that the run does not name"):
            training_state(parameters, [strange], ALONE)


@pytest.mark.slow
def test_runs_killed_anywhere_go_on_with_the_same_series(
    tmp_path: Path, whole: list[list[Any]]
) -> None:
    script = Path(__file__).with_name("small_run.py")
    command = [sys.executable, str(script), str(tmp_path), "40"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, env=env, stdout=subprocess.PIPE)
    told = json.loads((tmp_path / "told.json").read_text())
    assert sum(run.get("died") == -signal.SIGKILL for run in told.values()) >= 40
    assert {name for name, run in told.items() if run["series"] != whole} == set()
