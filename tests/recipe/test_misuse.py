"""What people get wrong: one clear sentence each, before any weight is read, nothing left behind.

The rows are those that mergekit 0.1.5 answers with nothing at all, or a page of traceback.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from recipes import SHAPES
from safetensors.torch import load_file, save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 5,
    "vocab_size": 7,
    "hidden_size": 4,
    "tie_word_embeddings": False,
}
ALL = {"weight": 1, "density": 0.5}


def recipe(method="linear", models=("a", "b"), base=None, more="", **parameters):
    """A recipe as people write them."""
    lines = [f"merge_method: {method}", "models:", *(f"  - model: {m}" for m in models)]
    lines += [f"base_model: {base}"] if base else []
    lines += ["parameters:", *(f"  {k}: {v}" for k, v in parameters.items())] * bool(parameters)
    return "\n".join(lines) + f"\n{more}"


def sliced(layer_range, *, second=""):
    return dedent(f"""\
        slices:
          - sources:
              - {{model: a, layer_range: {layer_range}}}
              {second}
        merge_method: {"linear" if second else "passthrough"}
        parameters: {{{"weight: 1" if second else ""}}}
    """)


# Recipe, and what the one line must hold: place, fact, remedy.
PLANNED = {
    "a range that runs backwards": (
        sliced("[3, 1]"),
        ("recipe.yml, line 3, slices[0].sources[0].layer_range", "[3, 1]", "did you mean [1, 3]?"),
    ),
    "a range beyond the last layer": (
        sliced("[0, 9]"),
        ("recipe.yml, line 3", "asks for layer 8, but a has layers 0 to 4", "not included"),
    ),
    "a range below the first layer": (
        sliced("[-2, 3]"),
        ("line 3", "starts below 0", "count from"),
    ),
    "an empty range": (sliced("[2, 2]"), ("line 3", "holds no layers", "[2, 3] is layer 2")),
    "ranges of different length": (
        sliced("[0, 3]", second="- {model: b, layer_range: [0, 2]}"),
        ("slices[0]", "3 of a, 2 of b", "the same number of layers"),
    ),
    "a method with a dash": (
        recipe("dare-ties", base="a", **ALL),
        ("line 1, merge_method", "'dare-ties' is no merge method", "did you mean dare_ties?"),
    ),
    "a misspelt parameter": (
        recipe("ties", base="a", weight=1, densty=0.5),
        ("line 8, parameters.densty", "no parameter 'densty'", "did you mean 'density'?"),
    ),
    "another misspelt parameter": (
        recipe("ties", base="a", weight=1, lamda=0.5),
        ("parameters.lamda", "no parameter 'lamda'", "did you mean 'lambda'?"),
    ),
    "a misspelt required parameter": (
        recipe(wieght=1),
        ("parameters.wieght", "no parameter 'wieght'", "did you mean 'weight'?"),
    ),
    "a missing required parameter": (
        recipe(),
        ("line 3, models[0]", "has no value for the parameter weight", "give weight"),
    ),
    "a misspelt block": (
        recipe(more="paramters: {weight: 1}"),
        ("line 5, paramters", "unknown key 'paramters'", "did you mean 'parameters'?"),
    ),
    "a misspelt dtype": (
        recipe(weight=1, more="dtpye: float16"),
        ("line 7, dtpye", "unknown key", "did you mean 'dtype'?"),
    ),
    "a misspelt out_dtype": (
        recipe(weight=1, more="out_dtyp: float16"),
        ("line 7, out_dtyp", "unknown key", "did you mean 'out_dtype'?"),
    ),
    "no dtype": (
        recipe(weight=1, more="dtype: bfloat"),
        ("line 7, dtype", "'bfloat' is no dtype", "did you mean 'bfloat16'?"),
    ),
    "a dtype that is not for weights": (
        recipe(weight=1, more="dtype: float8"),
        ("line 7, dtype", "'float8' is no dtype", "float"),
    ),
    "a density above one": (
        recipe("ties", base="a", weight=1, density=7),
        ("parameters.density", "density 7.0 is outside", "1]"),
    ),
    "a density below zero": (
        recipe("ties", base="a", weight=1, density=-1),
        ("parameters.density", "density -1.0 is outside", "1]"),
    ),
    "a weight that is no number": (
        recipe(weight=".nan"),
        ("parameters.weight", "weight is nan", "finite"),
    ),
    "a weight that is a word": (
        recipe(weight="half"),
        ("parameters.weight", "'half'", "not a number"),
    ),
    "a filter that leaves tensors without a value": (
        recipe(more="parameters: {weight: {filter: mlp, value: 0}}"),
        ("models[0]", "weight for lm_head.weight, which no filter fits", "give weight"),
    ),
    "weights that sum to zero": (
        dedent("""\
            models:
              - {model: a, parameters: {weight: 1}}
              - {model: b, parameters: {weight: -1}}
            merge_method: linear
        """),
        ("line 1, models, weight of lm_head.weight", "1, -1 sum to zero", "normalize to false"),
    ),
    "no base": (
        recipe("ties", **ALL),
        ("line 2, models", "ties needs a base model", "add base_model"),
    ),
    "a base that a slice does not name": (
        dedent("""\
            slices:
              - sources: [{model: b, layer_range: [0, 5]}]
            merge_method: task_arithmetic
            base_model: a
            parameters: {weight: 1}
        """),
        ("line 2, slices[0]", "does not name the base 'a'", "add it to the sources"),
    ),
    "too many models": (
        recipe("slerp", models=("a", "b", "c"), base="a", t=0.5),
        ("models", "slerp takes exactly 1 model beside the base", "2 (b, c)"),
    ),
    "a model named twice": (
        recipe(models=("a", "a"), weight=1),
        ("line 4, models[1]", "names 'a' twice", "once"),
    ),
    "a model named in two ways": (
        recipe(models=("a", "./a"), weight=1),
        ("./a", "is the same model as a", "once"),
    ),
    "models and slices": (
        recipe(weight=1, more="slices: [{sources: [{model: a, layer_range: [0, 1]}]}]"),
        ("recipe.yml", "has models and slices", "exactly one"),
    ),
    "no models": ("merge_method: linear\n", ("recipe.yml", "has none of models", "exactly one")),
    "no method": (
        "models: [a, b]\n",
        ("recipe.yml", "has no merge_method", "merge_method: linear"),
    ),
    "an older filter": (
        recipe(more="parameters: {weight: [{pattern: mlp, value: 1}]}"),
        ("parameters.weight[0]", "unknown key 'pattern'", "filter and value"),
    ),
    "no regular expression": (
        recipe(more="parameters: {weight: [{filter: {regex: '('}, value: 1}]}"),
        ("filter", "'(' is no regular expression", "unterminated"),
    ),
    "broken YAML": (
        "models: [a, b\nmerge_method: linear\n",
        ("recipe.yml, line", "is not YAML", ""),
    ),
    "an empty file": ("", ("recipe.yml", "is empty", "write at least")),
    "a list": ("- a\n- b\n", ("recipe.yml, line 1", "a list, not a table", "merge_method")),
    "a key twice": (
        recipe(weight=1, more="merge_method: ties"),
        ("line 7", "the key 'merge_method' stands twice", "keep one"),
    ),
    "a key that is a number": (
        recipe(more="parameters: {1: 2}"),
        ("line 5", "the key '1' is no word", "quotes"),
    ),
    "no such path": (
        recipe(models=("a", "./nowhere"), weight=1),
        ("./nowhere", "does not exist", "name a"),
    ),
    "a truncated shard": (
        recipe(models=("a", "truncated"), weight=1),
        ("truncated/model.safetensors", "but the file has", "copy the file again"),
    ),
    "a missing shard": (
        recipe(models=("a", "unsharded"), weight=1),
        ("unsharded/model-2.safetensors", "is missing", "copy it again"),
    ),
    "a missing tensor": (
        recipe(models=("a", "less"), weight=1),
        ("less", "has no tensor 'model.norm.weight', which a has", "one architecture"),
    ),
    "a tensor too many": (
        recipe(models=("a", "more"), weight=1),
        ("more", "has a tensor 'model.layers.1.self_attn.q_proj.bias'", "one architecture"),
    ),
    "another hidden size": (
        recipe(models=("a", "wide"), weight=1),
        ("lm_head.weight", "[7, 4] in a and [7, 6] in wide", "one size"),
    ),
    "another number of layers": (
        recipe(models=("a", "deep"), weight=1),
        ("deep", "has 6 layers, and a has 5", "layer_range"),
    ),
    "another vocabulary": (
        recipe(models=("a", "wordy"), weight=1),
        ("recipe.yml", "a has 7 rows for its tokens, wordy has 9", "tokenizer: {source: union}"),
    ),
    "fp8 without scales": (
        recipe(models=("a", "codes"), weight=1),
        ("codes", "F8_E4M3", "quanti"),
    ),
    "no config": (
        recipe(models=("a", "bald"), weight=1),
        ("bald", "holds no config.json", "name the .safetensors file"),
    ),
    "a pickle": (
        recipe(models=("a", "old"), weight=1),
        ("old", "pickled weights", "surgery convert"),
    ),
}
USAGE = 2
FAILED = {  # what is wrong with a model rather than with the recipe
    *("a range beyond the last layer", "ranges of different length", "no such path"),
    *("a model named in two ways", "a truncated shard", "a missing shard", "a missing tensor"),
    *("a tensor too many", "another hidden size", "another number of layers"),
    *("fp8 without scales", "no config", "a pickle"),
}
SCRIPT = """
import contextlib, io, json, os, sys
from cli.main import main
answers = {}
for name, text in json.load(sys.stdin).items():
    with open("recipe.yml", "w") as file:
        file.write(text)
    before, out, err = sorted(os.listdir()), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["run", "recipe.yml", "-o", "out"])
    left = sorted(set(os.listdir()) - set(before))
    answers[name] = [code, out.getvalue(), err.getvalue(), left, "torch" in sys.modules]
