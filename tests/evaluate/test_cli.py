"""The command: its table, its JSON, what it accepts and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from cli.eval import command
from surgery.errors import SurgeryError

Make = Callable[..., Path]


@pytest.fixture
def run() -> Callable[..., Result]:
    app = typer.Typer()
    app.command()(command)

    def call(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)

    return call


@pytest.fixture
def models(make_model: Make) -> Sequence[Path]:
    return make_model(seed=0), make_model(seed=1)


def test_the_table_has_a_line_for_every_model(
    run: Callable[..., Result], models: Sequence[Path], documents: Path
) -> None:
    result = run(*models, "--text", documents)
    head, parent, child, *notes = result.stdout.splitlines()
    assert head.split()[:3] == ["text", "model", "bits/byte"]
    assert parent.split()[:2] == ["documents.jsonl", "tiny0"]
    assert parent.split()[-1] == "parent"
    assert child.split()[0] == "tiny1"
    assert child.split()[-1].endswith("%")
    assert notes[0].startswith("context 32, stride 16, float32 on cpu; 12 documents")


def test_piped_output_has_no_escape_and_nothing_on_stderr(
    run: Callable[..., Result], models: Sequence[Path], documents: Path
) -> None:
    result = run(*models, "--text", documents)
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_files_behind_the_first_text_are_texts(
    run: Callable[..., Result], models: Sequence[Path], documents: Path, tmp_path: Path
) -> None:
    more = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path in more:
        path.write_text("some text")
    result = run(models[0], "--text", documents, *more, "--json")
    found = json.loads(result.stdout)
    assert [d["name"] for d in found["models"][0]["domains"]] == [str(documents), *map(str, more)]


def test_json_is_one_object_with_every_document(
    run: Callable[..., Result], models: Sequence[Path], documents: Path
) -> None:
    found = json.loads(run(*models, "--text", documents, "--json").stdout)
    assert [len(model["per_document"]) for model in found["models"]] == [12, 12]
    assert found["models"][1]["overall"]["divergence"]["mean"] > 0


def test_documents_are_listed_when_asked(
    run: Callable[..., Result], models: Sequence[Path], documents: Path
) -> None:
    lines = run(*models, "--text", documents, "--documents").stdout.splitlines()
    assert sum(line.startswith("documents.jsonl:") for line in lines) == 12


def test_notes_say_why_there_is_no_divergence_or_interval(
    run: Callable[..., Result], models: Sequence[Path], make_model: Make, tmp_path: Path
) -> None:
    text = tmp_path / "one.txt"
    text.write_text("the cat sat on the mat")
    other = make_model(seed=2, tokenizer={"bos": None})
    notes = run(models[0], other, "--text", text).stdout
    assert "tiny2: no KL and top-1, the tokenizers differ" in notes
    assert "tiny2: no beginning-of-sequence token" in notes
    assert "a text of fewer than 8 documents has no interval" in notes


@pytest.fixture
def known(models: Sequence[Path], documents: Path, tmp_path: Path) -> dict[str, Path]:
    """Words that stand for paths in the table below."""
    (tmp_path / "empty.txt").touch()
    return {"MODEL": models[0], "DOCUMENTS": documents, "EMPTY": tmp_path / "empty.txt"}


@pytest.mark.parametrize(
    ("arguments", "code", "fact"),
    [
        (["absent-model", "--text", "DOCUMENTS"], 1, "absent-model: does not exist"),
        (["MODEL", "--text", "absent.txt"], 1, "absent.txt: no such file or directory"),
        (["MODEL", "--text", "EMPTY"], 1, "the file holds no text"),
        (["MODEL", "--text", "DOCUMENTS", "--context", "99"], 2, "99 is above the 32"),
        (["MODEL", "--text", "DOCUMENTS", "--parent", "absent"], 1, "absent: does not exist"),
        (["DOCUMENTS", "--text", "EMPTY"], 2, "no model is named"),
    ],
)
def test_wrong_use_is_told_in_one_sentence(
    run: Callable[..., Result],
    known: dict[str, Path],
    arguments: list[str],
    code: int,
    fact: str,
) -> None:
    error = run(*(known.get(a, a) for a in arguments)).exception
    assert isinstance(error, SurgeryError)
    assert error.exit_code == code
    assert fact in str(error)
    assert "\n" not in str(error)


def test_help_and_errors_of_texts_load_neither_torch_nor_transformers(tmp_path: Path) -> None:
    program = (
        "import sys, typer\n"
        "from cli.eval import command\n"
        "from surgery.errors import SurgeryError\n"
        "app = typer.Typer()\n"
        "app.command()(command)\n"
        "text = ['model', '--text', 'README.md']\n"
        "wrong = [['--gate', 'x<1'], ['--pairs', 'absent.jsonl'], ['--task', 'absent.yaml']]\n"
        "lines = [['--help'], ['model', '--text', 'absent.txt'], *(text + w for w in wrong)]\n"
        "for line in lines:\n"
        "    try:\n"
        "        app(line, standalone_mode=False)\n"
        "    except SurgeryError:\n"
        "        pass\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout


def test_a_note_shared_by_models_is_told_once(
    run: Callable[..., Result], make_model: Make, documents: Path
) -> None:
    models = [make_model(seed=seed, tokenizer={"bos": None}) for seed in (0, 1)]
    notes = run(*models, "--text", documents).stdout
    assert notes.count("no beginning-of-sequence token") == 1
    assert "tiny0, tiny1: no beginning-of-sequence token" in notes


def test_a_person_at_a_terminal_sees_progress(
    run: Callable[..., Result],
    models: Sequence[Path],
    documents: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    from rich.console import Console

    from cli import render

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True)
    monkeypatch.setattr(render, "err", lambda: console)
    monkeypatch.setattr(render, "is_watched", lambda *, stderr=False: stderr)
    result = run(*models, "--text", documents)
    assert "tiny1" in screen.getvalue()
    assert "\x1b" not in result.stdout
