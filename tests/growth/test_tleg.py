"""TLEG: a model on a line is itself again at any depth, and other models get the nearest line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from layer_oracle import depth, logits, stored
from safetensors.torch import save_file

from cli.main import main
from growth.tleg import combinations, tleg
from structures import load
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError

L = 4
ALIKE = ["llama", "llama_bias", "qwen3", "gemma3_text", "gpt2", "phi3", "mixtral", "bert"]
NORM = "model.layers.{}.input_layernorm.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


def slope(name: str, tensor: torch.Tensor) -> torch.Tensor:
    seed = torch.Generator().manual_seed(len(name) + tensor.numel())
    return torch.randn(tensor.shape, generator=seed) * 0.05


@pytest.fixture(scope="module")
def straight(structure, tmp_path_factory):
    """Llama whose layer l is A + l B, norms included; layer 0 is A."""
    out = tmp_path_factory.mktemp("straight")
    source = structure("llama")
    tensors = stored(source)
    for name in [n for n in tensors if n.startswith("model.layers.0.")]:
        for layer in range(1, L):
            own = name.replace(".0.", f".{layer}.", 1)
            tensors[own] = tensors[name] + layer * slope(name, tensors[name])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((source / "config.json").read_bytes())
    return out


def test_a_model_on_a_line_is_itself_again(straight, write):
    made = write(tleg(open_checkpoint(straight), layers=L))
    (a, _), (b, info) = load("llama", straight), load("llama", made)
    assert {k: v for k, v in info.items() if v} == {}
    assert float((logits(a) - logits(b)).abs().max()) <= 1e-5
    told = json.loads((made / "surgery.json").read_text())["told"]
    assert all(abs(figures["explained"] - 1) < 1e-6 for figures in told.values())
    assert len(told) == 9


PLACES = {
    ("relative", 8): [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    ("relative", 2): [0, 2],
    ("ends", 7): [0, 0.5, 1, 1.5, 2, 2.5, 3],
    ("ends", 1): [1.5],
    ("index", 6): [0, 1, 2, 3, 4, 5],
}


@pytest.mark.parametrize(("positions", "layers"), PLACES)
def test_new_layers_lie_on_the_line(straight, write, positions, layers):
    made = write(tleg(open_checkpoint(straight), layers=layers, positions=positions))
    old, new = stored(straight), stored(made)
    for i, place in enumerate(PLACES[positions, layers]):
        for name in (NORM, UP):
            first = name.format(0)
            wanted = old[first] + place * slope(first, old[first])
            assert torch.allclose(new[name.format(i)], wanted, atol=1e-6)
    assert depth(load("llama", made)[0].config) == layers


@pytest.mark.parametrize("name", ALIKE)
def test_other_models_get_the_least_squares_line(name, opened, structure, write):
    """Against numpy's own least squares, and the share explained against its residuals."""
    made = write(tleg(opened(name), layers=6))
    model, info = load(name, made)
    assert {k: v for k, v in info.items() if v} == {}
    assert depth(model.config) == 6
    old, new = stored(structure(name)), stored(made)
    told = json.loads((made / "surgery.json").read_text())["told"]
    prefix = next(n for n in told).split(".0.")[0]
    for key in [n for n in told if n.startswith(f"{prefix}.0.")]:
        rest = key.removeprefix(f"{prefix}.0.")
        rows = np.stack([old[f"{prefix}.{n}.{rest}"].double().numpy().ravel() for n in range(L)])
        design = np.stack([np.ones(L), np.arange(L)], axis=1)
        found, *_ = np.linalg.lstsq(design, rows, rcond=None)
        for i in range(6):
            wanted = found[0] + i * L / 6 * found[1]
            given = new[f"{prefix}.{i}.{rest}"].double().numpy().ravel()
            np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-6)
        left = ((rows - design @ found) ** 2).sum()
        share = 1 - left / ((rows - rows.mean(0)) ** 2).sum()
        assert told[key]["explained"] == pytest.approx(share, abs=1e-6)


def test_the_factors_at_a_place_sum_to_one():
    for row in combinations(7, [0, 2.5, 6, 9]):
        assert sum(row) == pytest.approx(1)


def test_windows_come_from_the_nearest_layer(opened, write):
    made = write(tleg(opened("gemma3_text"), layers=8, positions="ends"))
    kinds = json.loads((made / "config.json").read_text())["layer_types"]
    near = [round(i * 3 / 7) for i in range(8)]
    wanted = ["sliding_attention", "full_attention"]
    assert kinds == [wanted[n % 2] for n in near]


@pytest.mark.parametrize("layers", [0, -1, 1_000_000])
def test_impossible_depths_are_refused(opened, layers):
    with pytest.raises(RecipeError, match="--layers"):
        tleg(opened("llama"), layers=layers)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "qwen3_next"])
def test_layers_that_are_not_alike_are_refused(opened, name):
    with pytest.raises(PlanError, match="not built alike"):
        tleg(opened(name), layers=6)


def test_one_layer_has_no_line(opened, write):
    from growth.prune import prune

    one = write(prune(opened("llama"), layers="1-3"))
    with pytest.raises(RecipeError, match="a line needs two"):
        tleg(open_checkpoint(one), layers=2)


def test_the_command_tells_what_is_explained_and_is_reproduced(fixtures_dir, tmp_path, capsys):
    out = tmp_path / "deep"
    asked = ["tleg", str(fixtures_dir / "base"), "--layers", "6", "-o", str(out), "--json"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(0 <= figures["explained"] <= 1 for figures in told["told"].values())
    assert told["facts"]["trainable_layers"] == list(range(6))
    assert main(["reproduce", str(out)]) == 0
