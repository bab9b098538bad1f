"""Other commands on a linearized model: looked at, checked, grown, trained further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cli.main import main
from growth.stack import stack
from healing import LOADING, heal, load, logits, tensors
from surgery.anatomy import anatomy
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.layers.rules import told_layers
from surgery.linearize.convert import linearize
from surgery.reproduce import Operation, reproduce
from surgery.run import run
from surgery.survey import survey

ATOL = 1e-5


@pytest.fixture(scope="module")
def converted(structure, tmp_path_factory):
    """A linearized directory by structure and method, layer 3 kept, written once."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, method: str = "lizard") -> Path:
        if (name, method) not in made:
            base = open_checkpoint(structure(name))
            plan = linearize(base, method=method, keep_softmax="3", sliding="convert")
            made[name, method] = run(plan, tmp_path_factory.mktemp("known") / "out").out
        return made[name, method]

    return get


def test_inspect_tells_linear_layers(converted):
    found = survey(open_checkpoint(converted("llama")), kinds=told_layers)
    assert found.layers.pattern == "0-2 linear_attention, 3 full_attention"


def test_gates_of_mixers_are_attention(converted):
    base = open_checkpoint(converted("llama"))
    parts = anatomy(base)
    assert {parts.part(n) for n in base.tensors if ".mixer." in n} == {"attention"}


@pytest.mark.parametrize("command", ["inspect", "verify", "diff"])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_commands_take_it(command, name, converted, capsys):
    folder = str(converted(name))
    assert main([command, *[folder] * (2 if command == "diff" else 1)]) == 0, (
        capsys.readouterr().err
    )


def test_eval_measures_it(converted, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("nothing is kept of what is not looked at " * 8)
    words = ["eval", str(converted("qwen3")), "--text", str(text), "--json"]
    assert main(words) == 0, capsys.readouterr().err
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["lizard", "gla"])
def test_reproduce_gives_the_same_bytes(method, converted, tmp_path):
    operation = Operation(compile_plan=linearize, open_input=open_checkpoint)
    found = reproduce(
        open_checkpoint(converted("llama", method)), lambda _: operation, out=tmp_path / "again"
    )
    assert found.identical == len(tensors(tmp_path / "again"))


def test_layers_are_stacked_with_their_mixers(converted, tmp_path):
    plan = stack(open_checkpoint(converted("llama")), layers="0-3,3,0")
    out = run(plan, tmp_path / "out").out
    assert json.loads((out / "config.json").read_text())["linear_layers"] == [0, 1, 2, 5]
    model, info = load(out)
    assert not any(info[key] for key in LOADING)
    assert torch.isfinite(logits(model)).all()


MODES = {
    "new": lambda name: ".mixer." in name,
    "lora": lambda name: ".mixer." in name or "norm" in name or "_proj" in name,
    "full": lambda name: True,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_recover_trains_and_writes_it(mode, name, converted, tmp_path):
    healed = heal(converted(name), tmp_path, train=mode)
    assert torch.allclose(healed.written(), healed.after, atol=ATOL)
    assert not torch.allclose(healed.after, healed.before, atol=1e-3)
    changed = healed.changed()
    assert all(MODES[mode](tensor) for tensor in changed)
    assert any(".mixer." in tensor for tensor in changed)


@pytest.mark.parametrize("method", ["gla", "gated-delta"])
def test_new_also_trains_the_projections_of_converted_layers(method, converted, tmp_path):
    changed = heal(converted("llama", method), tmp_path, train="new").changed()
    inside = [f"model.layers.{n}.self_attn." for n in range(3)]
    assert all(name.startswith(tuple(inside)) for name in changed)
    assert all(f"{place}k_proj.weight" in changed for place in inside)


def test_a_healed_model_can_be_trained_again(converted, tmp_path):
    first = heal(converted("llama"), tmp_path / "first", train="new").out
    again = heal(first, tmp_path / "again", train="new")
    facts = json.loads((again.out / "surgery.json").read_text())["facts"]
    assert facts["linear_layers"] == [0, 1, 2]


def test_a_method_without_parameters_has_nothing_new(converted, tmp_path):
    with pytest.raises(SurgeryError, match="has none"):
        heal(converted("llama", "liger"), tmp_path, train="new")
