"""`surgery merge`, `soup` and `run`: flags, explanations, dry runs, records, the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import LAYERS, told
from safetensors.torch import load_file

from cli.main import main
from surgery.method import method_names

HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"
Q, UP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture
def three(flat):
    return flat("a", 1.0), flat("b", 2.0), flat("c", 4.0)


# Options of `merge linear a b --no-normalize`, and what q_proj and up_proj of each layer become.
FLAGS = {
    "one for all": (["--weight", "0.5"], [1.5] * 5, [1.5] * 5),
    "one for each": (["--weight", "1,10"], [21] * 5, [21] * 5),
    "a gradient": (["--weight", "[0,1]"], [0, 0.75, 1.5, 2.25, 3], [0, 0.75, 1.5, 2.25, 3]),
    "a gradient for each": (["--weight", "[0,4],[2,0]"], [4, 4, 4, 4, 4], [4, 4, 4, 4, 4]),
    "a name": (["--weight", "mlp=1,3", "--weight", "1"], [3] * 5, [7] * 5),
    "a name last": (["--weight", "1", "--weight", "mlp=0"], [3] * 5, [0] * 5),
    "a glob": (["--weight", "glob:*q_proj*=0", "--weight", "1"], [0] * 5, [3] * 5),
    "a regex": (
        [r"--weight", r"regex:layers\.[01]\.=0", "--weight", "1"],
        [0, 0, 3, 3, 3],
        [0, 0, 3, 3, 3],
    ),
}


@pytest.mark.parametrize("name", FLAGS)
def test_parameters_are_flags(name, three, surgery, tmp_path):
    words, wanted, wanted_up = FLAGS[name]
    a, b, _ = three
    out = tmp_path / "out.safetensors"
    answer = surgery("merge", "linear", a, b, "--no-normalize", *words, "-o", out)
    assert answer.code == 0, answer.err
    found = told(out)
    assert [found[Q.format(n)] for n in range(LAYERS)] == pytest.approx(wanted)
    assert [found[UP.format(n)] for n in range(LAYERS)] == pytest.approx(wanted_up)


def test_the_base_is_a_flag(three, surgery, tmp_path):
    a, b, c = three
    out = tmp_path / "out.safetensors"
    words = ["--base", a, "--weight", "1", "--lambda", "0.5"]
    assert surgery("merge", "task_arithmetic", b, c, *words, "-o", out).code == 0
    assert set(told(out).values()) == {3}


MISTAKES = {
    "another number of values": (["--weight", "1,2,3"], "--weight: has 3 values for 2 models"),
    "a misspelt value": (["--weight", "half"], "--weight: weight 'half' is not a number"),
    "an open bracket": (["--weight", "[0,1"], "--weight [0,1: has an open bracket"),
    "nothing": (["--weight", ","], "--weight: has an empty value"),
    "twice": (["--weight", "1", "--weight", "2"], "--weight: is given twice without a name"),
    "numbers that vary": (["--weight", "mlp=1,2", "--weight", "1,2,3"], "names another number"),
    "no weight": ([], "the models: has no value for the parameter weight; give weight (--weight)"),
    "an unknown option": (["--densty", "1"], "No such option: --densty"),
    "no dtype": (["--weight", "1", "--dtype", "half"], "'half' is no dtype"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_flag(name, three, surgery, tmp_path):
    words, wanted = MISTAKES[name]
    answer = surgery("merge", "linear", *three[:2], *words, "-o", tmp_path / "out.safetensors")
    assert answer.code == 2
    assert wanted in answer.err
    assert not (tmp_path / "out.safetensors").exists()


def test_a_gradient_needs_brackets_where_there_is_one_value(three, surgery):
    answer = surgery("merge", "slerp", three[1], "--base", three[0], "--t", "0,1")
    assert (
        "--t 0,1: has one value for all models; for a gradient over depth write [0,1]" in answer.err
    )


def test_help_lists_every_method_in_a_line(surgery):
    told_help = surgery("merge", "--help").out
    for name in method_names():
        assert f"\n  {name} " in told_help


@pytest.mark.parametrize("method", method_names())
def test_every_method_has_a_command(method, surgery):
    answer = surgery("merge", method, "--help")
    assert answer.code == 0
    assert f"Usage: surgery merge {method}" in answer.out


def test_an_unknown_method_gets_a_suggestion(surgery):
    answer = surgery("merge", "dare-ties", "a", "b")
    assert answer.code == 2
    assert "dare-ties: is no merge method; did you mean dare_ties?" in answer.err


def test_a_soup_is_the_plain_average(three, surgery, tmp_path):
    out = tmp_path / "soup.safetensors"
    assert surgery("soup", *three, "-o", out).code == 0
    assert set(told(out).values()) == {round(7 / 3, 5)}


def test_the_output_stands_beside_the_donor_by_default(three, surgery, tmp_path):
    assert surgery("soup", *three).code == 0
    assert (tmp_path / "a-linear.safetensors").exists()


RECIPE = """\
models:
  - model: {a}
  - model: {b}
    parameters:
      weight:
        - filter: mlp
          value: [0, 1]
        - value: 2
base_model: {c}
merge_method: task_arithmetic
parameters:
  weight: 1
