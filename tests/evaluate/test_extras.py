"""Several parents, samples, speed, and the file that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from cli.eval import command
from surgery.errors import SurgeryError
from surgery.evaluate import Evaluation, evaluate
from surgery.evaluate.documents import Document
from surgery.evaluate.samples import prompts, repetition

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def models(make_model: Make) -> list[Path]:
    return [make_model(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def both(models: list[Path], documents: Path) -> Evaluation:
    return evaluate([models[2]], [documents], parent=models[:2])


def test_a_child_beside_each_of_two_parents_is_as_beside_one(
    both: Evaluation, models: list[Path], documents: Path
) -> None:
    assert [m.parent for m in both.models] == [True, True, False]
    for place in (0, 1):
        single = evaluate([models[2]], [documents], parent=models[place]).models[1]
        assert both.models[2].against[place] == single.against[0]


def test_the_first_parent_is_the_one_of_the_plain_figures(both: Evaluation) -> None:
    child = both.models[2]
    assert child.overall.divergence == child.against[0].overall.divergence
    assert child.overall.difference == child.against[0].overall.difference


def test_logit_rms_equals_the_logits_of_transformers(models: list[Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = tmp_path / "short.txt"
    text.write_text("the cat sat on a mat")
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text.read_text())["input_ids"]]])
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(m, dtype=torch.float64)(ids[:, :-1]).logits
            for m in models[:2]
        )
    found = evaluate(models[:2], [text]).models[1].overall.divergence
    assert found.logit_rms == pytest.approx(float((p - q).square().mean().sqrt()), rel=1e-5)


@pytest.mark.parametrize(
    ("ids", "share"),
    [([1, 2, 3], None), ([1, 2, 3, 4, 5], 0.0), ([7] * 8, 0.8), ([1, 2] * 4, 0.6)],
)
def test_repetition_is_the_share_of_fourgrams_written_before(
    ids: list[int], share: float | None
) -> None:
    assert repetition(ids) == (share if share is None else pytest.approx(share))


def test_prompts_are_spread_evenly_and_end_before_a_space() -> None:
    texts = [Document(domain="d", name=str(i), text="some words " * 40) for i in range(9)]
    found = prompts(texts, 3)
    assert [name for name, _ in found] == ["0", "4", "8"]
    assert all(len(prompt) <= 200 and prompt.endswith(("some", "words")) for _, prompt in found)
    assert len(prompts(texts, 50)) == 9


def test_samples_are_what_transformers_generates(models: list[Path], documents: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (found,) = evaluate([models[0]], [documents], samples=3).models
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    model = AutoModelForCausalLM.from_pretrained(models[0]).eval()
    for sample in found.samples[:2]:
        ids = [tokenizer.bos_token_id, *tokenizer(sample.prompt)["input_ids"][-15:]]
        start = len(ids)
        while len(ids) - start < sample.tokens:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert tokenizer.decode(ids[start:], skip_special_tokens=True) == sample.text


def test_the_cache_weighs_what_keys_and_values_weigh(models: list[Path], documents: Path) -> None:
    (found,) = evaluate([models[0]], [documents], speed=True).models
    speed = found.speed
    # Two layers of keys and values, 16 float32 numbers each.
    assert speed.cache_per_token == 2 * 2 * 16 * 4
    assert speed.state_bytes == 0
    assert min(speed.prefill_per_second, speed.decode_per_second) > 0
    assert speed.prefill_tokens + speed.decoded_tokens <= 32


def test_a_window_that_is_full_does_not_grow(
    make_tokenizer: Callable[..., Any], documents: Path, tmp_path: Path
) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = make_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=6,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "window")
    tokenizer.save_pretrained(tmp_path / "window")
    (found,) = evaluate([tmp_path / "window"], [documents], speed=True).models
    assert found.speed.cache_per_token == 0
    assert found.speed.state_bytes > 0


@pytest.fixture
def run() -> Callable[..., Result]:
    app = typer.Typer()
    app.command()(command)

    def call(*arguments: str | Path) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)

    return call


def test_everything_at_once_is_printed_and_saved(
    run: Callable[..., Result], models: list[Path], documents: Path, tmp_path: Path
) -> None:
    quiz = tmp_path / "quiz.jsonl"
    quiz.write_text('{"good": "the cat", "bad": "cat the the"}\n')
    saved = tmp_path / "run.json"
    result = run(
        *(*models, "--parent", models[0], "--parent", models[1], "--text", documents),
        *("--maps", "--samples", "1", "--speed", "--pairs", quiz, "--gate", "bpb<parent*9"),
        *("-o", saved),
    )
    assert result.exception is None, result.exception
    for word in ("KL median", "tiny2 beside tiny0, layer by layer", "prefill tokens/s"):
        assert word in result.stdout
    assert result.stdout.count("bpb<parent*9 holds") == 2
    found = json.loads(saved.read_text())
    assert found["format"] == "surgery-eval-1"
    child = found["models"][2]
    assert len(child["against"]) == 2
    assert child["against"][1]["weights"]["layers"]
    assert len(child["against"][0]["similarity"]["matrix"]) == 3
    assert child["samples"][0]["repetition"] is not None
    assert child["speed"]["cache_per_token"] == 256
    assert found["tasks"][0]["differences"][0]["verdict"]
    assert [gate["holds"] for gate in found["gates"]] == [True, True]


def test_the_printed_json_is_the_saved_one(
    run: Callable[..., Result], models: list[Path], documents: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "run.json"
    result = run(*models[:2], "--text", documents, "--json", "-o", saved)
    assert json.loads(result.stdout) == json.loads(saved.read_text())


def test_a_gate_that_fails_exits_3_after_the_result(
    run: Callable[..., Result], models: list[Path], documents: Path
) -> None:
    result = run(*models[:2], "--text", documents, "--gate", "kl<1e-9", "--gate", "bpb<99")
    assert isinstance(result.exception, SurgeryError)
    assert result.exception.exit_code == 3
    assert "kl<1e-9 fails" in str(result.exception)
    assert "bpb<99" not in str(result.exception)
    assert "bits/byte" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "fact"),
    [
        (["--gate", "loss<1"], 2, "loss is not a figure"),
        (["--gate", "kl<1"], 2, "there is no child to compare with a parent"),
        (["--gate", "bpb<parent"], 2, "there is no child to compare with a parent"),
        (["--gate", "acc:quiz>0"], 2, "no task is called quiz"),
        (["--samples", "-1"], 2, "-1 is below 0"),
        (["--normalize", "words"], 2, "words is not a length"),
        (["--pairs", "absent.jsonl"], 1, "absent.jsonl: no such file"),
        (["--task", "absent.yaml"], 1, "absent.yaml: no such file"),
        (["--task", "hellaswag", "--task", "hellaswag"], 2, "hellaswag is named twice"),
        (["-o", "absent/run.json"], 1, "is not a place for a file"),
        (["-o", "pyproject.toml"], 1, "already exists"),
    ],
)
def test_wrong_asks_are_refused_before_a_model_is_opened(
    run: Callable[..., Result], documents: Path, arguments: list[str], code: int, fact: str
) -> None:
    error = run("absent-model", "--text", documents, *arguments).exception
    assert isinstance(error, SurgeryError)
    assert error.exit_code == code
    assert fact in str(error)
