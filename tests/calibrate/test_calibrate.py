"""Statistics of activations, against what transformers itself shows of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cli.main import main
from surgery.calibrate import calibrate, open_statistics, read_numbers
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, RecipeError

BASE = Path(__file__).parents[2] / "fixtures" / "base"
HELD_OUT = Path(__file__).parents[2] / "fixtures" / "heldout" / "mix.jsonl"
CONTEXT = 48


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Three documents, one shorter than the context."""
    lines = HELD_OUT.read_text().splitlines()[:2]
    path = tmp_path_factory.mktemp("text") / "some.jsonl"
    path.write_text("\n".join([*lines, json.dumps({"text": "def short(): pass"})]))
    return path


@pytest.fixture(scope="module")
def measured(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("statistics") / "all.safetensors"
    kinds = ("layers", "inputs", "grams")
    found = calibrate(BASE, [text], out, collect=kinds, context=CONTEXT, memory=1 << 16)
    return found, load_file(out)


@pytest.fixture(scope="module")
def oracle(text):
    """Inputs of every linear map and hidden states, row by row, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    inputs, hidden = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(
                lambda _, x, name=name: inputs.setdefault(name, []).append(x[0][0].double())
            )
    seen = {}
    model.model.layers[-1].register_forward_hook(lambda _, __, out: seen.update(last=out))
    for line in text.read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        ids = [tokenizer.bos_token_id, *ids] if tokenizer.bos_token_id is not None else ids
        for at in range(0, len(ids), CONTEXT):
            row = torch.tensor([ids[at : at + CONTEXT]])
            if row.shape[1] > 1:
                with torch.inference_mode():
                    out = model(row, output_hidden_states=True)
                last = seen["last"][0] if isinstance(seen["last"], tuple) else seen["last"]
                states = [*out.hidden_states[:-1], last.reshape(out.hidden_states[0].shape)]
                hidden.append(torch.stack([h[0].double() for h in states]))
    return inputs, hidden


def test_cosines_are_those_of_the_hidden_states(measured, oracle):
    tokens = torch.cat(oracle[1], dim=1)
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    expected = torch.einsum("itd,jtd->ij", unit, unit) / tokens.shape[1]
    assert torch.allclose(measured[1]["cosine"], expected, atol=1e-5)


def test_angles_are_those_of_each_rows_last_token(measured, oracle):
    last = torch.stack([torch.nn.functional.normalize(h[:, -1], dim=-1) for h in oracle[1]])
    angles = (last @ last.transpose(1, 2)).clamp(-1, 1).arccos() / torch.pi
    found = measured[1]["angle.last"]
    off = ~torch.eye(len(found), dtype=torch.bool)
    assert torch.allclose(found[off], angles.mean(0)[off], atol=1e-4)


def test_input_sizes_are_sums_over_tokens_and_rows(measured, oracle):
    for name, rows in oracle[0].items():
        squares = sum(x.square().sum(0) for x in rows)
        means = sum(x.abs().mean(0).square() for x in rows)
        assert torch.allclose(measured[1][f"{name}.square"], squares, rtol=1e-4)
        assert torch.allclose(measured[1][f"{name}.absolute"], means, rtol=1e-4)


def test_a_gram_matrix_stands_for_every_map_of_the_same_input(measured, oracle):
    statistics = open_statistics(measured[0].out, open_checkpoint(BASE))
    for name, rows in oracle[0].items():
        expected = sum(x.T @ x for x in rows).numpy()
        found = read_numbers(statistics.gram(name))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert len({statistics.gram(name).name for name in oracle[0]}) < len(oracle[0])


def test_a_small_budget_takes_more_passes(measured):
    assert measured[0].passes > 2


def test_another_models_statistics_are_refused(measured):
    other = open_checkpoint(BASE.parent / "uni")
    with pytest.raises(RecipeError, match="another model"):
        open_statistics(measured[0].out, other)


def test_a_file_of_something_else_is_refused():
    weights = next(BASE.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="no file of statistics"):
        open_statistics(weights, open_checkpoint(BASE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"collect": ()}, "names no statistics"),
        ({"collect": ("hessian",)}, "no kind of statistics"),
        ({"samples": 0}, "is below 1"),
        ({"batch_tokens": 0}, "--batch-tokens 0: is below 1"),
        ({"context": 1}, "is below 2"),
        ({"context": 100_000}, "--context: 100000 is above the 128 tokens"),
    ],
)
def test_wrong_asks_are_refused(change, words, text, tmp_path):
    asks = {"collect": ("layers",)} | change
    with pytest.raises(RecipeError, match=words):
        calibrate(BASE, [text], tmp_path / "x.safetensors", **asks)


def test_an_existing_file_is_kept(measured, text):
    with pytest.raises(RecipeError, match="exists already"):
        calibrate(BASE, [text], measured[0].out, collect=("layers",))


def test_a_failed_run_leaves_nothing(text, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(BASE, [text], tmp_path / "x.safetensors", collect=("layers",), progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    import os

    from surgery.calibrate.statistics import StatisticsFile
    from surgery.errors import SurgeryError
    from surgery.plan import TensorSpec

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    spec = {"cosine": TensorSpec("F64", (2, 2))}
    with (
        pytest.raises(SurgeryError, match="space"),
        StatisticsFile(tmp_path / "out.safetensors", spec, {}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--text", "--calibration"])
def test_the_command_takes_its_text_by_either_name(option, text, tmp_path, capsys):
    out = tmp_path / "x.safetensors"
    assert main(["calibrate", str(BASE), option, str(text), "--samples", "2", "-o", str(out)]) == 0
    assert out.is_file()
