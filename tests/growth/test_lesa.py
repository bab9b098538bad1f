"""LESA: the shared basis, the network against torch's own, and what an inserted layer holds."""

from __future__ import annotations

import json
import zlib

import pytest
import torch
from layer_oracle import depth, generated, stored
from torch import nn

from cli.main import main
from growth.lesa import lesa
from growth.lesa.predict import Ask, loss_of, predict, scratch, shared_basis
from growth.prune import prune
from structures import load
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError
from surgery.plan import Tell
from surgery.preflight import preflight

LOADED = ["llama_bias", "qwen3", "gemma3_text", "gpt2", "phi3", "bert"]


def stacks(layers: int = 5, n: int = 12, m: int = 7) -> torch.Tensor:
    """Matrices that drift from layer to layer."""
    random = torch.Generator().manual_seed(5)
    steps = torch.randn(layers, n, m, generator=random, dtype=torch.float64)
    return steps.cumsum(0)


def test_the_basis_is_that_of_the_singular_vectors():
    given = stacks()
    basis, sizes = shared_basis(list(given), swapped=False)
    side = torch.cat(list(given), dim=1)
    u, s, _ = torch.linalg.svd(side, full_matrices=False)
    assert torch.allclose(sizes, s, atol=1e-9)
    assert torch.allclose((basis.T @ u).abs(), torch.eye(len(s), dtype=torch.float64), atol=1e-7)


@pytest.mark.parametrize(("n", "m", "layers"), [(12, 7, 5), (40, 5, 3)])
def test_the_basis_gives_every_matrix_back(n, m, layers):
    given = stacks(layers, n, m)
    basis, sizes = shared_basis(list(given), swapped=False)
    assert basis.shape[1] == min(n, layers * m)
    for one in given:
        values = (basis / sizes).T @ one
        assert torch.allclose((basis * sizes) @ values, one, atol=1e-8)


def reference(values: torch.Tensor, seed: str) -> nn.Module:
    """The authors' training loop on torch's own modules, from the same random numbers."""
    random = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    m = values.shape[2]
    net = nn.Sequential(
        nn.Linear(2 * m, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, m)
    )
    with torch.no_grad():
        for linear in net[::2]:
            bound = linear.in_features**-0.5
            for parameter in (linear.weight, linear.bias):
                drawn = torch.rand(parameter.shape, generator=random)
                parameter.copy_(bound * (2 * drawn - 1))
    inner = range(1, len(values) - 1)
    x = torch.cat([torch.cat([values[i - 1], values[i + 1]], dim=1) for i in inner])
    y = torch.cat([values[i] for i in inner])
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3)
    mse = nn.MSELoss()
    for _ in range(10):
        for picked in torch.randperm(len(x), generator=random).split(64):
            optimiser.zero_grad()
            found, wanted = net(x[picked]), y[picked]
            loss = (1 - 5e-4) * mse(found, wanted)
            loss = loss + 5e-4 * mse(torch.norm(found, p=2), torch.norm(wanted, p=2))
            loss.backward()
            optimiser.step()
    return net


def test_the_network_is_the_authors(monkeypatch):
    given = stacks(6, 30, 9)
    basis, sizes = shared_basis(list(given), swapped=False)
    values = torch.stack([((basis / sizes).T @ one).float() for one in given])
    net = reference(values, "0\0up")
    told, *made = predict(list(given), Ask(after=(1, 4), seed="0\0up", swapped=False))
    assert isinstance(told, Tell)
    for after, one in zip((1, 4), made, strict=True):
        with torch.no_grad():
            v = net(torch.cat([values[after], values[after + 1]], dim=1))
        assert torch.allclose(one, (basis * sizes).float() @ v, atol=1e-4)


def test_matrices_stored_inputs_first_are_turned():
    given = stacks()
    ask = {"after": (2,), "seed": "s"}
    _, plain = predict(list(given), Ask(**ask, swapped=False))
    _, turned = predict([one.T for one in given], Ask(**ask, swapped=True))
    assert torch.equal(plain, turned.T)


def test_layers_on_a_long_drift_are_learnt():
    """With many rows to learn from, what lies between two layers is found."""
    random = torch.Generator().manual_seed(1)
    a, b = (torch.randn(600, 8, generator=random, dtype=torch.float64) for _ in range(2))
    given = [a + 0.3 * layer * b for layer in range(16)]
    told, made = predict(given, Ask(after=(7,), seed="drift", swapped=False))
    assert told.figures["explained"] > 0.5
    wanted = a + 0.3 * 7.5 * b
    assert float((made - wanted).norm() / wanted.norm()) < 0.5


