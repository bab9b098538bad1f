"""`surgery recurse`, and what other commands make of its results."""

from __future__ import annotations

import json
import shutil

import pytest

from cli.main import main

LOW = ["--blocks", "2", "--rank", "3"]


@pytest.fixture
def base(structure, tmp_path):
    path = tmp_path / "base"
    shutil.copytree(structure("llama"), path)
    return path


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["tie", "--blocks", "2"], [""]),
        (["tie", "--blocks", "2", "--tie-norms"], [""]),
        (["relax", *LOW], [""]),
        (["relax", *LOW, "--format", "dense"], [""]),
        (["relax", *LOW, "--format", "peft"], ["base", "adapter"]),
    ],
)
def test_results_verify_and_are_reproduced(words, made, base, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["recurse", words[0], str(base), *words[1:], "-o", str(out)]) == 0
    for part in made:
        assert main(["verify", str(out / part)]) == 0
        assert main(["reproduce", str(out / part)]) == 0
    told = capsys.readouterr()
    assert "failed" not in told.out
    assert "of the model's parameters" in told.err


def test_a_tied_model_loads_whole_by_verify(base, tmp_path, capsys):
    out = tmp_path / "out"
    main(["recurse", "relax", str(base), *LOW, "-o", str(out)])
    capsys.readouterr()
    assert main(["verify", str(out), "--json"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["loading"]["status"] == "ok"


@pytest.mark.parametrize("norms", [[], ["--tie-norms"]])
def test_inspect_tells_every_depth(norms, base, tmp_path, capsys):
    out = tmp_path / "out"
    main(["recurse", "tie", str(base), "--blocks", "2", *norms, "-o", str(out)])
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    told = capsys.readouterr().out
    assert "recursive  4 layers" in told
    assert "2 blocks run 2 times: " in told


def test_the_share_kept_is_told_by_linear_layer_with_its_rank(base, tmp_path, capsys):
    out = tmp_path / "out"
    main(["recurse", "relax", str(base), *LOW, "-o", str(out)])
    told = capsys.readouterr().out.splitlines()
    assert told[0].split("  ")[0] == "module"
    assert "share of the difference kept" in told[0]
    row = next(line.split() for line in told if line.startswith("self_attn.q_proj"))
    assert row[1] == "3"
    assert 0 < float(row[2]) < 1
    assert any(line.startswith("share kept (energy) in all: 0.") for line in told)


def test_a_form_larger_than_the_model_is_warned_of_first(base, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["recurse", "relax", str(base), "--blocks", "2", "--rank", "64", "-o", str(out)]
    assert main([*words, "--dry-run"]) == 0
    assert "warning the recursive form holds" in capsys.readouterr().out
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.err.startswith("warning: the recursive form holds ")
    assert "% of those in the layers: more than the model; take lower ranks" in told.err
    assert "a dense difference is smaller" in told.out


def test_an_adapters_figures_name_modules(base, tmp_path, capsys):
    out = tmp_path / "out"
    main(["recurse", "relax", str(base), *LOW, "--format", "peft", "-o", str(out)])
    told = capsys.readouterr().err
    assert "(energy): median" in told
    assert "base_model" not in told
    assert "lora_A" not in told


def test_untie_makes_a_base_and_an_adapter(base, tmp_path):
    tied, out = tmp_path / "tied", tmp_path / "out"
    main(["recurse", "relax", str(base), *LOW, "-o", str(tied)])
    assert main(["recurse", "untie", str(tied), "-o", str(out)]) == 0
    assert (out / "base" / "config.json").exists()
    assert (out / "adapter" / "adapter_config.json").exists()
    assert main(["verify", str(out / "base")]) == 0


def test_untie_without_factors_makes_one_model(base, tmp_path):
    tied, out = tmp_path / "tied", tmp_path / "out"
    main(["recurse", "tie", str(base), "--blocks", "2", "-o", str(tied)])
    assert main(["recurse", "untie", str(tied), "-o", str(out)]) == 0
    assert (out / "config.json").exists()


def test_nothing_is_written_by_a_dry_run(base, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["recurse", "relax", str(base), *LOW, "--format", "peft", "-o", str(out), "--dry-run"]
    assert main(words) == 0
    assert not out.exists()


def test_one_json_object_is_printed(base, tmp_path, capsys):
    for form in ("tied", "peft"):
        out = tmp_path / form
        main(["recurse", "relax", str(base), *LOW, "--format", form, "--json", "-o", str(out)])
        assert json.loads(capsys.readouterr().out)["output"] == str(out)


def test_eval_runs_a_recursive_model(fixtures_dir, tmp_path, capsys):
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("def main():\n    return 0\n" * 20)
    words = ["--blocks", "2", "--rank", "128", "-o", str(out)]
    main(["recurse", "relax", str(fixtures_dir / "base"), *words])
    capsys.readouterr()
    base = str(fixtures_dir / "base")
    assert main(["eval", base, str(out), "--text", str(text), "--bootstrap", "10", "--json"]) == 0
    assert "nan" not in capsys.readouterr().out.lower()


@pytest.fixture
def tied(fixtures_dir, tmp_path):
    out, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("x = 1\n")
    main(["recurse", "tie", str(fixtures_dir / "base"), "--blocks", "2", "-o", str(out)])
    return {"eval": ["eval", str(out), "--text", str(text)], "verify": ["verify", str(out)]}, out


def test_code_beside_the_weights_is_not_run_and_verify_tells_that_it_changed(tied, tmp_path):
    words, out = tied
    mark, code = tmp_path / "mark", out / "modeling_recursive.py"
    code.write_text(code.read_text() + f"\nopen({str(mark)!r}, 'w')\n")
    assert main(words["eval"]) == 0
    assert main(words["verify"]) == 3
    assert not mark.exists()


@pytest.mark.parametrize("command", ["eval", "verify"])
def test_code_of_another_format_is_refused(command, tied, capsys):
    words, out = tied
    code = out / "modeling_recursive.py"
    code.write_text(code.read_text().replace("FORMAT = 1", "FORMAT = 0"))
    assert main(words[command]) != 0
    told = capsys.readouterr()
    assert "is not of the installed version's format" in told.out + told.err


@pytest.mark.parametrize(
    "words",
    [
        ["stack", "--factor", "2"],
        ["expand", "--blocks", "1"],
        ["prune", "--layers", "1"],
        ["prune", "--method", "tail", "--layers", "1"],
        ["widen", "--factor", "2"],
        ["coalesce"],
        ["tleg", "--layers", "6"],
        ["lesa", "--blocks", "1"],
        ["upcycle", "--experts", "2"],
        ["sparsify", "--method", "magnitude", "--sparsity", "0.5"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
@pytest.mark.parametrize("made", [["tie", "--blocks", "2"], ["relax", *LOW]], ids=["tie", "relax"])
def test_what_shared_weights_cannot_undergo_is_refused(made, words, base, tmp_path, capsys):
    tied, out = tmp_path / "tied", tmp_path / "out"
    main(["recurse", made[0], str(base), *made[1:], "-o", str(tied)])
    capsys.readouterr()
    assert main([words[0], str(tied), *words[1:], "-o", str(out)]) == 1
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        f"surgery: {tied}: is a recursive model, whose layers share weights; "
        "write it out first: surgery recurse materialize"
    ]
    assert not told.out
    assert not out.exists()


@pytest.mark.parametrize("there", ["model", "file", "notes", "adapter"])
def test_parts_are_not_put_among_other_files(there, base, tmp_path, capsys):
    out = tmp_path / "out"
    if there == "model":
        main(["recurse", "relax", str(base), *LOW, "-o", str(out)])
    elif there == "file":
        out.write_text("mine")
    else:
        (out / there).mkdir(parents=True)
        (out / there / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    words = ["recurse", "relax", str(base), *LOW, "--format", "peft", "-o", str(out)]
    assert main(words) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_parts_are_replaced_with_force(base, tmp_path):
    out = tmp_path / "out"
    words = ["recurse", "relax", str(base), *LOW, "--format", "peft", "-o", str(out)]
    assert main(words) == 0
    assert main(words) == 1
    assert main([*words, "--force"]) == 0


def test_a_folder_of_parts_names_the_model_in_it(base, tmp_path, capsys):
    out = tmp_path / "out"
    main(["recurse", "relax", str(base), *LOW, "--format", "peft", "-o", str(out)])
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 1
    assert capsys.readouterr().err.endswith(f"name the model in it: {out / 'base'}\n")
