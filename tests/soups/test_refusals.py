"""What is refused before a model is loaded, in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from cli.main import main
from surgery.errors import Exit


@pytest.fixture(scope="module")
def other(models, tmp_path_factory) -> str:
    """A model like uni, of which one token has another name."""
    out = tmp_path_factory.mktemp("other") / "other"
    shutil.copytree(models["uni"], out)
    tokenizer = json.loads((out / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary["zzz"] = vocabulary.pop(last)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return str(out)


CASES = [
    ("soup UNI --greedy --text T", "has one model"),
    ("soup UNI UNI --greedy --text T", "twice"),
    ("soup UNI OTHER --greedy --text T", "the vocabularies differ"),
    ("soup UNI ARITH --greedy", "both missing"),
    ("soup UNI ARITH --greedy --text T --pairs T", "at once"),
    ("soup UNI ARITH --text T", "without --greedy"),
    ("soup UNI ARITH --seed 3", "without --greedy"),
    ("soup UNI ARITH --greedy --text T --batch-tokens 0", "no batch"),
    ("soup UNI ARITH --greedy --text T --context 100000", "--context"),
    ("ablate UNI --text T", "has one model"),
    ("ablate UNI ARITH UNI --text T", "twice"),
    ("ablate UNI OTHER --text T", "the vocabularies differ"),
    ("ablate UNI ARITH --text T --sizes 3", "averages of 3 of 2 parts"),
    ("ablate UNI ARITH --text T --sizes 2-1", "no list of sizes"),
    ("ablate UNI ARITH --text T --against base", "needs --base"),
    ("ablate UNI ARITH --text T --base UNI", "one of the parts"),
    ("ablate 1 2 3 4 5 6 7 8 9 10 11 --text T", "2047 averages"),
]


@pytest.fixture(scope="module")
def places(models, texts, other) -> dict[str, str]:
    return {"UNI": models["uni"], "ARITH": models["arith"], "OTHER": other, "T": texts[0]}


@pytest.mark.parametrize(("line", "told"), CASES)
def test_a_wrong_ask_is_one_sentence(line, told, places, tmp_path, capsys) -> None:
    words = [places.get(word, word) for word in line.split()]
    out = ["-o", str(tmp_path / "out")]
    assert main([*words, *out]) == Exit.USAGE
    message = capsys.readouterr().err
    assert told in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["soup", "ablate"])
def test_an_output_that_stands_is_not_replaced(command, models, texts, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    words = ["--greedy"] if command == "soup" else []
    words += ["--text", texts[0], "-o", str(tmp_path / "out")]
    assert main([command, models["uni"], models["arith"], *words]) == Exit.FAILED
    assert (tmp_path / "out" / "kept").read_text() == "mine"


def test_a_refusal_costs_no_torch(models) -> None:
    code = (
        "import sys; from cli.main import main; "
        f"main(['soup', {models['uni']!r}, {models['arith']!r}, '--greedy']); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_pipeline_does_not_measure_a_soup(models, texts, tmp_path, capsys) -> None:
    file = tmp_path / "pipeline.yml"
    step = {"command": "soup", "models": [models["uni"], models["arith"]]}
    step |= {"greedy": True, "text": texts}
    file.write_text(json.dumps({"steps": {"best": step}}))
    assert main(["run", str(file), "-o", str(tmp_path / "out")]) == Exit.USAGE
    assert "run it before" in capsys.readouterr().err