print(json.dumps(answers))
"""


def write(path: Path, tensors, config=LLAMA):
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))


def of(shapes, value=1.0):
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of good and of broken models."""
    root = tmp_path_factory.mktemp("misuse")
    for name, value in {"a": 1.0, "b": 2.0, "c": 4.0, "truncated": 1.0}.items():
        write(root / name, of(SHAPES, value))
    file = root / "truncated/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    write(root / "less", {k: v for k, v in of(SHAPES).items() if k != "model.norm.weight"})
    write(root / "more", of({**SHAPES, "model.layers.1.self_attn.q_proj.bias": (4,)}))
    wide = {name: tuple(6 if n == 4 else n for n in shape) for name, shape in SHAPES.items()}
    write(root / "wide", of(wide), LLAMA | {"hidden_size": 6})
    sixth = {n.replace(".4.", ".5."): s for n, s in SHAPES.items() if ".layers.4." in n}
    write(root / "deep", of({**SHAPES, **sixth}), LLAMA | {"num_hidden_layers": 6})
    wordy = {name: tuple(9 if n == 7 else n for n in shape) for name, shape in SHAPES.items()}
    write(root / "wordy", of(wordy), LLAMA | {"vocab_size": 9})
    fp8 = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    write(root / "codes", of(SHAPES) | fp8)
    write(root / "bald", of(SHAPES), None)
    torch_file = shutil.copytree(root / "a", root / "old") / "model.safetensors"
    torch_file.rename(torch_file.with_name("pytorch_model.bin"))
    infinite = of(SHAPES) | {"model.norm.weight": torch.tensor([1.0, float("nan"), 1.0, 1.0])}
    write(root / "sick", infinite)
    _shard(root / "unsharded", of(SHAPES))
    return root


