"""W = C + ratio * (B - A): exact to one rounding, and refused where the three do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from surgery.checkpoint import open_checkpoint
from surgery.errors import RecipeError
from surgery.run import run
from surgery.transfer import transfer

NAMES = ("new", "tuned", "old")
TOKENS = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "vocab_size": 6,
    "tie_word_embeddings": False,
}


def weights(seed, dtype, **more):
    rng = torch.Generator().manual_seed(seed)
    made = {
        "model.embed_tokens.weight": (6, 5),
        "lm_head.weight": (6, 5),
        "model.norm.weight": (5,),
    }
    made |= {f"model.layers.{n}.mlp.up_proj.weight": (7, 5) for n in range(2)}
    found = {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in made.items()}
    return found | {name: tensor for name, tensor in more.items() if tensor is not None}


def model(path, tensors, *, tokens=TOKENS):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    rows = len(tensors.get("model.embed_tokens.weight", ()))
    (path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": rows}))
    vocabulary = {"type": "BPE", "vocab": tokens, "merges": []}
    (path / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": []}))
    return path


@pytest.fixture
def three(tmp_path):
    """Write three models and open them; each argument changes one."""

    def make(dtype=torch.bfloat16, **changes):
        for seed, name in enumerate(NAMES):
            made = weights(seed, dtype) | changes.get(name, {})
            kept = {n: t for n, t in made.items() if t is not None}
            model(tmp_path / name, kept, tokens=changes.get(f"{name}_tokens", TOKENS))
        return [open_checkpoint(tmp_path / name) for name in NAMES]

    return make


def written(plan, out):
    return load_file(run(plan, out).out / "model.safetensors")


@pytest.mark.parametrize("ratio", [1.0, 0.3, -0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_weight_is_the_float64_result_to_one_rounding(dtype, ratio, three, tmp_path) -> None:
    new, tuned, old = (load_file(s.files[0]) for s in three(dtype))
    sources = [open_checkpoint(tmp_path / name) for name in NAMES]
    found = written(transfer(*sources, ratio=ratio), tmp_path / "out")
    for name, tensor in found.items():
        expected = new[name].double() + ratio * (tuned[name].double() - old[name].double())
        error = (tensor.double() - expected).abs()
        assert (error <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 2e-7).all()
        assert tensor.dtype == dtype


def test_without_a_difference_the_new_base_s_bytes_come_out(three, tmp_path) -> None:
    new, _, old = three()
    assert all(
        torch.equal(t, load_file(new.files[0])[n])
        for n, t in written(transfer(new, old, old), tmp_path / "out").items()
    )


def test_onto_the_old_base_the_tuned_model_s_bytes_come_out(three, tmp_path) -> None:
    _, tuned, old = three()
    assert all(
        torch.equal(t, load_file(tuned.files[0])[n])
        for n, t in written(transfer(old, tuned, old), tmp_path / "out").items()
    )


def test_config_files_and_dtype_are_the_new_base_s(three, tmp_path) -> None:
    new, tuned, old = three(tuned=weights(1, torch.float32))
    plan = transfer(new, tuned, old)
    assert plan.config == new.config
    assert plan.carried == new.carried
    assert {spec.dtype for spec in plan.outputs.values()} == {"BF16"}


def test_integers_are_kept_and_told(three, tmp_path) -> None:
    steps = {name: {"model.steps": torch.tensor([n])} for n, name in enumerate(NAMES)}
    plan = transfer(*three(**steps))
    assert "1 tensors that are no floats are the new base's: model.steps" in plan.notes
    assert written(plan, tmp_path / "out")["model.steps"].item() == 0


WIDER = {"model.embed_tokens.weight": torch.ones(8, 5, dtype=torch.bfloat16)}
REFUSED = [
    (
        {"old": {"model.norm.weight": None}},
        "old: has no tensor 'model.norm.weight', which .*new has",
    ),
    ({"tuned": {"more": torch.ones(1)}}, "new: has no tensor 'more', which .*tuned has"),
    ({"tuned": {"model.norm.weight": torch.ones(4)}}, r"has model.norm.weight of shape \[4\]"),
    ({"new": WIDER}, "--skip-embeddings keeps those of the new base"),
    ({"old": {"lm_head.weight": None}}, "has no tensor 'lm_head.weight'"),
    (
        {"old_tokens": TOKENS | {"b": 2, "c": 1}},
        r"another vocabulary than .*new: 'b' is 1 there and 2 here, and so are 2 in all",
    ),
    ({"old_tokens": {"a": 0}}, "'b' is 1 there and None here"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_read(change, message, three) -> None:
    with pytest.raises(RecipeError, match=message):
        transfer(*three(**change))


@pytest.mark.parametrize("ratio", [float("nan"), float("inf")])
def test_a_ratio_is_a_number(ratio, three) -> None:
    with pytest.raises(RecipeError, match="is not a number"):
        transfer(*three(), ratio=ratio)


@pytest.mark.parametrize(
    "change",
    [{"new": WIDER | {"lm_head.weight": None}}, {"old_tokens": {"a": 5}}, {"tuned": WIDER}],
)
def test_skipped_embeddings_are_the_new_base_s(change, three, tmp_path) -> None:
    new, tuned, old = three(**change)
    found = written(transfer(new, tuned, old, skip_embeddings=True), tmp_path / "out")
    stored = load_file(new.files[0])
    assert found.keys() == stored.keys()
    kept = {name for name, tensor in found.items() if torch.equal(tensor, stored[name])}
    assert kept == {"model.embed_tokens.weight", "lm_head.weight"} & stored.keys()


def test_an_adapter_is_moved_as_the_model_it_makes(three, tmp_path) -> None:
    new, _, old = three()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    factors = {f"{stem}A.weight": torch.ones(1, 5), f"{stem}B.weight": torch.ones(7, 1)}
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    tuned = open_checkpoint(f"{tmp_path}/old+{adapter}")
    found = written(transfer(new, tuned, old), tmp_path / "out")
    stored = load_file(new.files[0])
    for name, tensor in found.items():
        added = 2.0 if "layers.1." in name else 0.0
        assert torch.equal(tensor, (stored[name].float() + added).bfloat16())


def test_a_record_makes_it_again(three, tmp_path) -> None:
    three()
    out = str(tmp_path / "out")
    words = ["transfer", "--ratio", "0.5", "-o", out]
    for option, name in zip(("--new-base", "--tuned", "--old-base"), NAMES, strict=True):
        words += [option, str(tmp_path / name)]
    assert main(words) == 0
    assert main(["verify", out, "--no-load"]) == 0
    assert main(["reproduce", out]) == 0
