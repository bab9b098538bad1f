"""`surgery reproduce` makes it again, and says what is not as it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from surgery.provenance import sealed

COMMANDS = {
    "stack": ["stack", "--factor", "2"],
    "stack, scaled": ["stack", "--map", "0-3,1-3", "--scale", "0.5"],
    "expand": ["expand", "--blocks", "2"],
    "prune": ["prune", "--layers", "1-2"],
}


@pytest.fixture
def base(structure, tmp_path):
    return shutil.copytree(structure("llama"), tmp_path / "base")


@pytest.fixture
def made(base, tmp_path):
    out = tmp_path / "made"
    assert main(["stack", str(base), "--factor", "2", "-o", str(out)]) == 0
    return out


def reproduce(capsys, *words):
    """Exit code, the JSON object where there is one, and what went to stderr."""
    capsys.readouterr()
    code = main(["reproduce", *map(str, words), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


def edit_record(path, **changes):
    record = json.loads((path / "surgery.json").read_text()) | changes
    record.pop("seal")
    (path / "surgery.json").write_text(sealed(record, indent=2) + "\n")


def change_a_value(base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_was_made_is_made_again(name, base, tmp_path, capsys):
    command, *options = COMMANDS[name]
    assert main([command, str(base), *options, "-o", str(tmp_path / "out")]) == 0
    before = sorted(tmp_path.rglob("*"))
    code, told, _ = reproduce(capsys, tmp_path / "out")
    outputs = json.loads((tmp_path / "out" / "surgery.json").read_text())["outputs"]
    assert code == 0
    assert told["reproduced"] is True
    assert told["identical"] == len(outputs)
    assert (told["inputs"], told["outputs"], told["versions"]) == ([], [], [])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bare_file_is_made_again(base, tmp_path, capsys):
    out = tmp_path / "made.safetensors"
    assert main(["stack", str(base / "model.safetensors"), "--factor", "2", "-o", str(out)]) == 0
    assert reproduce(capsys, out)[0] == 0


def test_a_conversion_is_made_again(base, tmp_path, capsys):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    out = tmp_path / "out"
    assert main(["convert", str(base), "-o", str(out)]) == 0
    code, told, _ = reproduce(capsys, out)
    assert (code, told["operation"]) == (0, "convert")


def test_the_words_say_how_many_tensors_are_identical(made, capsys):
    capsys.readouterr()
    assert main(["reproduce", str(made)]) == 0
    assert capsys.readouterr().out == "reproduced: 75 tensors identical (stack)\n"


def test_written_again_it_is_the_same_to_the_byte(made, tmp_path, capsys):
    assert reproduce(capsys, made, "-o", tmp_path / "again")[0] == 0
    assert contents(tmp_path / "again") == contents(made)


def test_a_changed_value_of_an_input_is_named(base, made, capsys):
    change_a_value(base)
    code, told, err = reproduce(capsys, made)
    assert code == 3
    assert told["reproduced"] is False
    assert told["inputs"] == [f"{base}: model.safetensors is not what was recorded"]
    assert told["outputs"] == [
        f"model.layers.{layer}.mlp.up_proj.weight: came out different" for layer in (1, 5)
    ]
    assert told["identical"] == 73
    assert f"{base}: model.safetensors is not what was recorded" in err


def test_an_input_of_another_size_is_refused_before_it_is_read(base, made, structure, capsys):
    shutil.copy(structure("llama_bias") / "model.safetensors", base)
    code, told, err = reproduce(capsys, made)
    assert (code, told) == (3, None)
    assert "is not the input recorded: model.safetensors has" in err


def test_another_value_in_the_record_is_a_difference(made, capsys):
    outputs = json.loads((made / "surgery.json").read_text())["outputs"]
    edit_record(made, outputs=outputs | {"model.norm.weight": "0" * 64})
    code, told, _ = reproduce(capsys, made)
    assert (code, told["outputs"]) == (3, ["model.norm.weight: came out different"])


def test_a_config_that_changed_in_the_input_is_a_difference(base, made, capsys):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    code, told, _ = reproduce(capsys, made)
    assert (code, told["outputs"]) == (3, ["config.json: came out different"])


def test_another_version_is_told_and_does_not_fail(made, capsys):
    versions = json.loads((made / "surgery.json").read_text())["versions"]
    edit_record(made, versions=versions | {"surgery": "0.0.1"})
    code, told, _ = reproduce(capsys, made)
    assert code == 0
    assert told["versions"][0].endswith("the record has 0.0.1")


def test_an_input_that_moved_is_found_by_its_new_place(base, made, tmp_path, capsys):
    moved = base.rename(tmp_path / "elsewhere")
    code, _, err = reproduce(capsys, made)
    assert code == 1
    assert f"--input {base}=NEW" in err
    assert reproduce(capsys, made, "--input", f"{base}={moved}")[0] == 0


def test_a_bare_input_may_have_another_name(base, tmp_path, capsys):
    source, out = base / "model.safetensors", tmp_path / "made.safetensors"
    assert main(["stack", str(source), "--factor", "2", "-o", str(out)]) == 0
    moved = source.rename(tmp_path / "renamed.safetensors")
    assert reproduce(capsys, out, "--input", f"{source}={moved}")[0] == 0


def test_of_two_models_in_a_directory_the_recorded_one_is_taken(base, tmp_path, capsys):
    names = list(load_file(base / "model.safetensors"))
    shutil.copy(base / "model.safetensors", base / "other.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "other.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    words = ["--factor", "2", "-o", str(tmp_path / "out"), "--weights", "model.safetensors"]
    assert main(["stack", str(base), *words]) == 0
    assert reproduce(capsys, tmp_path / "out")[0] == 0


REFUSED = [
    ({"operation": "melt"}, "is an operation that this version does not have"),
    ({"parameters": {"fctor": 2}}, "has parameters that stack does not take"),
    ({"parameters": {"factor": "x"}}, "has parameters that stack does not take"),
    ({"inputs": [3]}, "has no usable 'inputs'"),
    ({"outputs": None}, "has no usable 'outputs'"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_record_that_cannot_be_followed_is_refused(changes, told, made, capsys):
    edit_record(made, **changes)
    code, found, err = reproduce(capsys, made)
    assert (code, found) == (1, None)
    assert told in err


def test_a_checkpoint_without_record_is_refused(base, capsys):
    code, _, err = reproduce(capsys, base)
    assert code == 1
    assert "no record" in err


@pytest.mark.parametrize("word", ["nonsense", "=x", "x=", "unknown=x"])
def test_a_wrong_input_option_is_a_usage_error(word, made, capsys):
    assert reproduce(capsys, made, "--input", word)[0] == 2