def _shard(path, tensors):
    write(path, tensors)
    (path / "model.safetensors").unlink()
    names = list(tensors)
    halves = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    save_file({n: tensors[n] for n in names[:5]}, path / "model-1.safetensors")
    table = {name: file for file, own in halves.items() for name in own}
    index = {"metadata": {}, "weight_map": table}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def answers(models):
    """What a program without torch answers to each."""
    texts = {name: text for name, (text, _) in PLANNED.items()}
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=models,
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(found.stdout)


@pytest.mark.parametrize("name", PLANNED)
def test_it_is_told_in_one_clear_line(name, answers):
    code, out, err, left, torch_loaded = answers[name]
    for part in PLANNED[name][1]:
        assert part in err
    assert err.startswith("surgery: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not out
    assert code == (1 if name in FAILED else USAGE), err
    assert not left
    assert not torch_loaded


def test_a_result_that_is_not_finite_is_refused_when_it_is_made(models, surgery, monkeypatch):
    monkeypatch.chdir(models)
    before = sorted(models.iterdir())
    recipe_file = models / "recipe.yml"
    recipe_file.write_text(recipe(models=("a", "sick"), weight=1))
    answer = surgery("run", recipe_file, "-o", "made")
    assert answer.code == 1
    assert "model.norm.weight: the result holds NaN or infinity; check the inputs" in answer.err
    assert sorted(models.iterdir()) == sorted({*before, recipe_file})


def test_an_output_that_exists_is_kept(models, surgery, monkeypatch, tmp_path):
    monkeypatch.chdir(models)
    (tmp_path / "recipe.yml").write_text(recipe(weight=1))
    assert surgery("run", tmp_path / "recipe.yml", "-o", tmp_path / "made").code == 0
    again = surgery("run", tmp_path / "recipe.yml", "-o", tmp_path / "made")
    assert again.code == 1
    assert "exists already; choose another output, or replace it with --force" in again.err
    assert surgery("run", tmp_path / "recipe.yml", "-o", tmp_path / "made", "--force").code == 0
    names = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors", "surgery.json"]
    assert (load_file(tmp_path / "made/model.safetensors")["lm_head.weight"] == 1.5).all()
