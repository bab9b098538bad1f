"""All methods of mergekit 0.1.5 on the same YAML and files; SURGERY_PEER_VENV names its virtualenv.

In float32, so that what differs is the arithmetic and not the rounding; docs/decisions explains
every entry of DIFFERS.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from cli.main import main

VENV = os.environ.get("SURGERY_PEER_VENV")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not VENV, reason="SURGERY_PEER_VENV names no virtualenv"),
]

SCRIPT = """
import sys, yaml, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for path in sys.argv[1:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(open(path)))
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, random_seed=1)
    run_merge(config, path + ".out", options)
"""


def entry(models, *, base=None, parameters=None, weights=None):
    weights = weights or {}
    told = {
        "models": [
            {"model": m, **({"parameters": {"weight": weights[m]}} if m in weights else {})}
            for m in models
        ],
        "dtype": "float32",
        "parameters": parameters or {},
    }
    return {**told, "base_model": base} if base else told


TUNED = ["one", "two", "three"]
SHARES = {"one": 0.5, "two": 0.3, "three": 0.4}
SIGNED = {"one": 0.5, "two": -0.3, "three": 0.4}


def task(parameters=None, weights=SHARES):
    return entry(TUNED, base="base", parameters=parameters, weights=weights)


RECIPES = {
    "linear": {
        "plain": entry(TUNED, weights=SHARES),
        "raw": entry(TUNED, weights=SIGNED, parameters={"normalize": False}),
        "base-listed": entry(["base", *TUNED], base="base", weights={"base": 0.2, **SHARES}),
    },
    "slerp": {
        "near": entry(["base", "one"], base="base", parameters={"t": 0.3}),
        "far": entry(["base", "far"], base="base", parameters={"t": 0.7}),
        "gradient": entry(
            ["base", "far"],
            base="base",
            parameters={"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.25}]},
        ),
    },
    "nuslerp": {
        "plain": entry(["one", "far"], weights={"one": 0.6, "far": 0.3}),
        "base": entry(["one", "two"], base="base", weights={"one": 0.6, "two": 0.3}),
        "columns": entry(
            ["one", "far"],
            weights={"one": 0.6, "far": 0.3},
            parameters={"nuslerp_flatten": False, "nuslerp_row_wise": True},
        ),
        "rows": entry(
            ["one", "far"],
            weights={"one": 0.6, "far": 0.3},
            parameters={"nuslerp_flatten": False},
        ),
    },
    "multislerp": {
        "plain": entry(["one", "far", "three"], weights={"one": 0.5, "far": 0.3, "three": 0.4}),
        "base": entry(TUNED, base="base", weights=SHARES),
    },
    "karcher": {"plain": entry(["one", "far", "three"])},
    "task_arithmetic": {"plain": task(), "signed": task({"lambda": 0.7}, SIGNED)},
    "ties": {
        "half": task({"density": 0.5}),
        "signed": task({"density": 0.3, "normalize": False, "lambda": 0.6}, SIGNED),
        "all": task(),
    },
    "breadcrumbs": {"plain": task({"density": 0.6, "gamma": 0.05})},
    "breadcrumbs_ties": {"plain": task({"density": 0.6, "gamma": 0.05})},
    "sce": {
        "all": entry(TUNED, base="base"),
        "half": entry(TUNED, base="base", parameters={"select_topk": 0.5}),
    },
    "model_stock": {
        "plain": entry(["base", *TUNED], base="base"),
        "filters": entry(["base", *TUNED], base="base", parameters={"filter_wise": True}),
    },
    "nearswap": {"plain": entry(["base", "one"], base="base", parameters={"t": 0.001})},
    "arcee_fusion": {"plain": entry(["base", "far"], base="base")},
    "ram": {"plain": entry(TUNED, base="base", parameters={"epsilon": 5e-4})},
    "ramplus_tl": {
        "plain": entry(TUNED, base="base", parameters={"epsilon": 5e-4, "r": 0.2, "alpha": 0.3})
    },
    "passthrough": {
        "plain": entry(["one"]),
        "scaled": entry(
            ["one"], parameters={"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}
        ),
    },
    "dare_linear": {"plain": task({"density": 0.5})},
    "dare_ties": {"plain": task({"density": 0.5})},
    "della": {"plain": task({"density": 0.5, "epsilon": 0.15})},
    "della_linear": {"plain": task({"density": 0.5, "epsilon": 0.15})},
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
# Share of elements that may lie further apart than float32 explains.
DIFFERS = {
    "arcee_fusion": 1e-3,  # quantiles: exact here, sampled there beyond a million elements
    "breadcrumbs": 1e-4,  # equal magnitudes at a threshold, in the order of an unstable sort
    "breadcrumbs_ties": 1e-4,
    "ties": 1e-4,
    "sce": 1e-4,
}
CASES = [(method, case) for method, cases in RECIPES.items() for case in cases]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Make the models, merge all recipes with both tools, and return a function of two names."""
    folder = tmp_path_factory.mktemp("parity")
    make_models(folder)
    paths = {}
    for method, case in CASES:
        told = json.dumps({"merge_method": method, **RECIPES[method][case]})
        for name in ("base", *TUNED, "far"):
            told = told.replace(f'"model": "{name}"', f'"model": "{folder / name}"')
            told = told.replace(f'"base_model": "{name}"', f'"base_model": "{folder / name}"')
        paths[method, case] = folder / f"{method}-{case}.yaml"
        paths[method, case].write_text(told)
    subprocess.run(
        [Path(VENV) / "bin" / "python", "-c", SCRIPT, *map(str, paths.values())],
        check=True,
        capture_output=True,
        timeout=900,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    found = {
        key: (ours(path), load_file(f"{path}.out/model.safetensors")) for key, path in paths.items()
    }
    return {**found, "base": load_file(folder / "base" / "model.safetensors")}


def ours(path):
    out = path.with_suffix(".ours")
    assert main(["run", str(path), "-o", str(out)]) == 0
    return load_file(out / "model.safetensors")


def make_models(folder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 320}
    config = LlamaConfig(
        **sizes, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    for name in TUNED:
        tuned = LlamaForCausalLM(config)
        tuned.load_state_dict(
            {k: v + 1e-3 * torch.randn_like(v) for k, v in base.state_dict().items()}
        )
        tuned.save_pretrained(folder / name)
    LlamaForCausalLM(config).save_pretrained(folder / "far")


@pytest.mark.parametrize(("method", "case"), CASES, ids=lambda value: value)
def test_both_tools_write_the_same_tensors(merged, method, case):
    mine, other = merged[method, case]
    assert {n: (t.shape, t.dtype) for n, t in mine.items()} == {
        n: (t.shape, t.dtype) for n, t in other.items()
    }


DETERMINISTIC = [(method, case) for method, case in CASES if method not in RANDOM]


@pytest.mark.parametrize(("method", "case"), DETERMINISTIC, ids=lambda value: value)
def test_deterministic_methods_agree_with_the_peer(merged, method, case):
    mine, other = merged[method, case]
    far = total = 0
    for name, tensor in mine.items():
        scale = float(other[name].abs().max())
        far += int(((tensor - other[name]).abs() > 2e-6 * max(scale, 1e-3)).sum())
        total += tensor.numel()
    assert far <= DIFFERS.get(method, 0) * total, f"{far} of {total} elements differ"


@pytest.mark.parametrize("method", RANDOM)
def test_random_methods_have_the_peers_rate_and_scale(merged, method):
    mine, other = merged[method, "plain"]
    base, name = merged["base"], "model.layers.1.mlp.up_proj.weight"
    figures = []
    for model in (mine, other):
        moved = model[name] - base[name]
        told = ((moved != 0).float(), moved.abs(), moved.square())
        figures.append([float(one.mean()) for one in told])
    for ours_told, theirs in zip(*figures, strict=True):
        assert ours_told == pytest.approx(theirs, rel=0.03)
