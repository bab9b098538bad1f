"""Merged adapters against the changes they stand for, in float64, and against peft."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from surgery.checkpoint import open_checkpoint
from surgery.checkpoint.adapter_source import open_adapter_source
from surgery.errors import RecipeError
from surgery.lora.combine import merge
from surgery.lora.elementwise import Change, cut_at
from surgery.lora.fuse import fuse
from surgery.run import run

FIRST = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
SECOND = {
    "r": 3,
    "lora_alpha": 5,
    "use_rslora": True,
    "target_modules": ["q_proj", "v_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 6},
    "alpha_pattern": {"layers.2.self_attn.v_proj": 2},
}


@pytest.fixture(scope="module")
def trio(lab):
    """A base and two adapters of it: one plain, one rank-stabilised with patterns."""
    base = lab.structure("llama")
    one = lab.train(base, seed=1, name="one", **FIRST)
    two = lab.train(base, seed=2, name="two", **SECOND)
    return base, one, two


def changes(path):
    """Every module's change in float64, told from the adapter's files alone."""
    source = open_adapter_source(path)
    stored = load_file(source.adapter.file)
    found = {}
    for f in source.adapter.factors:
        found[f.module] = f.scale * stored[f.b.name].double() @ stored[f.a.name].double()
    return found


def combined(*paths, **options):
    return merge(*map(open_adapter_source, paths), **options)


def summed(weights, *paths):
    total = {}
    for weight, path in zip(weights, paths, strict=True):
        for name, change in changes(path).items():
            total[name] = total.get(name, 0) + weight * change
    return total


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, -0.3], [0.0, 2.0]])
def test_cat_is_the_weighted_sum_of_the_changes(weights, trio, lab) -> None:
    _, one, two = trio
    found = changes(lab.write(combined(one, two, weights=weights)))
    expected = summed(weights, one, two)
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cat_fuses_to_what_both_fuse_to(dtype, trio, lab, tmp_path) -> None:
    base, one, two = trio
    lab.load(base).to(dtype).save_pretrained(tmp_path / "base")
    both = lab.tensors(lab.write(fuse(open_checkpoint(f"{tmp_path}/base+{one}+{two}"))))
    cat = lab.write(combined(one, two))
    found = lab.tensors(lab.write(fuse(open_checkpoint(f"{tmp_path}/base+{cat}"))))
    for name, tensor in both.items():
        rounding = torch.finfo(dtype).eps * tensor.double().abs()
        assert ((found[name].double() - tensor.double()).abs() <= rounding + 1e-7).all()


def test_every_scale_is_one_and_ranks_are_sums(trio, lab) -> None:
    _, one, two = trio
    out = lab.write(combined(one, two))
    adapter = open_adapter_source(out).adapter
    assert {f.scale for f in adapter.factors} == {1.0}
    ranks = {f.module: f.rank for f in adapter.factors}
    assert ranks["model.layers.0.self_attn.q_proj"] == 7
    assert ranks["model.layers.1.self_attn.q_proj"] == 10
    assert ranks["model.layers.0.self_attn.v_proj"] == 3
    assert ranks["model.layers.0.mlp.down_proj"] == 4
    config = json.loads((out / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_peft_loads_the_merged_adapter(trio, lab) -> None:
    base, one, two = trio
    cat = lab.write(combined(one, two))
    assert lab.missing(base, cat) == []
    expected = lab.logits(lab.adapted(base, one, two))
    torch.testing.assert_close(lab.logits(lab.adapted(base, cat)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["svd", "linear"])
@pytest.mark.parametrize("rank", [None, 1, 3, 99])
def test_svd_is_the_nearest_of_its_rank(rank, method, trio, lab) -> None:
    _, one, two = trio
    weights = [0.8, 0.5]
    plan = combined(one, two, weights=weights, method=method, rank=rank)
    report = run(plan, lab.fresh())
    found = changes(report.out)
    ranks = {f.module: f.rank for f in open_adapter_source(report.out).adapter.factors}
    for name, change in summed(weights, one, two).items():
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        k = ranks[name]
        assert k == min(rank or 99, int((s > 1e-9 * s[0]).sum())) or rank is None
        torch.testing.assert_close(found[name], u[:, :k] * s[:k] @ v[:k], rtol=1e-4, atol=1e-6)
        energy = report.record["told"][f"base_model.model.{name}.lora_A.weight"]["energy"]
        assert energy == pytest.approx(float(s[:k].square().sum() / s.square().sum()), abs=1e-9)


def naive(method, deltas, weights, density):
    """The rules as peft's utils/merge_utils.py states them, in float32, ties by lower index."""
    kept = []
    for delta in deltas:
        flat = delta.float().numpy().reshape(-1)
        order = np.argsort(-np.abs(flat), kind="stable")[: int(density * flat.size)]
        mask = np.zeros_like(flat)
        mask[order] = 1
        kept.append((flat * mask).reshape(delta.shape))
    if method == "magnitude_prune":
        return sum(w * k for w, k in zip(weights, kept, strict=True))
    sign = np.where(sum(kept) >= 0, 1, -1)
    agree = [np.sign(k) == sign for k in kept]
    total = sum(w * k * a for w, k, a in zip(weights, kept, agree, strict=True))
    return total / np.maximum(sum(a.astype(int) for a in agree), 1)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_rules_by_element_act_on_the_changes(method, density, svd, trio, lab) -> None:
    _, one, two = trio
    weights = [0.8, 0.5]
    plan = combined(one, two, weights=weights, method=method, density=density, rank=999, svd=svd)
    found = changes(lab.write(plan))
    first, second = changes(one), changes(two)
    for name, merged in found.items():
        pairs = [(w, c[name]) for w, c in zip(weights, (first, second), strict=True) if name in c]
        kept, deltas = zip(*pairs, strict=True)
        expected = torch.from_numpy(naive(method, deltas, kept, density)).double()
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_its_share_rescaled(method, trio, lab) -> None:
    _, one, _ = trio
    plan = combined(one, method=method, density=0.25, rank=999)
    for name, merged in changes(lab.write(plan)).items():
        change = changes(one)[name]
        kept = merged.abs() > 1e-6
        assert 0.2 < float(kept.double().mean()) < 0.3
        torch.testing.assert_close(merged[kept], 4 * change[kept], rtol=1e-3, atol=1e-5)