"""


@pytest.fixture
def explained(three, surgery, tmp_path):
    a, b, c = three
    (tmp_path / "merge.yml").write_text(RECIPE.format(a=a, b=b, c=c))
    return surgery("run", tmp_path / "merge.yml", "--explain", "--json"), b


def test_an_explanation_tells_the_number_of_each_tensor_and_why(explained, tmp_path):
    answer, b = explained
    rows = json.loads(answer.out)["explain"]
    assert {row["tensor"] for row in rows} > {EMBED, HEAD, Q.format(0)}
    found = {
        (r["tensor"], r["model"]): (r["value"], r["why"])
        for r in rows
        if r["parameter"] == "weight"
    }
    file = tmp_path / "merge.yml"
    place = f"{file}, line {{}}, models[1].parameters.weight[{{}}]"
    wanted = {
        UP.format(1): (0.25, place.format(6, 0) + ", filter mlp, at 0.25 of the gradient"),
        Q.format(1): (2.0, place.format(8, 1)),
        EMBED: (2.0, place.format(8, 1)),
    }
    assert {name: found[name, str(b)] for name in wanted} == wanted
    others = {why for (_, model), (value, why) in found.items() if model != str(b)}
    assert others == {f"{file}, line 12, parameters.weight"}
    defaults = {r["why"] for r in rows if r["parameter"] == "lambda"}
    assert defaults == {"the default"}


def test_an_explanation_writes_nothing(explained, tmp_path):
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".safetensors") == ["merge.yml"]
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_dry_run_tells_the_work_and_writes_nothing(three, surgery, tmp_path):
    words = ["merge", "linear", *three, "--weight", "1", "--dry-run", "--json"]
    found = json.loads(surgery(*words, "-o", tmp_path / "out.safetensors").out)
    assert found["work"]["linear"]["steps"] == found["tensors"] == 3 * LAYERS + 3
    assert found["inputs"] == [str(path) for path in three]
    assert not (tmp_path / "out.safetensors").exists()


def test_a_merge_is_made_again_from_its_record(three, surgery, tmp_path):
    out = tmp_path / "out.safetensors"
    words = [
        "--base",
        three[0],
        "--weight",
        "1,0.5",
        "--density",
        "mlp=[0.2,0.9]",
        "--density",
        "0.5",
    ]
    assert surgery("merge", "dare_ties", *three[1:], *words, "--seed", "3", "-o", out).code == 0
    answer = surgery("reproduce", out, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["identical"] == 3 * LAYERS + 3


def test_the_record_holds_the_recipe_and_every_number_but_no_path(three, surgery, tmp_path):
    from surgery.checkpoint import open_checkpoint
    from surgery.provenance import read_record

    out = tmp_path / "out.safetensors"
    words = ["--weight", "1,3", "--dtype", "float32"]
    assert surgery("merge", "linear", *three[:2], *words, "-o", out).code == 0
    record = read_record(open_checkpoint(out))
    assert record["operation"] == "merge"
    assert record["parameters"] == {
        "recipe": {
            "merge_method": "linear",
            "models": [
                {"model": "a", "parameters": {"weight": "1"}},
                {"model": "b", "parameters": {"weight": "3"}},
            ],
            "out_dtype": "float32",
        },
        "models": ["a", "b"],
    }
    assert record["facts"]["resolved"] == {"weight": [1.0, 3.0], "normalize": True}


SCRIPT = "import sys; from cli.main import main; sys.exit(main(sys.argv[1:]))"
MANY = """\
models: [{uni}, {arith}]
merge_method: dare_linear
base_model: {base}
parameters:
  weight: 0.5
  density: [{{filter: self_attn, value: 0.3}}, {{value: [0.9, 0.5]}}]
seed: 5
"""


def test_the_bytes_do_not_depend_on_the_hash_seed_or_the_workers(fixtures_dir, tmp_path):
    paths = {name: fixtures_dir / name for name in ("base", "uni", "arith")}
    (tmp_path / "merge.yml").write_text(MANY.format(**paths))
    for seed, workers in (("0", "1"), ("3", "4")):
        words = ["run", "merge.yml", "-o", f"out{seed}", "--workers", workers]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SCRIPT, *words]
        subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=120, capture_output=True)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / o).iterdir()} for o in ("out0", "out3")
    )
    assert one == two


def test_without_a_base_the_first_model_gives_config_and_files(fixtures_dir, surgery, tmp_path):
    words = ["--weight", "1", "-o", tmp_path / "out"]
    assert (
        surgery("merge", "linear", fixtures_dir / "arith", fixtures_dir / "uni", *words).code == 0
    )
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert found == json.loads((fixtures_dir / "arith" / name).read_text())


def test_five_lines_of_python_do_the_same(fixtures_dir, surgery, tmp_path):
    from surgery.recipe import compile, merge_models
    from surgery.run import run

    uni, arith = fixtures_dir / "uni", fixtures_dir / "arith"
    recipe = merge_models("linear", [uni, arith], weight=[0.25, 0.75])
    run(compile(recipe), tmp_path / "one")
    words = ["--weight", "0.25,0.75", "-o", tmp_path / "two"]
    assert surgery("merge", "linear", uni, arith, *words).code == 0
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_recipe_without_an_output_is_written_where_one_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fixtures = Path(__file__).parents[2] / "fixtures"
    models = "".join(
        f"- {{model: {fixtures / n}, parameters: {{weight: 1}}}}\n" for n in ("uni", "v2")
    )
    (tmp_path / "mine.yml").write_text(f"merge_method: linear\nmodels:\n{models}")
    assert main(["run", "mine.yml"]) == 0
    assert (tmp_path / "mine" / "config.json").exists()


def test_a_misspelt_choice_of_tokenizer_is_no_models_name(capsys):
    fixtures = Path(__file__).parents[2] / "fixtures"
    words = ["merge", "linear", str(fixtures / "uni"), str(fixtures / "v2"), "--weight", "1"]
    assert main([*words, "--tokenizer", "unoin"]) == 2
    assert "did you mean union?" in capsys.readouterr().err


def test_a_soup_of_one_model_is_refused(tmp_path, capsys):
    fixtures = Path(__file__).parents[2] / "fixtures"
    assert main(["soup", str(fixtures / "uni"), "-o", str(tmp_path / "out")]) == 2
    assert "soup: has one model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
