"""An extracted adapter: what peft loads, how near it is to the difference, what it leaves out."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError
from surgery.lora.decompose import OVERSAMPLING, decompose
from surgery.lora.extract import energy_in_all, extract
from surgery.lora.fuse import fuse
from surgery.run import run


@pytest.fixture(scope="module")
def pair(lab, tmp_path_factory):
    """A structure and a tuned copy of it: what is named changes, by noise of falling strength."""

    def make(name="llama", *, dtype=torch.float32, only="", seed=3):
        root = tmp_path_factory.mktemp("pair")
        model = lab.load(lab.structure(name)).to(dtype)
        model.save_pretrained(root / "base")
        rng = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if only in key:
                noise = torch.randn(parameter.shape, generator=rng)
                parameter.data += (0.05 * noise).to(dtype)
        model.save_pretrained(root / "tuned")
        return open_checkpoint(root / "base"), open_checkpoint(root / "tuned")

    return make


def deltas(base, tuned):
    a, b = load_file(base.files[0]), load_file(tuned.files[0])
    return {name: b[name].double() - a[name].double() for name in a}


def error(found, expected):
    return (found.double() - expected.double()).abs()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi3", "llava"])
def test_at_full_rank_fusing_gives_the_tuned_model(name, dtype, pair, lab) -> None:
    base, tuned = pair(name, dtype=dtype)
    plan = extract(base, tuned, rank=999, modules_to_save=["glob:*"])
    fused = open_checkpoint(lab.write(fuse(open_checkpoint(f"{base.root}+{lab.write(plan)}"))))
    stored, found = load_file(tuned.files[0]), load_file(fused.files[0])
    old = load_file(base.files[0])
    assert found.keys() == stored.keys()
    for key, tensor in stored.items():
        rounding = torch.finfo(dtype).eps * tensor.double().abs()
        of_factors = 1e-6 * (tensor.double() - old[key].double()).abs().max()
        assert (error(found[key], tensor) <= rounding + of_factors).all(), key


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "qwen3", "gpt2", "phi3", "gemma3", "llava"]
)
def test_peft_loads_it_and_computes_the_same(name, pair, lab) -> None:
    base, tuned = pair(name)
    adapter = lab.write(extract(base, tuned, rank=4))
    fused = lab.write(fuse(open_checkpoint(f"{base.root}+{adapter}")))
    assert lab.missing(base.root, adapter) == []
    expected = lab.logits(lab.adapted(base.root, adapter))
    torch.testing.assert_close(lab.logits(lab.load(fused)), expected, rtol=1e-4, atol=1e-4)
    unchanged = lab.logits(lab.load(base.root))
    assert (expected - unchanged).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_bias", "qwen2", "gpt2"])
def test_peft_loads_modules_held_whole_and_biases(name, pair, lab) -> None:
    base, tuned = pair(name)
    adapter = lab.write(extract(base, tuned, rank=999, modules_to_save=["glob:*"]))
    expected = lab.logits(lab.load(tuned.root))
    found = lab.logits(lab.adapted(base.root, adapter))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_each_module_is_nearest_of_its_rank(rank, method, pair, lab) -> None:
    base, tuned = pair()
    plan = extract(base, tuned, rank=rank, method=method)
    report = run(plan, lab.fresh())
    factors = load_file(report.out / "adapter_model.safetensors")
    for name, delta in deltas(base, tuned).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" not in factors:
            continue
        squares = torch.linalg.svdvals(delta).square()
        a, b = (factors[f"{key}{x}.weight"].double() for x in "AB")
        assert (b.shape[1], a.shape[0]) == (rank, rank)
        best = squares[rank:].sum()
        left = (delta - b @ a).square().sum()
        assert left <= best * 1.02 + 1e-9
        energy = report.record["told"][f"{key}A.weight"]["energy"]
        assert energy == pytest.approx(float(1 - left / squares.sum()), abs=1e-5)


def test_a_sketch_finds_a_low_rank_to_rounding() -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((300, 5), (5, 200)))
    matrix = left @ right

    def blocks():
        return ((at, matrix[at : at + 64]) for at in range(0, 300, 64))

    assert 5 + OVERSAMPLING < 200
    found = decompose(blocks, (300, 200), rank=5, method="randomized", seed="x")
    a, b = found.factors()
    assert error(b @ a, matrix).max() < 1e-9
    assert found.share == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix)[:5])


@pytest.mark.parametrize("energy", [0.2, 0.6, 0.9, 1.0])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy, pair, lab) -> None:
    base, tuned = pair()
    plan = extract(base, tuned, energy=energy, method="exact")
    report = run(plan, lab.fresh())
    factors = load_file(report.out / "adapter_model.safetensors")
    for name, delta in deltas(base, tuned).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if key in factors:
            shares = torch.linalg.svdvals(delta).square().cumsum(0)
            wanted = int((shares < energy * shares[-1] * (1 - 1e-12)).sum()) + 1
            assert len(factors[key]) == wanted
            assert report.record["told"][key]["energy"] >= energy - 1e-9


def test_ranks_that_differ_are_patterns_with_scale_one(pair, lab) -> None:
    base, tuned = pair()
    out = lab.write(extract(base, tuned, energy=0.5))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["lora_alpha"] == config["r"]
    adapted = open_checkpoint(f"{base.root}+{out}")
    expected = lab.merged(base.root, out, out.parent / "theirs")
    found = lab.tensors(lab.write(fuse(adapted)))
    assert all(torch.allclose(found[n], t, rtol=2e-6, atol=1e-6) for n, t in expected.items())


def test_a_rank_caps_the_energy_and_says_so(pair) -> None:
    plan = extract(*pair(), energy=0.99, rank=3)
    assert plan.config is not None
    assert plan.config["r"] == 3
    assert any("keep less than the energy asked for" in note for note in plan.notes)


def test_modules_that_are_alike_are_left_out(pair) -> None:
    plan = extract(*pair(only="layers.2."), rank=2)
    assert plan.config is not None
    assert plan.config["target_modules"]
    assert all(".layers.2." in name for name in plan.config["target_modules"])
    assert all(".layers.2." in name for name in plan.order)


def test_what_differs_elsewhere_is_told_with_its_share(pair) -> None:
    base, tuned = pair()
    plan = extract(base, tuned, rank=2)
    squares = {name: float(delta.square().sum()) for name, delta in deltas(base, tuned).items()}
    outside = {n: s for n, s in squares.items() if "norm" in n or "embed" in n}
    left = plan.facts["not_represented"]
    assert left["tensors"] == len(outside)
    assert left["share"] == pytest.approx(sum(outside.values()) / sum(squares.values()))
    assert left["largest"][0] == "model.embed_tokens.weight"
    assert "model.embed_tokens.weight" in plan.notes[-1]


def test_experts_and_routers_are_left_to_the_note(pair) -> None:
    plan = extract(*pair("qwen3_moe"), rank=2)
    assert plan.config is not None
    names = plan.config["target_modules"]
    assert names
    assert not any("expert" in name or name.endswith("mlp.gate") for name in names)
    assert "tensors differ that the adapter does not hold" in plan.notes[-1]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["q_proj"], [], {"q_proj"}),
        (["glob:*.self_attn.*"], ["regex:[kv]_proj$"], {"q_proj", "o_proj"}),
        ([], ["mlp", "self_attn"], {"lm_head"}),
    ],
)
def test_filters_choose_modules(include, exclude, expected, pair) -> None:
    plan = extract(*pair(), rank=2, include=include, exclude=exclude)
    assert plan.config is not None
    assert {name.rpartition(".")[2] for name in plan.config["target_modules"]} == expected


REFUSED = [
    ({}, "needs --rank or --energy"),
    ({"rank": 0}, "--rank 0: is below 1"),
    ({"energy": 1.5}, r"is outside \(0, 1\]"),
    ({"rank": 2, "dtype": "int8"}, "is none of float32, bfloat16, float16"),
    ({"rank": 2, "include": ["nothing"]}, "--include nothing: matches no linear layer"),
    ({"rank": 2, "exclude": ["regex:("]}, "is no regular expression"),
    ({"rank": 2, "exclude": ["glob:"]}, "is empty"),
    ({"rank": 2, "modules_to_save": ["q_proj"]}, "matches no module that differs beside"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_a_wrong_ask_is_refused(options, message, pair) -> None:
    with pytest.raises(RecipeError, match=message):
        extract(*pair(), **options)


def test_models_that_do_not_fit_are_refused(pair, lab) -> None:
    base, _ = pair()
    with pytest.raises(RecipeError, match="has no tensor"):
        extract(base, open_checkpoint(lab.structure("llama_tied")), rank=2)
    with pytest.raises(RecipeError, match=r"differs from .* in no linear layer"):
        extract(base, base, rank=2)


def test_models_of_other_shapes_are_refused(pair, tmp_path) -> None:
    base, _ = pair()
    stored = load_file(base.files[0])
    save_file(stored | {"lm_head.weight": torch.ones(3, 32)}, tmp_path / "model.safetensors")
    with pytest.raises(RecipeError, match=r"lm_head.weight of shape \[3, 32\]"):
        extract(base, open_checkpoint(tmp_path / "model.safetensors"), rank=2)


def test_energy_needs_memory_for_its_largest_matrix(tmp_path) -> None:
    for name, fill in (("base", 0.0), ("tuned", 1.0)):
        made = {f"model.layers.{n}.up_proj.weight": torch.full((700, 700), fill) for n in range(2)}
        save_file(made, tmp_path / f"{name}.safetensors")
    sources = [open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    with pytest.raises(PlanError, match="MiB for its largest matrix, over the budget"):
        extract(*sources, energy=0.5, method="exact", memory=8 << 20)


def test_what_is_not_measured_is_told(pair, tmp_path) -> None:
    sources = []
    for number, source in enumerate(pair()):
        folder = tmp_path / str(number)
        folder.mkdir()
        stored = load_file(source.files[0]) | {"steps": torch.tensor([number])}
        save_file(stored, folder / "model.safetensors")
        sources.append(open_checkpoint(folder / "model.safetensors"))
    plan = extract(*sources, rank=2)
    assert "1 tensors differ that are not measured: steps" in plan.notes


def test_bare_files_are_named_as_on_disk(pair, lab) -> None:
    base, tuned = pair()
    bare = [open_checkpoint(source.files[0]) for source in (base, tuned)]
    plan = extract(*bare, rank=3)
    assert "named as on disk" in plan.notes[0]
    one, two = lab.write(plan), lab.write(extract(base, tuned, rank=3))
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_bytes_do_not_depend_on_workers(pair, lab) -> None:
    plan = extract(*pair(), rank=4)
    one, many = (lab.write(plan, workers=n) / "adapter_model.safetensors" for n in (1, 4))
    assert one.read_bytes() == many.read_bytes()


def test_the_command_tells_records_and_reproduces(pair, tmp_path, capsys) -> None:
    base, tuned = pair()
    out = tmp_path / "lora"
    words = ["lora", "extract", str(base.root), str(tuned.root), "--rank", "4", "-o", str(out)]
    assert main([*words, "--dry-run"]) == 0
    assert not out.exists()
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    total = sum(float(d.square().sum()) for n, d in deltas(base, tuned).items() if d.ndim == 2)
    assert 0.2 < told["energy_in_all"] < 0.8
    assert sum(told["facts"]["changes"].values()) < total
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "surgery.json",
    ]
    assert "library_name: peft" in (out / "README.md").read_text()
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert main(words) == 1
    assert main([*words, "--force"]) == 0
    assert "share kept (energy) in all: 0." in capsys.readouterr().out


def test_energy_in_all_weighs_modules_by_their_change(tmp_path) -> None:
    rng = torch.Generator().manual_seed(0)
    base = {f"model.layers.{n}.up_proj.weight": torch.zeros(20, 20) for n in range(2)}
    tuned = {n: torch.randn(20, 20, generator=rng) * (1 + 9 * ("1" in n)) for n in base}
    for name, made in (("base", base), ("tuned", tuned)):
        save_file(made, tmp_path / f"{name}.safetensors")
    sources = [open_checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    plan = extract(*sources, rank=3, method="exact")
    told = run(plan, tmp_path / "out").record["told"]
    squares = [torch.linalg.svdvals(t.double()).square() for t in tuned.values()]
    expected = sum(s[:3].sum() for s in squares) / sum(s.sum() for s in squares)
    assert energy_in_all(plan, told) == pytest.approx(float(expected), abs=1e-9)
