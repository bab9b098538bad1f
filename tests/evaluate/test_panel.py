"""The panel against slow, obvious references: one token at a time, in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.evaluate import Evaluation, evaluate

CONTEXT = 32
Make = Callable[..., Path]
# Figures are float32 sums over a network; the references are float64 throughout.
CLOSE = 2e-4


def naive_logits(path: Path, tokens: list[int], stride: int, *, sink: bool) -> torch.Tensor:
    """Logits before each token but the first, each by a forward pass of its own, in float64.

    The window of a token is written down from its definition: the first that ends behind it.
    """
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    rows = []
    for t in range(1, len(tokens)):
        end = CONTEXT + 1 if t <= CONTEXT else CONTEXT + 1 + stride * -(-(t - CONTEXT) // stride)
        end = min(end, len(tokens))
        begin = max(0, end - 1 - CONTEXT)
        fed = [tokens[0], *tokens[begin + 1 : t]] if sink and begin else tokens[begin:t]
        with torch.no_grad():
            rows.append(model(torch.tensor([fed])).logits[0, -1])
    return torch.stack(rows)


def naive(path: Path, text: str, *, stride: int, sink: bool = False) -> tuple[Any, list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    return naive_logits(path, ids, stride, sink=sink).log_softmax(-1), ids


def naive_nats(path: Path, text: str, *, stride: int, sink: bool = False) -> float:
    logs, ids = naive(path, text, stride=stride, sink=sink)
    return -float(logs[range(len(ids) - 1), ids[1:]].sum())


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def pair(make_model: Make, documents: Path) -> Evaluation:
    return evaluate([make_model(seed=0), make_model(seed=1)], [documents])


@pytest.mark.parametrize("stride", [1, 5, CONTEXT // 2, CONTEXT - 1, CONTEXT])
def test_nats_equal_one_token_at_a_time_for_any_stride(
    make_model: Make, documents: Path, stride: int
) -> None:
    model = make_model(seed=0)
    (found,) = evaluate([model], [documents], stride=stride).models
    for figures, text in list(zip(found.per_document, texts_of(documents), strict=True))[:4]:
        assert figures.nats == pytest.approx(naive_nats(model, text, stride=stride), abs=CLOSE * 50)


@pytest.mark.parametrize("stride", [1, CONTEXT])
def test_a_mark_that_the_tokenizer_adds_leads_every_window(
    make_model: Make, documents: Path, stride: int
) -> None:
    model = make_model(seed=0, tokenizer={"adds": True})
    (found,) = evaluate([model], [documents], stride=stride).models
    expected = naive_nats(model, texts_of(documents)[3], stride=stride, sink=True)
    assert found.mark == "window"
    assert found.per_document[3].nats == pytest.approx(expected, abs=CLOSE * 50)


def test_the_number_of_scored_tokens_does_not_depend_on_the_stride(
    make_model: Make, documents: Path
) -> None:
    counts = {
        tuple(
            d.tokens for d in evaluate([make_model()], [documents], stride=s).models[0].per_document
        )
        for s in (3, CONTEXT)
    }
    assert len(counts) == 1
    assert sum(counts.pop()) == sum(len(t.encode()) for t in texts_of(documents))


def test_bits_per_byte_is_nats_over_the_bytes_of_the_text(
    pair: Evaluation, documents: Path
) -> None:
    overall = pair.models[0].overall
    assert overall.bytes == sum(len(text.encode()) for text in texts_of(documents))
    assert overall.bits_per_byte == pytest.approx(overall.nats / math.log(2) / overall.bytes)
    assert overall.nats == pytest.approx(sum(d.nats for d in pair.models[0].per_document))


def test_a_random_model_spends_about_eight_bits_a_byte(make_model: Make, documents: Path) -> None:
    flat = make_model(seed=4, initializer_range=1e-6)
    found = evaluate([flat], [documents]).models[0].overall.bits_per_byte
    assert found == pytest.approx(math.log2(258), abs=1e-3)


def test_without_a_mark_the_first_token_and_its_bytes_are_left_out(
    make_model: Make, documents: Path
) -> None:
    model = make_model(seed=0, tokenizer={"bos": None})
    (found,) = evaluate([model], [documents]).models
    for figures, text in list(zip(found.per_document, texts_of(documents), strict=True))[1:4]:
        # Every token is a byte, so the first character goes, whole.
        left = len(text[1:].encode())
        assert (figures.bytes, figures.tokens) == (left, left)


def test_divergence_equals_a_float64_reference(
    pair: Evaluation, make_model: Make, documents: Path
) -> None:
    stride = CONTEXT // 2
    for at in (1, 3):
        text = texts_of(documents)[at]
        p, _ = naive(make_model(seed=0), text, stride=stride)
        q, _ = naive(make_model(seed=1), text, stride=stride)
        expected = (p.exp() * (p - q)).sum(-1).numpy()
        found = pair.models[1].per_document[at].divergence
        agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
        assert [found.mean, found.median, found.p95, found.p99] == pytest.approx(
            [expected.mean(), *np.quantile(expected, [0.5, 0.95, 0.99])], rel=1e-4
        )
        assert found.agreement == pytest.approx(agreement)


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    from surgery.evaluate.forward import costs

    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 16, 5000, generator=generator, dtype=torch.float64) * 4
    q = p + 1e-3 * torch.randn(1, 16, 5000, generator=generator, dtype=torch.float64)
    p, q = p.float(), q.float()
    rows, positions = torch.zeros(16, dtype=torch.long), torch.arange(16)
    found = costs([p, q], rows, positions, positions)[2].double()
    logs, other = p[0].double().log_softmax(-1), q[0].double().log_softmax(-1)
    expected = (logs.exp() * (logs - other)).sum(-1)
    assert expected.max() < 1e-6
    assert torch.allclose(found, expected, rtol=1e-2, atol=0)


def test_costs_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.evaluate import forward

    logits = torch.randn(2, 1, 7, 11, generator=torch.Generator().manual_seed(0))
    where = torch.zeros(7, dtype=torch.long), torch.arange(7), torch.arange(7)
    whole = forward.costs(list(logits), *where)
    monkeypatch.setattr(forward, "_CHUNK_BYTES", 1)
    assert torch.equal(whole, forward.costs(list(logits), *where))


def test_a_model_does_not_diverge_from_itself(make_model: Make, documents: Path) -> None:
    model = make_model(seed=0)
    child = evaluate([model, model], [documents]).models[1].overall
    assert child.divergence is not None
    assert child.difference is not None
    assert (child.divergence.mean, child.divergence.p99, child.divergence.agreement) == (0, 0, 1)
    assert (child.difference.bits_per_byte, child.difference.low) == (0, 0)


def test_figures_hardly_depend_on_how_rows_are_batched(
    pair: Evaluation, make_model: Make, documents: Path
) -> None:
    models = [make_model(seed=0), make_model(seed=1)]
    single = evaluate(models, [documents], batch_tokens=1)
    for one, many in zip(single.models, pair.models, strict=True):
        assert one.overall.nats == pytest.approx(many.overall.nats, rel=1e-5)
    assert single.models[1].overall.divergence.mean == pytest.approx(
        pair.models[1].overall.divergence.mean, rel=1e-5
    )


def test_the_parent_costs_the_same_alone_and_beside_a_child(
    pair: Evaluation, make_model: Make, documents: Path
) -> None:
    (alone,) = evaluate([make_model(seed=0)], [documents]).models
    assert alone.per_document == pair.models[0].per_document


def test_a_named_parent_comes_first_and_the_difference_turns_around(
    pair: Evaluation, make_model: Make, documents: Path
) -> None:
    models = [make_model(seed=0), make_model(seed=1)]
    turned = evaluate(models, [documents], parent=models[1])
    assert [m.ref for m in turned.models] == [str(models[1]), str(models[0])]
    assert [m.parent for m in turned.models] == [True, False]
    mine, theirs = (e.models[1].overall.difference.bits_per_byte for e in (turned, pair))
    assert mine == pytest.approx(-theirs)


def test_a_parent_that_is_not_among_the_models_is_added(make_model: Make, documents: Path) -> None:
    found = evaluate([make_model(seed=0)], [documents], parent=make_model(seed=1))
    assert [m.ref for m in found.models] == [str(make_model(seed=1)), str(make_model(seed=0))]


def test_every_file_is_a_domain_and_overall_holds_them_all(
    make_model: Make, documents: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second.md"
    second.write_text("# A title\n\nand a line\n")
    child = evaluate([make_model(seed=0), make_model(seed=1)], [documents, second]).models[1]
    assert [d.name for d in child.domains] == [str(documents), str(second)]
    assert [d.documents for d in (*child.domains, child.overall)] == [12, 1, 13]
    assert child.overall.nats == pytest.approx(sum(d.nats for d in child.domains))
    assert child.domains[1].difference.verdict == "too few documents"
    assert child.domains[0].difference.low is not None


def test_other_tokenizers_share_bits_per_byte_but_no_divergence(
    make_model: Make, documents: Path
) -> None:
    child = make_model(seed=1, tokenizer={"merges": 4})
    parent, found = evaluate([make_model(seed=0), child], [documents]).models
    assert found.overall.bytes == parent.overall.bytes
    assert found.overall.tokens < parent.overall.tokens
    assert found.overall.difference is not None
    assert found.overall.divergence is None
    assert found.not_compared is not None
    assert "262 against the parent's 258" in found.not_compared


def test_one_tokenizer_under_other_ids_is_no_ground_for_divergence(
    make_model: Make, documents: Path
) -> None:
    child = make_model(seed=1, tokenizer={"bos": None})
    found = evaluate([make_model(seed=0), child], [documents]).models[1]
    assert found.not_compared == "the tokenizers differ: one text gives other tokens"


def test_the_context_is_the_shortest_limit_of_the_models(make_model: Make, documents: Path) -> None:
    short = make_model(seed=1, max_position_embeddings=20)
    found = evaluate([make_model(seed=0), short], [documents])
    assert (found.context, found.stride) == (20, 10)


def test_progress_reaches_its_total(make_model: Make, documents: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    evaluate(
        [make_model(seed=0), make_model(seed=1)],
        [documents],
        batch_tokens=64,
        progress=lambda *call: calls.append(call),
    )
    assert {name for name, _, _ in calls} == {make_model(seed=1).name}
    fed = [fed for _, fed, _ in calls]
    assert len(fed) > 2
    assert fed == sorted(set(fed))
    assert fed[-1] == calls[-1][2]


def test_the_result_is_json_and_says_what_made_it(pair: Evaluation) -> None:
    plain = json.loads(json.dumps(pair.to_dict(), allow_nan=False))
    assert plain["format"] == "surgery-eval-1"
    assert plain["models"][0]["dtype"] == "float32"
    assert plain["models"][1]["overall"]["difference"]["verdict"] in {"better", "worse"} | {
        "not distinguishable"
    }
    assert plain == pair.to_dict() | {"models": plain["models"]}


@pytest.mark.gpu
def test_cuda_gives_the_figures_of_the_cpu(
    pair: Evaluation, make_model: Make, documents: Path
) -> None:
    models = [make_model(seed=0), make_model(seed=1)]
    found = evaluate(models, [documents], device="cuda", dtype="float32")
    for one, other in zip(found.models, pair.models, strict=True):
        assert one.overall.bits_per_byte == pytest.approx(other.overall.bits_per_byte, rel=1e-4)


def test_a_real_model_costs_what_transformers_says(test_data: Path, tmp_path: Path) -> None:
    path = test_data / "weights" / "stories260K"
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    (tmp_path / "story.txt").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    row = torch.tensor([ids])
    with torch.no_grad():
        loss = float(model(row, labels=row).loss)
    (found,) = evaluate([path], [tmp_path / "story.txt"]).models
    assert found.overall.tokens == len(ids) - 1
    assert found.overall.nats / found.overall.tokens == pytest.approx(loss, rel=1e-5)
    assert found.overall.bits_per_byte < 1


def test_a_real_model_knows_stories_better_than_plays(test_data: Path, tmp_path: Path) -> None:
    story = tmp_path / "story.txt"
    story.write_text("Once upon a time, there was a big dog. He loved to run in the park.")
    play = tmp_path / "play.txt"
    play.write_text((test_data / "data" / "shakespeare.txt").read_text()[:2000])
    (found,) = evaluate([test_data / "weights" / "stories260K"], [story, play]).models
    assert found.domains[0].bits_per_byte + 1 < found.domains[1].bits_per_byte
