"""The contract of the command line: lazy, one sentence for a mistake, the right exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import COMMANDS, main

REPO = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors")


def modules_after(*words: str) -> set[str]:
    """Names of the modules that a command line has loaded when it ends."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from cli.main import main\n"
        "main(sys.argv[2:]); print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    words = (sys.executable, "-c", code, str(REPO), *words)
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("words", [("--help",), *((name, "--help") for name in COMMANDS)])
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    assert not modules_after(*words) & set(HEAVY)


@pytest.mark.parametrize(
    "words",
    [
        ("stack", "{base}", "--map", "3-1"),
        ("stack", "{base}", "--factor", "2", "-o", "{base}"),
        ("stack", "missing", "--factor", "2"),
        ("expand", "{base}", "--blocks", "99"),
        ("prune", "{base}", "--layers", "0-99"),
        ("stack", "{base}", "--factor", "2", "-o", "{out}", "--dry-run"),
    ],
)
def test_planning_and_its_errors_load_no_torch(
    structure, tmp_path: Path, words: tuple[str, ...]
) -> None:
    base, out = str(structure("llama")), str(tmp_path / "out")
    loaded = modules_after(*(word.format(base=base, out=out) for word in words))
    assert not loaded & {"torch", "transformers", "peft"}


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_page(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"Usage: surgery {name}" in capsys.readouterr().out
    assert f"surgery {name}" in (REPO / "docs" / "reference" / "cli.md").read_text()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["stac", "x"], 2, "stac: is no command; did you mean stack?"),
        (["stack"], 2, "surgery stack: Missing argument 'BASE'."),
        (["linearize", "x"], 2, "Missing option '--method'. Choose from: lolcats, hedgehog, t2r,"),
        (["stack", "{base}", "--facto", "2"], 2, "--factor"),
        (["stack", "{base}"], 2, "exactly one of --factor, --dus and --map"),
        (["stack", "{base}", "--factor", "2", "--dus", "1"], 2, "exactly one of"),
        (["stack", "{base}", "--map", "3-1"], 2, "runs backwards; write 1-3"),
        (["stack", "{base}", "--map", "0-9"], 2, "layer 4, but the model has layers 0 to 3"),
        (["stack", "{base}", "--map", "a"], 2, "neither a layer nor a range"),
        (["stack", "{base}", "--factor", "0"], 2, "below 1"),
        (["stack", "{base}", "--factor", "2", "--memory", "lots"], 2, "is not a size"),
        (["stack", "{base}", "--factor", "2", "--scale", "x"], 2, "is not a number"),
        (["stack", "{base}", "--tokens", "1B", "--factor", "2"], 2, "add --advise"),
        (["stack", "{base}", "--advise"], 2, "needs the training budget"),
        (["expand", "{base}", "--blocks", "0"], 2, "outside 1 to 4"),
        (["prune", "{base}", "--layers", "0-3"], 2, "leaves no layer"),
        (["lora", "merge", "x", "--method", "dare"], 2, "'--method': 'dare' is not one of 'cat'"),
        (["stack", "missing", "--factor", "2"], 1, "missing: does not exist"),
        (["stack", "org/name", "--factor", "2"], 1, "--allow-download"),
        (["stack", "{base}", "--factor", "2", "-o", "{base}"], 1, "is the input"),
    ],
)
def test_a_mistake_gets_one_sentence_and_its_exit_code(
    structure, capsys: pytest.CaptureFixture[str], words: list[str], code: int, told: str
) -> None:
    base = str(structure("llama"))
    assert main([word.format(base=base) for word in words]) == code
    printed = capsys.readouterr()
    assert told in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert "Traceback" not in printed.err
    assert not printed.out


def test_debug_shows_the_traceback(structure) -> None:
    from surgery.errors import RecipeError

    with pytest.raises(RecipeError):
        main(["stack", str(structure("llama")), "--map", "3-1", "--debug"])


