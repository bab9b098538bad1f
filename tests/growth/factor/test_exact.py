"""A factored model computes its factors' products, and comes back as a stock model."""

from __future__ import annotations

import json

import pytest
import torch
from factor_models import FAMILIES, FIXTURES, FULL, METHODS, load_whole, logits, tensors

from growth.factor.dense import materialize
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError
from surgery.plan import check_plan
from surgery.run import run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_materialized_it_computes_what_it_did(name, method, factored, write):
    path = factored(name, method, rank=3)
    dense = write(materialize(open_checkpoint(path)))
    found, before = logits(load_whole(dense)), logits(load_whole(path))
    assert (found - before).abs().max() <= 1e-4


@pytest.mark.parametrize("method", ["svd", "monarch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_at_full_rank_it_is_the_original(name, method, factored, parent):
    found = logits(load_whole(factored(name, method, rank=FULL, svd="exact")))
    assert (found - logits(parent(name))).abs().max() <= 1e-4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_names_shapes_and_config_come_back(name, method, factored, write, structure):
    made = open_checkpoint(write(materialize(open_checkpoint(factored(name, method, rank=3)))))
    stock = open_checkpoint(structure(name))
    assert made.config == stock.config
    assert {n: (t.dtype, t.shape) for n, t in made.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in stock.tensors.items()
    }


def test_full_rank_materialized_is_the_original_within_roundings(factored, write, structure):
    """Each entry is a sum of products of rounded numbers: an ulp of the row's and column's size."""
    path = factored("llama_bias", "svd", rank=FULL, svd="exact")
    made, stock = (
        tensors(write(materialize(open_checkpoint(path)))),
        tensors(structure("llama_bias")),
    )
    for name, tensor in stock.items():
        scale = tensor.double().norm() if tensor.ndim == 2 else 0.0
        assert (made[name].double() - tensor.double()).abs().max() <= 2**-23 * scale


def test_bfloat16_factors_at_full_rank_are_off_by_their_rounding(factored, write):
    path = factored("base", "svd", rank=FULL, svd="exact")
    made, stock = tensors(write(materialize(open_checkpoint(path)))), tensors(FIXTURES / "base")
    for name, tensor in stock.items():
        change = (made[name].double() - tensor.double()).norm()
        assert change <= 3 * 2**-9 * tensor.double().norm()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_attention_of_mixtures_is_factored_where_experts_are_left_out(
    name, factored, write, parent
):
    path = factored(name, "svd", rank=FULL, svd="exact", exclude=(".experts.",))
    assert (logits(load_whole(path)) - logits(parent(name))).abs().max() <= 1e-4
    dense = write(materialize(open_checkpoint(path)))
    assert (logits(load_whole(dense)) - logits(parent(name))).abs().max() <= 1e-4


def test_a_stacked_factored_model_is_the_stacked_dense_one(factored, write):
    from growth.stack import stack

    path = factored("llama_bias", "svd", rank=3)
    here = write(stack(open_checkpoint(path), factor=2))
    dense = write(materialize(open_checkpoint(path)))
    there = write(stack(open_checkpoint(dense), factor=2))
    assert (logits(load_whole(here)) - logits(load_whole(there))).abs().max() <= 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_an_expanded_factored_model_is_unchanged_and_can_learn(method, factored, write):
    from growth.expand import expand

    path = factored("llama_bias", method, rank=3)
    model = load_whole(write(expand(open_checkpoint(path), blocks=1)))
    assert (logits(model) - logits(load_whole(path))).abs().max() <= 1e-5
    model(torch.tensor([[5, 6, 7, 8]]), labels=torch.tensor([[5, 6, 7, 8]])).loss.backward()
    assert model.model.layers[-1].mlp.down_proj.factor_B.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "is no factored model"),
        ({"factored": {}}, "does not tell of"),
        ({"factored": None}, "no usable factored"),
        ({"base_model_type": None}, "no usable base_model_type"),
    ],
)
def test_damaged_configs_are_refused(change, words, factored, tmp_path):
    with pytest.raises((CheckpointError, PlanError), match=words):
        materialize(open_checkpoint(damaged(factored, tmp_path, change)))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ({"rank": 2}, "which the config tells of"),
        ({"kind": "monarch"}, "which the config tells of"),
        ({"kind": "sparse-low-rank"}, "is missing"),
        ({"kind": "tucker"}, "which the config tells of"),
        ({"kind": "monarch", "blocks": [0, "x"]}, "which the config tells of"),
    ],
)
def test_a_config_that_does_not_fit_the_factors_is_refused(module, words, factored, tmp_path):
    told = open_checkpoint(factored("llama_bias", "svd", rank=3)).config["factored"]
    name = next(iter(told))
    change = {"factored": told | {name: told[name] | module}}
    with pytest.raises(CheckpointError, match=words):
        materialize(open_checkpoint(damaged(factored, tmp_path, change)))


def damaged(factored, folder, change):
    import shutil

    path = shutil.copytree(factored("llama_bias", "svd", rank=3), folder / "damaged")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    return path


def test_plans_stay_within_the_memory_that_they_announce(factored):
    """The announced scratch is an upper bound; a budget below it is refused before any read."""
    plan = check_plan(materialize(open_checkpoint(factored("base", "svd", ratio=0.5))))
    need = max(step.whole_bytes for step in plan.steps)
    assert need >= 8 * 352 * 128
    with pytest.raises(PlanError, match="memory"):
        run(plan, plan.sources[0].root.parent / "never", memory=need // 2)
