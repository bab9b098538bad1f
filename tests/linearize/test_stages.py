"""The stages of a linearization: skipped where they are done, gone on with, put together."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery.checkpoint import open_checkpoint
from surgery.evaluate import evaluate
from surgery.linearize.ask import Ask, Training, parse_stages
from surgery.linearize.compared import ablated
from surgery.linearize.published import RECIPES
from surgery.linearize.stages import Watch, linearize_in_stages
from surgery.provenance import read_record
from surgery.recover.sources import Source

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, TEXT, RECALL = (
    FIXTURES / "base",
    *(FIXTURES / "heldout" / f"{name}.jsonl" for name in ("mix", "recall")),
)
QUICK = Training(
    tokens=512, transfer_tokens=512, kd_tokens=512, context=64, batch_tokens=128,
    lr=1e-3, transfer_lr=1e-3, kd_lr=1e-3,
)  # fmt: skip


def ask_of(out: Path, *stages: str, method: str = "lolcats", **more) -> Ask:
    fields = {"data": (Source(TEXT),) if stages else (), "training": QUICK}
    window = {} if method in {"hedgehog", "t2r", "gla", "gated-delta"} else {"window": 16}
    asked = {**fields, "options": window, **more}
    return Ask(model=str(BASE), out=out, method=method, stages=stages, **asked)


def done(ask: Ask, *, force: bool = False) -> list[str]:
    """Run an ask to its end; return what was not skipped."""
    heard: list[str] = []
    found = linearize_in_stages(ask, force=force, watch=Watch(stage=heard.append))
    assert found.out == ask.out
    return heard


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def facts(out: Path) -> dict:
    return (read_record(open_checkpoint(out)) or {})["facts"]


def bits(model: Path) -> float:
    return evaluate([model], [RECALL], context=64).models[0].overall.bits_per_byte or 0.0


def test_what_is_done_is_not_done_again(tmp_path) -> None:
    ask = ask_of(tmp_path / "out", "transfer", "lora", keep_stages=True)
    assert done(ask) == ["converted", "transfer", "lora", "written"]
    first = tensors(ask.out)
    assert done(ask, force=True) == ["written"]
    again = tensors(ask.out)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_later_stage_that_changes_leaves_the_earlier_ones(tmp_path) -> None:
    ask = ask_of(tmp_path / "out", "transfer", "lora", keep_stages=True)
    done(ask)
    longer = replace(ask, training=replace(QUICK, tokens=1024))
    assert done(longer, force=True) == ["lora", "written"]


def test_a_change_of_the_method_does_all_of_it_again(tmp_path) -> None:
    ask = ask_of(tmp_path / "out", "transfer", keep_stages=True)
    done(ask)
    wider = replace(ask, options={"window": 32})
    assert done(wider, force=True) == ["converted", "transfer", "written"]
    assert json.loads((ask.out / "config.json").read_text())["mixer"]["window"] == 32


def test_models_between_the_stages_are_removed(tmp_path) -> None:
    ask = ask_of(tmp_path / "out", "transfer", "lora")
    done(ask)
    left = {path.name for path in ask.folder.iterdir() if path.suffix != ".json"}
    runs = {"transfer.surgery-run", "lora.surgery-run"}
    assert left == {"lock", "changed.safetensors", *runs}


def test_an_interrupted_stage_goes_on_and_ends_as_if_nothing_had_been(tmp_path) -> None:
    whole = ask_of(tmp_path / "whole", "transfer", "lora")
    done(whole)
    ask = ask_of(tmp_path / "out", "transfer", "lora")
    stops = []

    def stop(told) -> None:
        if told["step"] == 1 and len(stops) < 2:
            stops.append(told["step"])
            os.kill(os.getpid(), signal.SIGTERM)

    first = linearize_in_stages(ask, watch=Watch(training=stop))
    assert (first.out, first.stopped) == (None, "transfer")
    second = linearize_in_stages(ask, watch=Watch(training=stop))
    assert (second.out, second.stopped) == (None, "lora")
    assert linearize_in_stages(ask, watch=Watch(training=stop)).out == ask.out
    one, other = tensors(whole.out), tensors(ask.out)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_layers_that_cost_most_get_their_attention_back(tmp_path) -> None:
    ask = ask_of(tmp_path / "out", "transfer", "lora", keep_softmax="kl:2", held_out=(RECALL,))
    done(ask)
    told = facts(ask.out)
    kept = told["chosen"]["layers"]
    assert len(kept) == 2
    config = json.loads((ask.out / "config.json").read_text())
    assert config["linear_layers"] == [n for n in range(4) if n not in kept]
    mixers = {int(n.split(".")[2]) for n in tensors(ask.out) if ".mixer." in n}
    assert mixers == set(config["linear_layers"])
    rows = {row["name"]: row["bits_per_byte"] for row in told["table"]["rows"]}
    assert rows["swa-sink"] < bits_of_swa(tmp_path)


def bits_of_swa(tmp_path: Path) -> float:
    """Of a window in every layer."""
    ask = ask_of(tmp_path / "swa", method="swa-sink", held_out=(RECALL,))
    done(ask)
    rows = {row["name"]: row["bits_per_byte"] for row in facts(ask.out)["table"]["rows"]}
    assert set(rows) == {"teacher", "swa-sink"}
    return rows["swa-sink"]


def test_distillation_brings_the_model_nearer_to_its_teacher(tmp_path) -> None:
    training = replace(QUICK, kd_tokens=4096)
    ask = ask_of(
        tmp_path / "out", "transfer", "kd", method="hedgehog", training=training, held_out=(RECALL,)
    )
    done(ask)
    rows = {row["name"]: row for row in facts(ask.out)["table"]["rows"]}
    assert rows["kd"]["kl"] < rows["transfer"]["kl"] < rows["untrained"]["kl"]
    assert facts(ask.out)["stages"][1]["settings"]["losses"] == {"kl": 1.0}


@pytest.mark.parametrize("method", ["lolcats", "liger", "based", "lizard"])
def test_a_model_without_its_linear_branch_is_another(method, tmp_path) -> None:
    ask = ask_of(tmp_path / "out", method=method)
    done(ask)
    with ablated(ask.out, tmp_path) as without:
        assert without is not None
        assert bits(without) != pytest.approx(bits(ask.out), abs=1e-6)
        assert tensors(without).keys() == tensors(ask.out).keys()


@pytest.mark.parametrize("method", ["hedgehog", "swa-sink"])
def test_what_has_no_second_branch_is_not_ablated(method, tmp_path) -> None:
    ask = ask_of(tmp_path / "out", method=method)
    done(ask)
    with ablated(ask.out, tmp_path) as without:
        assert without is None


@pytest.mark.parametrize("method", list(RECIPES))
def test_every_method_has_a_recipe_and_default_stages(method) -> None:
    assert parse_stages(None, method) == RECIPES[method].stages
    assert RECIPES[method].source


def test_every_method_that_can_be_asked_for_is_known() -> None:
    from surgery.linearize.methods import METHODS

    assert set(RECIPES) == set(METHODS)