def test_dare_masks_differ_by_adapter_and_seed(trio, lab) -> None:
    _, one, _ = trio

    def kept(**options):
        made = changes(lab.write(combined(one, one, method="dare_linear", density=0.5, **options)))
        return made["model.layers.0.mlp.down_proj"]

    same = kept(rank=999, seed=1)
    assert torch.equal(same, kept(rank=999, seed=1))
    assert not torch.allclose(same, kept(rank=999, seed=2))
    change = changes(one)["model.layers.0.mlp.down_proj"]
    shares = (same / change).round().unique()
    assert set(shares.tolist()) == {0.0, 2.0, 4.0}


def test_equal_magnitudes_are_kept_in_their_order() -> None:
    change = Change(torch.ones(1, 6, dtype=torch.float64), torch.ones(4, 1).double(), 1.0)
    cut = cut_at(change, (4, 6), 0.5)
    kept = cut.keep(change.block(0, 4), 0)
    assert kept.reshape(-1).tolist() == [1.0] * 12 + [0.0] * 12


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("cat", "cat", {}),
        ("svd", "svd", {"svd_rank": 5}),
        ("ties", "ties_svd", {"svd_rank": 32, "density": 0.4}),
        ("magnitude_prune", "magnitude_prune_svd", {"svd_rank": 32, "density": 0.4}),
    ],
)
def test_peft_agrees_where_it_works_on_changes(ours, theirs, options, lab) -> None:
    base = lab.structure("llama")
    paths = [lab.train(base, seed=s, r=4, lora_alpha=6, target_modules=["q_proj"]) for s in (5, 6)]
    weights = [0.9, 0.4]
    expected = weighted(lab, base, paths, weights, combination_type=theirs, **options)
    rank, density = options.get("svd_rank"), options.get("density")
    plan = combined(*paths, weights=weights, method=ours, rank=rank, density=density, svd="exact")
    found = changes(lab.write(plan))
    for name, change in expected.items():
        torch.testing.assert_close(found[name].float(), change, rtol=1e-3, atol=2e-5)