def test_a_dry_run_tells_the_work_and_writes_nothing(
    structure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["stack", str(structure("llama")), "--factor", "2", "-o", str(out), "--dry-run"]
    assert main([*words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layer_map"] == "0-3,0-3"
    assert told["disk_needed"] > told["bytes_out"] > told["bytes_in"] > 0
    assert told["peak_memory"] > 0
    assert main(words) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_json_reports_the_run(structure, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["expand", str(structure("llama")), "--blocks", "2", "-o", str(out), "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["output"] == str(out)
    assert told["facts"]["trainable_layers"] == [2, 5]


def test_the_default_output_stands_beside_the_base(structure, tmp_path: Path) -> None:
    import shutil

    base = shutil.copytree(structure("llama"), tmp_path / "model.v1")
    assert main(["stack", str(base), "--factor", "2"]) == 0
    assert main(["stack", str(base / "model.safetensors"), "--factor", "2"]) == 0
    assert (tmp_path / "model.v1-stack2" / "config.json").exists()
    assert (base / "model-stack2.safetensors").exists()


def test_advice_follows_the_papers_table() -> None:
    """The paper's own figures: tokens before growth for its reference models and budgets."""
    from growth.stack import advise

    for parameters, tokens, wanted in ((8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9)):
        found = advise(base_parameters=1, grown_parameters=int(parameters), tokens=tokens)
        assert found.growth_tokens == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("as_json", [False, True])
def test_advice_is_printed_and_nothing_is_written(
    structure, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    words = ["stack", str(structure("llama")), "--advise", "--tokens", "2T", "-v"]
    assert main([*words, "--json"] if as_json else words) == 0
    printed = capsys.readouterr()
    assert "1e-3" in printed.err  # the paper's recipe, asked for by -v
    if as_json:
        assert json.loads(printed.out)["tokens"] == 2e12
    else:
        assert "arXiv 2405.15319" in printed.out


def test_a_number_of_tokens_that_is_none_is_refused(structure, capsys) -> None:
    for tokens in ("many", "-1B", "nan"):
        words = ["stack", str(structure("llama")), "--advise", "--tokens", tokens]
        assert main(words) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("surgery ")


def test_a_fault_of_our_own_is_one_sentence_that_says_how_to_see_more(
    structure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cli.writing

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(cli.writing, "open_checkpoint", fail)
    words = ["stack", str(structure("llama")), "--factor", "2"]
    assert main(words) == 1
    assert "fault in surgery itself (ZeroDivisionError: oh); --debug" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main([*words, "--debug"])


def test_an_interrupt_before_any_work_exits_with_75(
    structure, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import cli.writing

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.writing, "open_checkpoint", stop)
    assert main(["stack", str(structure("llama")), "--factor", "2"]) == 75
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dus", "1", "--order", "aabb"], "says nothing without --factor"),
        (["--factor", "1", "--scale", "0.5"], "no layer repeats an earlier one"),
        (["--factor", "2", "--scale", "0.5", "--scale", "0.25"], "two factors"),
        (["--advise", "--tokens", "1B", "--map", "0-99"], "--factor and --tokens only"),
        (["--advise", "--tokens", "1B", "--factor", "-1"], "below 1"),
        (["--advise", "--tokens", "inf"], "not a positive number"),
    ],
)
def test_no_option_is_ignored_in_silence(structure, capsys, words: list[str], told: str) -> None:
    assert main(["stack", str(structure("llama")), *words]) == 2
    assert told in capsys.readouterr().err


def test_advice_says_what_it_means_for_this_model(structure, capsys) -> None:
    for tokens, told in (("2T", "tokens in all, stack, train"), ("1M", "do not stack")):
        assert main(["stack", str(structure("llama")), "--advise", "--tokens", tokens]) == 0
        assert told in capsys.readouterr().out


def test_no_words_at_all_print_the_help(capsys) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert "Commands:" in printed.err + printed.out
    assert "\\n" not in printed.err


def test_verify_tells_an_unsound_file_as_a_failed_check(tmp_path: Path, capsys) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\x10")
    assert main(["verify", str(tmp_path / "x.safetensors"), "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["checks"][0]["status"] == "failed"
    assert main(["verify", str(tmp_path / "missing")]) == 1
