"""Which tensor of which model goes where: towers, tied heads, buffers, prefixes, dtypes."""

import json
import shutil

import pytest
import torch
from recipes import compiled
from safetensors.torch import load_file, save_file

from structures import load
from surgery.errors import PlanError, StepError
from surgery.run import run

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def average(*models, more=""):
    listed = ", ".join(str(model) for model in models)
    return f"{{models: [{listed}], merge_method: linear, parameters: {{weight: 1}}{more}}}"


def edit(model, out, *, config=None, **tensors):
    """A copy of a model with some tensors and config entries changed."""
    shutil.copytree(model, out)
    found = {**load_file(out / "model.safetensors"), **tensors}
    kept = {name: t.contiguous() for name, t in found.items() if t is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((out / "config.json").read_text()) | (config or {})
    (out / "config.json").write_text(json.dumps(document))
    return out


@pytest.fixture
def tied_and_not(structure, tmp_path):
    tied = structure("llama_tied")
    head = torch.zeros_like(load_file(tied / "model.safetensors")[EMBED])
    own = edit(tied, tmp_path / "own", config={"tie_word_embeddings": False}, **{HEAD: head})
    return tied, own, head


def test_tied_heads_stay_tied(structure, tmp_path):
    tied = structure("llama_tied")
    other = edit(tied, tmp_path / "other", **{"model.norm.weight": torch.ones(32)})
    run(compiled(average(tied, other)).plan, tmp_path / "out")
    model, info = load("llama_tied", tmp_path / "out")
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert HEAD not in load_file(tmp_path / "out/model.safetensors")


def test_a_head_that_one_model_ties_is_its_embedding(tied_and_not, tmp_path):
    tied, own, head = tied_and_not
    for donor, other, out in ((tied, own, "one"), (own, tied, "two")):
        plan = compiled(average(donor, other)).plan
        run(plan, tmp_path / out)
        found = load_file(tmp_path / out / "model.safetensors")
        assert torch.equal(found[HEAD], (found[EMBED] + head) / 2)
        model, info = load("llama", tmp_path / out)
        assert not any(info.values())
        assert not model.config.tie_word_embeddings
        assert any("the output has a head of its own" in note for note in plan.notes)


def test_a_stored_head_that_every_config_ties_is_left_out(structure, tmp_path):
    tied = structure("llama_tied")
    embedding = load_file(tied / "model.safetensors")[EMBED]
    both = [edit(tied, tmp_path / n, **{HEAD: embedding.clone()}) for n in ("one", "two")]
    plan = compiled(average(*both)).plan
    assert plan.dropped == {HEAD: "is tied to the embedding"}
    run(plan, tmp_path / "out")
    model, info = load("llama_tied", tmp_path / "out")
    assert not any(info.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_whole_numbers_are_copied_where_they_are_equal(flat, tmp_path):
    ids = torch.arange(6)
    a, b = (flat(name, v, buffer=ids) for name, v in (("a", 1.0), ("b", 3.0)))
    run(compiled(average(a, b)).plan, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["buffer"], ids)
    assert (found[HEAD] == 2).all()


def test_whole_numbers_that_differ_are_refused_and_nothing_is_left(flat, tmp_path):
    a, b = (flat(n, 1.0, buffer=torch.arange(6) + at) for n, at in (("a", 0), ("b", 1)))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StepError, match=r"buffer: holds whole numbers that differ between .*a"):
        run(compiled(average(a, b)).plan, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert before == [path for path in sorted(tmp_path.iterdir()) if path in before]


def test_a_buffer_that_models_make_anew_may_be_missing(flat):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    a, b = flat("a", 1.0, **{name: torch.ones(2)}), flat("b", 1.0)
    for models in ((a, b), (b, a)):
        assert compiled(average(*models)).plan.dropped == {name: "is made anew by every model"}


def test_a_prefix_that_only_one_model_has_is_seen_through(structure, tmp_path):
    model = structure("llama")
    tensors = load_file(model / "model.safetensors")
    bald = tmp_path / "bald"
    shutil.copytree(model, bald)
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, bald / "model.safetensors", metadata={"format": "pt"})
    run(compiled(average(model, bald)).plan, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


DTYPES = {
    "all alike": (("bfloat16", "bfloat16"), "", "BF16"),
    "two kinds of half": (("bfloat16", "float16"), "", "F32"),
    "single and half": (("float32", "bfloat16"), "", "F32"),
    "double": (("float64", "bfloat16"), "", "F64"),
    "told by dtype": (("float32", "float32"), ", dtype: bfloat16", "BF16"),
    "told by out_dtype": (("float32", "float32"), ", dtype: float16, out_dtype: bfloat16", "BF16"),
    "with torch's prefix": (("float32", "float32"), ", dtype: torch.float16", "F16"),
}


@pytest.mark.parametrize("name", DTYPES)
def test_the_output_has_the_dtype_that_holds_all_or_the_one_asked_for(name, structure, tmp_path):
    dtypes, more, wanted = DTYPES[name]
    model = structure("llama")
    tensors = load_file(model / "model.safetensors")
    models = [
        edit(model, tmp_path / f"{n}", config={"dtype": dtype}) for n, dtype in enumerate(dtypes)
    ]
    for path, dtype in zip(models, dtypes, strict=True):
        cast = {n: t.to(getattr(torch, dtype)) for n, t in tensors.items()}
        save_file(cast, path / "model.safetensors", metadata={"format": "pt"})
    plan = compiled(average(*models, more=more)).plan
    assert {spec.dtype for spec in plan.outputs.values()} == {wanted}
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
    assert plan.config["dtype"] == names[wanted]


def test_a_copy_in_another_dtype_is_rounded_once(flat, merged):
    a = flat("a", 1 / 3)
    out = merged(f"{{models: [{a}], merge_method: passthrough, dtype: float16}}")
    found = load_file(out)[HEAD]
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.full((7, 4), 1 / 3).half())


def test_a_passthrough_copies_bytes(structure):
    plan = compiled(f"{{models: [{structure('llama')}], merge_method: passthrough}}").plan
    assert all(step.is_copy for step in plan.steps)


def test_the_text_tower_is_merged_and_the_rest_is_the_donors(structure, tmp_path):
    model = structure("gemma3")
    changed = {k: v * 3 for k, v in load_file(model / "model.safetensors").items()}
    other = edit(model, tmp_path / "other", **changed)
    text = f"""
        modules:
          text_decoder:
            models: [{model}, {other}]
        merge_method: linear
        parameters: {{weight: 1}}
    """
    plan = compiled(text).plan
    run(plan, tmp_path / "out")
    before, after = (load_file(p / "model.safetensors") for p in (model, tmp_path / "out"))
    for name, tensor in after.items():
        times = 1 if "vision" in name or "projector" in name else 2
        torch.testing.assert_close(tensor, before[name] * times, rtol=1e-6, atol=0)
    assert {*plan.dropped} == {n for n in after if "vision" in n or "projector" in n}
    _, info = load("gemma3", tmp_path / "out")
    assert not any(info.values())


def test_a_text_model_is_merged_into_the_text_tower(structure, tmp_path):
    tower = structure("llava")
    tensors = load_file(tower / "model.safetensors")
    prefix = "language_model.model." if "language_model.model.norm.weight" in tensors else ""
    assert prefix
    plain = tmp_path / "plain"
    plain.mkdir()
    own = {n.removeprefix("language_model."): t * 3 for n, t in tensors.items() if prefix in n}
    own[HEAD] = next(t for n, t in tensors.items() if n.endswith(HEAD)) * 3
    save_file(own, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tower / "config.json").read_text())
    (plain / "config.json").write_text(
        json.dumps(
            config["text_config"]
            | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
        )
    )
    run(
        compiled(f"""
        modules:
          text_decoder:
            models: [{tower}, {plain}]
        merge_method: linear
        parameters: {{weight: 1}}
    """).plan,
        tmp_path / "out",
    )
    after = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in after.items():
        times = 2 if name.startswith("language_model.") else 1
        torch.testing.assert_close(tensor, tensors[name] * times, rtol=1e-6, atol=0)


def test_a_module_that_there_is_not_is_refused(structure):
    model = structure("gemma3")
    with pytest.raises(PlanError, match=r"'audio_tower', which .* has not; it has text_decoder"):
        compiled(f"""
            modules: {{audio_tower: {{models: [{model}]}}}}
            merge_method: passthrough
        """)


def test_the_donor_gives_config_and_files(structure, tmp_path):
    model = structure("llama")
    other = edit(model, tmp_path / "other", config={"rope_theta": 5e5, "rms_norm_eps": 1e-3})
    for more, wanted in (
        ("", 1e-06),
        (f", donor: {other}", 1e-3),
        (f", base_model: {other}", 1e-3),
    ):
        plan = compiled(average(model, other, more=more)).plan
        assert plan.config["rms_norm_eps"] == wanted
        assert any("differ in" in note and "rms_norm_eps" in note for note in plan.notes)
