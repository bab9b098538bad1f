"""Corners of recipes: vocabularies, predictor layers, shallow donors, modules that overlap."""

import json
import shutil
from textwrap import dedent

import pytest
import torch
from recipes import SHAPES, compiled
from safetensors.torch import load_file, save_file

from surgery.errors import PlanError, RecipeError
from surgery.recipe import load_recipe, load_recipes
from surgery.run import run

EMBED = "model.embed_tokens.weight"


def write(path, *, layers=5, config=None, **changes):
    """A directory with a model of constant weights."""
    path.mkdir()
    shapes = {
        n: s for n, s in SHAPES.items() if int((n + ".layers.0.").split(".layers.")[1][0]) < layers
    }
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()} | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    told = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 7}
    told |= {"num_hidden_layers": layers, "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(told | (config or {})))
    return path


def passthrough(*slices, more=""):
    lines = [f"  - sources: [{{model: {m}, layer_range: [{a}, {b}]}}]\n" for m, a, b in slices]
    return f"slices:\n{''.join(lines)}merge_method: passthrough\n{more}"


@pytest.fixture
def wordy(fixtures_dir, tmp_path):
    """The experts' base with one more token."""
    out = shutil.copytree(fixtures_dir / "uni", tmp_path / "wordy")
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    new = {**tokenizer["added_tokens"][0], "id": 1024, "content": "<|new|>"}
    tokenizer["added_tokens"].append(new)
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((out / "config.json").read_text()) | {"vocab_size": 1025}
    (out / "config.json").write_text(json.dumps(config))
    tensors = load_file(out / "model.safetensors")
    tensors[EMBED] = torch.cat([tensors[EMBED], torch.full((1, 128), 2.0).bfloat16()])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def averaged(*models, more=""):
    listed = ", ".join(map(str, models))
    return f"{{models: [{listed}], merge_method: linear, parameters: {{weight: 1}}{more}}}"


def test_vocabularies_that_differ_need_a_word(fixtures_dir, wordy):
    with pytest.raises(RecipeError) as caught:
        compiled(averaged(fixtures_dir / "arith", wordy))
    told = str(caught.value)
    assert told.startswith("recipe.yml, line 1, models: the vocabularies differ")
    assert "1024 is nothing and '<|new|>'" in told
    assert "tokenizer: {source: union}" in told


@pytest.mark.parametrize("source", ["union", "base", "wordy"])
def test_a_recipe_brings_models_to_one_vocabulary(source, fixtures_dir, wordy, surgery, tmp_path):
    rows = 1024 if source == "base" else 1025
    arith = fixtures_dir / "arith"
    told = wordy if source == "wordy" else source
    recipe = tmp_path / "merge.yml"
    recipe.write_text(averaged(arith, wordy, more=f", base_model: {arith}, tokenizer: {told}"))
    assert surgery("run", recipe, "-o", tmp_path / "out").code == 0
    found = load_file(tmp_path / "out/model.safetensors")
    assert found[EMBED].shape == (rows, 128)
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == rows
    one, two = (load_file(p / "model.safetensors")[EMBED].float() for p in (arith, wordy))
    assert torch.equal(found[EMBED][:1024], ((one + two[:1024]) / 2).bfloat16())
    if rows > 1024:  # a token that one model lacks is the other's
        assert (found[EMBED][1024] == 2).all()
    assert surgery("reproduce", tmp_path / "out").code == 0


def test_a_token_may_come_from_elsewhere(fixtures_dir, wordy, tmp_path):
    tokens = "{source: union, tokens: {<|new|>: {source: {kind: zero}, force: true}}}"
    more = f", tokenizer: {tokens}, chat_template: chatml"
    plan = compiled(averaged(fixtures_dir / "arith", wordy, more=more)).plan
    run(plan, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")[EMBED]
    assert (found[1024] == 0).all()
    assert "<|im_start|>" in (tmp_path / "out/chat_template.jinja").read_text()


def test_a_tokenizer_of_no_model_is_refused_at_its_place(fixtures_dir, wordy):
    other = f"{{kind: model_token, model: {wordy}, token: <|no|>}}"
    more = f", tokenizer: {{tokens: {{<|new|>: {{source: {other}}}}}}}"
    with pytest.raises(RecipeError, match=r"recipe.yml, line 1, tokenizer\.tokens\.<\|new\|>"):
        compiled(averaged(fixtures_dir / "arith", wordy, more=more))


def test_predictor_layers_stay_behind_the_last(tmp_path):
    predictor = {
        name.replace(".4.", ".5."): torch.full(s, 7.0)
        for name, s in SHAPES.items()
        if ".4." in name
    }
    model = write(tmp_path / "mtp", config={"num_nextn_predict_layers": 1}, **predictor)
    run(compiled(passthrough((model, 0, 4), (model, 1, 4))).plan, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    layers = [found[f"model.layers.{n}.input_layernorm.weight"].mean().item() for n in range(8)]
    assert layers == [1, 1, 1, 1, 1, 1, 1, 7]
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 7


def test_a_donor_too_shallow_for_the_layers_is_refused(tmp_path):
    deep, flat = write(tmp_path / "deep"), write(tmp_path / "flat", layers=3)
    assert compiled(passthrough((deep, 2, 5))).plan.config["num_hidden_layers"] == 3
    with pytest.raises(PlanError, match=r"takes layer 4, and the config comes from .*flat"):
        compiled(passthrough((deep, 2, 5), more=f"donor: {flat}"))


def test_a_donor_that_is_not_merged_gives_its_config_only(tmp_path):
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", config={"rms_norm_eps": 0.5})
    plan = compiled(passthrough((one, 0, 3), more=f"donor: {other}")).plan
    assert plan.config["rms_norm_eps"] == 0.5
    reasons = {*plan.dropped.values()}
    assert "only config, files or vocabulary of its model are used" in reasons


def test_modules_that_overlap_are_refused(structure):
    model = structure("gemma3")
    with pytest.raises(PlanError, match=r"modules.default: and text_decoder both hold"):
        compiled(f"""
            modules:
              text_decoder: {{models: [{model}]}}
              default: {{models: [{model}]}}
            merge_method: passthrough
        """)


def test_a_module_of_slices_changes_the_text_tower_alone(structure, tmp_path):
    from structures import load

    model = structure("llava")
    source = f"{{model: {model}, layer_range: [0, 4]}}"
    run(
        compiled(f"""
            modules:
              text_decoder: {{slices: [{{sources: [{source}]}}, {{sources: [{source}]}}]}}
            merge_method: passthrough
        """).plan,
        tmp_path / "out",
    )
    loaded, info = load("llava", tmp_path / "out")
    assert not any(info.values())
    assert loaded.config.text_config.num_hidden_layers == 8


def test_layers_built_otherwise_are_refused(tmp_path):
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", **{"model.layers.2.self_attn.q_proj.bias": torch.ones(4)})
    with pytest.raises(PlanError, match=r"layer 2 is not built like layer 0 of .*q_proj.bias"):
        compiled(f"""
            slices:
              - sources:
                  - {{model: {one}, layer_range: [0, 1]}}
                  - {{model: {other}, layer_range: [2, 3]}}
            merge_method: linear
            parameters: {{weight: 1}}
        """)


def test_weights_and_whole_numbers_do_not_mix(tmp_path):
    one, other = (
        write(tmp_path / "one"),
        write(tmp_path / "other", **{EMBED: torch.ones(7, 4).int()}),
    )
    with pytest.raises(PlanError, match=r"embed_tokens.weight: is F32 in .* and I32 in"):
        compiled(averaged(one, other))


def test_a_head_that_is_promised_and_missing_is_refused(tmp_path):
    one = write(tmp_path / "one")
    other = write(tmp_path / "other", **{"lm_head.weight": None})
    with pytest.raises(PlanError, match="does not tie the output head"):
        compiled(averaged(one, other))


def test_an_explanation_is_a_table_for_people(tmp_path, surgery):
    one = write(tmp_path / "one")
    answer = surgery("merge", "passthrough", one, "--scale", "mpl=2", "--explain")
    assert answer.code == 0
    assert answer.out.splitlines()[0].split() == ["tensor", "parameter", "model", "value", "why"]
    assert "note    --scale: the filter 'mpl' fits no tensor" in answer.out
    assert "nothing was written (--explain)" in answer.out


ALONE = {
    "--only": ("--only", "is for pipelines, and this is one recipe"),
    "--explain": ("--explain", "is for one recipe, and the file holds more"),
}


@pytest.mark.parametrize("name", ALONE)
def test_an_option_that_says_nothing_is_refused(name, tmp_path, surgery):
    one = write(tmp_path / "one")
    text = f"{{name: x, merge_method: passthrough, models: [{one}]}}\n"
    words = {"--only": ["--only", "x"], "--explain": ["--explain"]}[name]
    (tmp_path / "r.yml").write_text(text if name == "--only" else f"{text}---\n{text}")
    answer = surgery("run", tmp_path / "r.yml", *words)
    assert answer.code == 2
    assert ": ".join(ALONE[name]) in answer.err


def test_a_recipe_file_is_loaded_by_python(tmp_path):
    (tmp_path / "one.yml").write_text("{merge_method: linear, models: [a]}")
    (tmp_path / "two.yml").write_text(
        dedent("""\
        {merge_method: linear, models: [a]}
        ---
        {merge_method: linear, models: [b]}
    """)
    )
    assert load_recipe(tmp_path / "one.yml").models == ("a",)
    assert [recipe.models for recipe in load_recipes(tmp_path / "two.yml")] == [("a",), ("b",)]
    with pytest.raises(RecipeError, match="holds 2 recipes"):
        load_recipe(tmp_path / "two.yml")