def weighted(lab, base, paths, weights, **options):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(lab.load(base), paths[0], adapter_name="0")
        model.load_adapter(paths[1], adapter_name="1")
        model.add_weighted_adapter(["0", "1"], weights, "merged", **options)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("merged").detach()
        for name, module in model.named_modules()
        if "merged" in getattr(module, "lora_A", {})
    }


def test_peft_s_linear_has_cross_terms_that_ours_has_not(lab) -> None:
    base = lab.structure("llama")
    paths = [lab.train(base, seed=s, r=4, target_modules=["q_proj"]) for s in (5, 6)]
    theirs = weighted(lab, base, paths, [1.0, 1.0], combination_type="linear")
    ours = changes(lab.write(combined(*paths, method="linear", rank=8)))
    for name, exact in summed([1.0, 1.0], *paths).items():
        assert (ours[name] - exact).norm() / exact.norm() < 1e-5
        assert (theirs[name] - exact).norm() / exact.norm() > 0.5


def test_embeddings_are_merged_too(lab) -> None:
    base = lab.structure("llama")
    names = ["embed_tokens", "q_proj"]
    paths = [lab.train(base, seed=s, r=2, target_modules=names) for s in (1, 2)]
    cat = lab.write(combined(*paths, weights=[0.5, 2.0]))
    found, expected = changes(cat), summed([0.5, 2.0], *paths)
    torch.testing.assert_close(
        found["model.embed_tokens"], expected["model.embed_tokens"], rtol=1e-6, atol=1e-7
    )
    assert lab.missing(base, cat) == []


REFUSED = [
    ({"weights": [1.0]}, "gives 1 weights for 2 adapters"),
    ({"weights": [1.0, math.nan]}, "what is no number"),
    ({"rank": 3}, "says nothing to cat"),
    ({"method": "svd", "rank": 0}, "is below 1"),
    ({"method": "svd", "density": 0.5}, "--density: says nothing to svd"),
    ({"method": "ties"}, "ties: needs --density"),
    ({"method": "dare_ties", "density": 0.0}, "density 0.0 is not in"),
    ({"dtype": "int4"}, "is none of float32"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_wrong_ask_is_refused(options, message, trio) -> None:
    with pytest.raises(RecipeError, match=message):
        combined(*trio[1:], **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "has DoRA magnitudes of"),
        ({"modules_to_save": ["lm_head"]}, "holds whole parameters lm_head.weight"),
        ({"trainable_token_indices": [1]}, "holds new tokens of model.embed_tokens"),
    ],
)
def test_what_is_no_low_rank_change_is_refused(config, message, trio, lab) -> None:
    base, one, _ = trio
    other = lab.train(base, r=2, target_modules=["q_proj"], **config)
    with pytest.raises(RecipeError, match=message):
        combined(one, other)


def test_adapters_of_other_shapes_are_refused(trio, lab, tmp_path) -> None:
    _, one, two = trio
    shutil.copytree(two, tmp_path / "other")
    place = tmp_path / "other" / "adapter_model.safetensors"
    stored = load_file(place)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    stored[name] = torch.ones(3, 40)
    save_file(stored, place)
    with pytest.raises(RecipeError, match=r"of shape \[32, 40\], not \[32, 32\]"):
        combined(one, tmp_path / "other")


def test_bytes_do_not_depend_on_workers(trio, lab) -> None:
    plan = combined(*trio[1:], method="dare_ties", density=0.3)
    one, many = (lab.write(plan, workers=n) / "adapter_model.safetensors" for n in (1, 4))
    assert one.read_bytes() == many.read_bytes()


def test_the_command_writes_verifies_and_reproduces(trio, tmp_path, capsys) -> None:
    _, one, two = trio
    out = tmp_path / "out"
    words = ["lora", "merge", str(one), str(two), "-o", str(out), "--method", "svd"]
    assert main([*words, "--weight", "0.5,0.5", "--rank", "3"]) == 0
    assert "share kept (energy): median 0." in capsys.readouterr().err
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert main([*words, "--weight", "a,b"]) == 2
    assert "is no list of numbers" in capsys.readouterr().err
