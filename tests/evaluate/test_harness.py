"""lm-evaluation-harness where it is installed (extra: eval), and a clear word where it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from surgery.errors import RecipeError, TrainError
from surgery.evaluate import evaluate, harness
from surgery.evaluate.harness import check_tasks

Make = Callable[..., Path]
CONTEXT = 32


def test_without_the_extra_the_remedy_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"not installed.*model-surgery\[eval\]"):
        check_tasks(["hellaswag"])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


third_party = pytest.mark.filterwarnings("default")  # of the harness and what it imports


def rolling(folder: Path, documents: Path) -> Path:
    task = {
        "task": "roll",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    path = folder / "roll.yaml"
    path.write_text(json.dumps(task))  # JSON is YAML
    return path


def quiz(folder: Path) -> Path:
    words = ["the cat", "sat", "on a mat;", "été", "was here."]
    lines = [
        {
            "prompt": f"{words[i % 5]} {words[(i + 2) % 5]}",
            "choices": [f" {words[(i + k) % 5]}" for k in (1, 3, 4)],
            "answer": i % 3,
        }
        for i in range(15)
    ]
    path = folder / "quiz.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return path


@third_party
@pytest.mark.usefixtures("installed")
def test_bits_per_byte_agree_with_the_harness_at_a_stride_of_the_context(
    make_model: Make, documents: Path, tmp_path: Path
) -> None:
    found = evaluate(
        [make_model(seed=0)], [documents], stride=CONTEXT, tasks=[str(rolling(tmp_path, documents))]
    )
    theirs = found.tasks[0].models[0].value
    assert found.models[0].overall.bits_per_byte == pytest.approx(theirs, rel=1e-6)


@third_party
@pytest.mark.usefixtures("installed")
def test_more_context_than_the_harness_gives_is_another_figure(
    make_model: Make, documents: Path, tmp_path: Path
) -> None:
    task = str(rolling(tmp_path, documents))
    found = evaluate([make_model(seed=0)], [documents], stride=1, tasks=[task])
    ours = found.models[0].overall.bits_per_byte
    assert abs(ours - found.tasks[0].models[0].value) > 1e-4


@third_party
@pytest.mark.usefixtures("installed")
def test_the_harness_answers_questions_as_the_built_in_scorer(
    make_model: Make, documents: Path, tmp_path: Path
) -> None:
    # A tokenizer that adds its mark by itself: there both put it in front of every prompt.
    models = [make_model(seed=seed, tokenizer={"adds": True}) for seed in (0, 1)]
    path = quiz(tmp_path)
    (theirs,) = evaluate(models, [documents], tasks=[str(path)]).tasks
    (ours,) = evaluate(models, [documents], pairs=[path]).tasks
    for mine, other in zip(ours.models, theirs.models, strict=True):
        assert list(mine.documents.values()) == list(other.documents.values())
        assert mine.metrics["acc_characters"] == other.metrics["acc_norm"]
    mine, other = ours.differences[0], theirs.differences[0]
    assert (mine.only_child, mine.only_parent, mine.p) == (
        other.only_child,
        other.only_parent,
        other.p,
    )


@third_party
@pytest.mark.usefixtures("installed")
def test_a_task_that_the_harness_does_not_know_is_told_in_one_sentence(
    make_model: Make, documents: Path, tmp_path: Path
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("nothing: here\n")
    with pytest.raises(TrainError, match="lm-evaluation-harness fails") as error:
        evaluate([make_model(seed=0)], [documents], tasks=[str(path)])
    assert "\n" not in str(error.value)
