"""A step is skipped exactly when nothing that it depends on has changed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from engine import tiny
from pipeline import bench
from pipeline.bench import FIRST, IDLE


@pytest.fixture
def done(here: Path, capsys) -> Path:
    """A pipeline that has run."""
    bench.write()
    assert bench.states(capsys) == FIRST
    return here


def test_a_second_run_does_nothing(done, capsys):
    before = {p: p.stat().st_mtime_ns for p in Path("p").rglob("*") if ".surgery" not in str(p)}
    assert bench.states(capsys) == IDLE
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_outputs_are_those_of_the_commands(done, capsys):
    from cli.main import main

    assert main(["soup", "a", "b", "-o", "soup"]) == 0
    assert main(["stack", "soup", "--factor", "2", "-o", "deep"]) == 0
    capsys.readouterr()
    for name in ("soup", "deep"):
        made = json.loads(Path("p", name, "surgery.json").read_text())
        by_hand = json.loads(Path(name, "surgery.json").read_text())
        assert made["outputs"] == by_hand["outputs"]
    assert json.loads(Path("p/check.json").read_text())["ok"]


def test_a_changed_parameter_remakes_the_step_and_what_comes_out_different_behind_it(done, capsys):
    bench.write(layers="1")
    found = bench.run(capsys)
    assert {n: one["state"] for n, one in found.items()} == {
        **IDLE, "shallow": "made", "check": "measured",
    }  # fmt: skip
    assert found["shallow"]["why"] == 'layers is "1", was "0"'


def test_an_output_that_is_gone_is_made_again_and_its_users_are_not(done, capsys):
    shutil.rmtree("p/soup")
    assert bench.states(capsys) == {**IDLE, "soup": "made"}


def test_an_output_that_comes_out_with_equal_bytes_remakes_no_user(done, capsys):
    bench.write(bench.STEPS.replace("factor: {factor}", 'map: "0-1,0-1"'))
    assert bench.states(capsys) == {**IDLE, "deep": "made"}


def test_an_input_with_a_new_time_and_equal_bytes_changes_nothing(done, capsys):
    for file in Path("a").iterdir():
        os.utime(file, (1, 1))
    assert bench.states(capsys) == IDLE


@pytest.mark.parametrize("keep_time", [False, True])
def test_an_input_with_other_weights_remakes_all(done, capsys, keep_time):
    file = next(iter(Path("a").glob("*.safetensors")))
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    if keep_time:
        os.utime(file, ns=times)
    assert bench.states(capsys) == FIRST


def test_an_input_with_another_config_remakes_what_carries_it(done, capsys):
    config = json.loads(Path("a/config.json").read_text())
    Path("a/config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    found = bench.run(capsys)
    assert found["soup"]["why"] == "config.json changed"
    assert {one["state"] for one in found.values()} == {"made", "measured"}


def test_another_version_of_the_program_remakes_all(done, capsys, monkeypatch):
    monkeypatch.setattr("surgery.provenance.tool_version", lambda: "9.9")
    assert bench.run(capsys)["soup"]["why"].startswith("surgery is 9.9, was ")


def test_without_what_it_remembers_outputs_are_still_recognised(done, capsys):
    Path("p/.surgery-pipeline/state.json").unlink()
    assert bench.states(capsys) == {**IDLE, "check": "measured"}


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "more": 2}', '{"format": 0}'])
def test_a_broken_memory_counts_as_none(done, capsys, text):
    Path("p/.surgery-pipeline/state.json").write_text(text)
    assert bench.states(capsys) == {**IDLE, "check": "measured"}


def test_an_output_made_by_hand_is_taken(here, capsys):
    from cli.main import main

    Path("p").mkdir()
    assert main(["soup", "a", "b", "-o", "p/soup"]) == 0
    capsys.readouterr()
    bench.write()
    assert bench.states(capsys) == {**FIRST, "soup": "skipped"}


def test_an_output_of_another_origin_is_not_replaced_unasked(here, capsys):
    shutil.copytree("a", "p/soup")
    bench.write()
    assert "is nothing that surgery made" in bench.refused(capsys, code=1)
    assert tiny.tree(Path("p/soup")) == tiny.tree(Path("a"))


def test_a_stale_output_that_another_command_made_needs_force(here, capsys):
    from cli.main import main

    Path("p").mkdir()
    assert main(["soup", "b", "a", "-o", "p/soup"]) == 0
    capsys.readouterr()
    bench.write()
    assert "this pipeline did not make it" in bench.refused(capsys, code=1)
    assert bench.states(capsys, "--force") == FIRST


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "surgery.json"])
def test_an_output_that_somebody_changed_is_not_replaced_unasked(done, capsys, name):
    file = Path("p/soup") / name
    data = bytearray(file.read_bytes())
    at = data.index(b"llama") if name == "config.json" else len(data) - 200
    data[at] ^= 1
    file.unlink()
    file.write_bytes(data)
    assert "was changed since it was made" in bench.refused(capsys, code=1)
    assert file.read_bytes() == data
    assert bench.states(capsys, "--force") == FIRST


def test_a_result_that_somebody_changed_is_measured_again(done, capsys):
    Path("p/check.json").write_text("{}")
    assert bench.states(capsys) == {**IDLE, "check": "measured"}


def test_force_makes_all_again(done, capsys):
    assert bench.states(capsys, "--force") == FIRST


def test_only_one_step(done, capsys):
    bench.write(layers="1")
    assert bench.states(capsys, "--only", "shallow") == {"shallow": "made"}
    assert bench.states(capsys) == {**IDLE, "check": "measured"}


def test_only_a_step_whose_input_is_not_there_is_refused(here, capsys):
    bench.write()
    assert "uses 'soup', whose output is not there" in bench.refused(
        capsys, "--only", "deep", code=1
    )


def test_the_folder_is_named_by_the_option_the_file_or_the_files_name(here, capsys):
    bench.write()
    bench.run(capsys, "-o", "elsewhere")
    bench.write("output: told\n" + bench.STEPS)
    bench.run(capsys)
    bench.write()
    bench.run(capsys)
    assert all(Path(name, "soup").is_dir() for name in ("elsewhere", "told", "p"))


def test_options_of_the_run_hold_for_every_step(here, capsys):
    bench.write(bench.STEPS.replace("factor: {factor}", "factor: 40"))
    bench.run(capsys, "--shard-size", "1MiB", "--workers", "1")
    assert len(list(Path("p/deep").glob("*.safetensors"))) == 2
    assert len(list(Path("p/soup").glob("*.safetensors"))) == 1


def test_bare_files_go_through(here, capsys):
    bench.write(
        "steps:\n  deep: {command: stack, base: a/model-00001-of-00002.safetensors, map: '0,0'}\n"
        "  flat: {command: prune, base: deep, layers: 0}\n"
    )
    both = {"deep": "made", "flat": "made"}
    assert bench.states(capsys) == both
    assert Path("p/flat.safetensors").is_file()
    assert bench.states(capsys) == dict.fromkeys(both, "skipped")
    Path("p/deep.safetensors").unlink()
    assert bench.states(capsys) == {"deep": "made", "flat": "skipped"}


def test_two_pipelines_do_not_share_a_folder_at_once(here, capsys):
    from surgery.pipeline import Folder

    bench.write()
    with Folder("p"):
        assert "another pipeline is working in it" in bench.refused(capsys, code=1)


def test_a_recipe_file_may_name_steps_as_models(here, capsys):
    Path("r.yml").write_text(
        "merge_method: linear\nmodels:\n  - {model: deep, parameters: {weight: 1}}\n"
        "  - {model: c, parameters: {weight: 3}}\n"
    )
    tiny.write(here / "c", seed=2, layers=4)
    bench.write(
        "steps:\n  deep: {command: stack, base: a, factor: 2}\n"
        "  mixed: {command: run, file: r.yml}\n"
    )
    both = {"deep": "made", "mixed": "made"}
    assert bench.states(capsys) == both
    assert bench.states(capsys) == dict.fromkeys(both, "skipped")
    Path("r.yml").write_text(Path("r.yml").read_text().replace("3", "2"))
    assert bench.states(capsys) == {"deep": "skipped", "mixed": "made"}
    bench.write(
        "steps:\n  mixed: {command: run, file: r.yml}\n"
        "  deep: {command: stack, base: a, factor: 2}\n"
    )
    assert "uses 'deep', which is defined only after it" in bench.refused(capsys)


def test_a_step_does_not_have_the_folders_name(here, capsys):
    bench.write("steps:\n  p: {command: stack, base: a, factor: 2}\n")
    assert "has the name of the folder that the outputs go to" in bench.refused(capsys)
    bench.run(capsys, "-o", "elsewhere")