def test_loss_is_zero_at_the_aim():
    some = torch.randn(4, 3)
    assert float(loss_of(some, some)) == 0


@pytest.mark.parametrize("name", LOADED)
def test_old_layers_keep_their_bytes_and_new_ones_lie_between(name, opened, structure, write):
    made = write(lesa(opened(name), insert="0,2", norms="neighbours"))
    model, info = load(name, made)
    assert {k: v for k, v in info.items() if v} == {}
    assert depth(model.config) == 6
    old, new = stored(structure(name)), stored(made)
    prefix = next(n for n in old if ".0." in n).split(".0.")[0]
    for layer, source in {0: 0, 2: 1, 3: 2, 5: 3}.items():
        for key in (n for n in old if n.startswith(f"{prefix}.{source}.")):
            at = key.replace(f"{prefix}.{source}.", f"{prefix}.{layer}.")
            assert torch.equal(old[key], new[at])
    for layer, source in {1: 0, 4: 2}.items():
        for key in (n for n in old if n.startswith(f"{prefix}.{source}.") and old[n].ndim == 1):
            near = key.replace(f"{prefix}.{source}.", f"{prefix}.{source + 1}.")
            at = key.replace(f"{prefix}.{source}.", f"{prefix}.{layer}.")
            assert torch.allclose(new[at], (old[key] + old[near]) / 2, atol=1e-6)


def test_norms_of_the_first_layer_are_its_bytes(opened, structure, write):
    made = write(lesa(opened("llama"), insert="2"))
    old, new = stored(structure("llama")), stored(made)
    name = "model.layers.{}.post_attention_layernorm.weight"
    assert torch.equal(new[name.format(3)], old[name.format(0)])


def test_cached_decode_is_decode_without(opened, write):
    model, _ = load("gemma3_text", write(lesa(opened("gemma3_text"), blocks=2)))
    with_cache = generated(model)
    model.generation_config.use_cache = False
    assert with_cache == generated(model)


def test_blocks_are_the_last_gaps(opened):
    plan = lesa(opened("llama"), blocks=2)
    assert plan.facts["layer_map"] == [0, 1, 1, 2, 2, 3]
    assert plan.facts["trainable_layers"] == [2, 4]


def test_the_seed_decides(opened, write):
    first, same, other = (
        stored(write(lesa(opened("llama"), insert="1", seed=seed))) for seed in (0, 0, 1)
    )
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(first[name], same[name])
    assert not torch.equal(first[name], other[name])


def test_the_memory_is_told_and_too_much_is_refused(opened, tmp_path):
    plan = lesa(opened("llama"), blocks=1)
    step = next(step for step in plan.steps if step.why == "predict")
    assert step.whole_bytes == step.scratch > 0
    assert scratch(32, 4096, 14336) > 32 * 4096 * 14336 * 4
    with pytest.raises(PlanError, match="--memory"):
        preflight(plan, tmp_path / "x", memory=step.whole_bytes - 1, shard_size=1 << 30)


WRONG = {
    "neither": ({}, "one of --insert and --blocks"),
    "both": ({"insert": "1", "blocks": 1}, "one of --insert and --blocks"),
    "no blocks": ({"blocks": 0}, "--blocks 0"),
    "many blocks": ({"blocks": 4}, "--blocks 4"),
    "behind the last": ({"insert": "3"}, "no layer of 4 follows"),
    "twice": ({"insert": "1,1"}, "twice"),
    "no number": ({"insert": "x"}, "--insert"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_gaps_are_refused(case, opened):
    asked, told = WRONG[case]
    with pytest.raises(RecipeError, match=told):
        lesa(opened("llama"), **asked)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_mixtures_are_refused(opened, name):
    with pytest.raises(PlanError):
        lesa(opened(name), blocks=1)


def test_two_layers_are_refused(opened, write):
    two = write(prune(opened("llama"), layers="2-3"))
    with pytest.raises(RecipeError, match="2 layer"):
        lesa(open_checkpoint(two), blocks=1)


def test_the_command_writes_and_is_reproduced(fixtures_dir, tmp_path, capsys):
    out = tmp_path / "deeper"
    asked = ["lesa", str(fixtures_dir / "base"), "--insert", "2", "-o", str(out), "--json"]
    assert main(asked) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["told"]) == 7
    assert told["facts"]["trainable_layers"] == [3]
    assert main(["reproduce", str(out)]) == 0
