"""Transfers block by block: the numbers of the whole, some layers in memory, states on disk."""

from __future__ import annotations

import gc
import os
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from surgery.errors import PlanError, RecipeError
from surgery.linearize import blocks, shards
from surgery.linearize.transfer import transfer
from surgery.recover import loop
from transferring import ask_of, converted, furthest, transferred, weights

NEAR = 2e-5  # rounding


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("untrained") / "out", "lolcats")


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    """All layers at once."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, transferred(student, out)


@pytest.mark.parametrize("size", [4, 2, pytest.param(1, marks=pytest.mark.slow), 3])
def test_blocks_train_what_the_whole_trains(size, student, whole, tmp_path):
    found = transferred(student, tmp_path / "out", blocks=size)
    assert furthest(tmp_path / "out", whole[0]) < NEAR
    assert found.told["errors"]["after"] == pytest.approx(whole[1].told["errors"]["after"])
    assert found.curve.losses == pytest.approx(whole[1].curve.losses, rel=1e-5)
    assert found.told["parameters_trained"] == whole[1].told["parameters_trained"]


@pytest.mark.slow
def test_blocks_of_a_method_that_trains_projections(tmp_path):
    untrained = converted(tmp_path / "untrained", "gla")
    transferred(untrained, tmp_path / "whole")
    transferred(untrained, tmp_path / "out", blocks=2)
    assert furthest(tmp_path / "out", tmp_path / "whole") < 1e-4


def test_blocks_without_a_linear_layer_only_hand_on(tmp_path):
    untrained = converted(tmp_path / "untrained", "lolcats", keep_softmax="0,1,3")
    transferred(untrained, tmp_path / "whole", held_out=())
    found = transferred(untrained, tmp_path / "out", blocks=1)
    assert set(found.told["layers"]) == {"2"}
    assert furthest(tmp_path / "out", tmp_path / "whole") < NEAR


def test_the_weights_of_other_layers_are_not_in_memory(student, tmp_path):
    """The bytes of all tensors that there are, while blocks of one layer train."""
    layer = sum(4 * t.numel() for name, t in weights(student).items() if "layers.1." in name)
    total = sum(4 * t.numel() for t in weights(student).values())

    def held() -> int:
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.nn.Parameter and not t.is_meta
        }
        return sum(found.values())

    gc.collect()
    before, peaks = held(), {}

    def progress(told):
        peaks[told["block"]] = max(peaks.get(told["block"], 0), held() - before)

    transfer(ask_of(student, tmp_path / "out", blocks=1), progress=progress)
    assert set(peaks) == {0, 1, 2, 3}
    assert all(layer * 0.9 < peaks[n] < layer * 1.1 for n in (1, 2, 3))
    assert peaks[0] < total / 2  # with the embeddings


def test_states_of_one_block_lie_on_disk_and_none_at_the_end(student, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3 * 32 * 128 * 4)
    folder, seen = tmp_path / "out.surgery-run" / "blocks", []

    def progress(_):
        seen.append({path.parent.parent.name for path in folder.glob("*/states/*")})

    transfer(ask_of(student, tmp_path / "out", blocks=1), progress=progress)
    assert [names for names in seen if len(names) > 1] == []
    assert {"0001", "0002", "0003"} == set().union(*seen)
    assert not list(folder.glob("*/states"))


def test_held_out_rows_are_measured_through_the_blocks(student, tmp_path):
    from recovering import RECALL

    wanted = transferred(student, tmp_path / "whole", held_out=(RECALL,))
    found = transferred(student, tmp_path / "out", held_out=(RECALL,), blocks=2)
    assert found.told["measured_on"] == "held-out text"
    for layer, errors in wanted.told["layers"].items():
        assert found.told["layers"][layer] == pytest.approx(errors, rel=1e-4)


# -- interruptions ---------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 8], ids=["first block", "second block"])
def test_a_stopped_run_goes_on_inside_its_block(at, student, whole, tmp_path, monkeypatch):
    real, count = loop.Loop._step, []

    def step(self, number):
        count.append(number)
        if len(count) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, number)

    monkeypatch.setattr(loop.Loop, "_step", step)
    assert transferred(student, tmp_path / "out", blocks=2).out is None
    found = transferred(student, tmp_path / "out", blocks=2)
    assert len(count) == 12  # no step twice
    assert furthest(tmp_path / "out", whole[0]) < NEAR
    assert found.told["errors"]["after"] == pytest.approx(whole[1].told["errors"]["after"])


@pytest.mark.parametrize("at", [0, 2, 5, 9])
def test_a_run_that_died_while_handing_on_goes_on(at, student, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 3 * 32 * 128 * 4)
    real, count = blocks.Blocks.hand_on, []

    class Died(BaseException):
        pass

    def hand_on(self, *given):
        count.append(None)
        if len(count) == at + 1:
            raise Died
        real(self, *given)

    monkeypatch.setattr(blocks.Blocks, "hand_on", hand_on)
    with pytest.raises(Died):
        transferred(student, tmp_path / "out", blocks=1)
    transferred(student, tmp_path / "out", blocks=1)
    assert furthest(tmp_path / "out", whole[0]) < NEAR


# -- what is refused -------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_told_before(student, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(PlanError, match=r"hidden states need .* bytes, and 1 are free"):
        transferred(student, tmp_path / "out", blocks=2)
    assert not list((tmp_path / "out.surgery-run" / "blocks").glob("0*"))


def test_what_states_take_is_told(student, tmp_path):
    said = []
    found = transfer(ask_of(student, tmp_path / "out", blocks=2), remark=said.append)
    assert any("hidden states take" in line for line in said)
    assert found.told["hidden_state_bytes"] == 24 * 32 * 128 * 4  # rows, tokens, width, bytes


def test_a_run_with_other_blocks_is_refused(student, tmp_path):
    transferred(student, tmp_path / "out", blocks=2)
    with pytest.raises(RecipeError, match="--blocks 1"):
        transferred(student, tmp_path / "out", blocks=1)
    assert transferred(student, tmp_path / "out", blocks=1, resume=False).out is not None
