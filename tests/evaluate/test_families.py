"""Every decoder structure is evaluated as transformers itself would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from structures import STRUCTURES, is_decoder, load
from surgery.evaluate import evaluate


@pytest.mark.parametrize("name", [name for name in STRUCTURES if is_decoder(name)])
def test_a_short_document_costs_what_transformers_says(
    name: str, structure: Callable[[str], Path], tmp_path: Path
) -> None:
    path = structure(name)
    text = tmp_path / "text.txt"
    text.write_text("a short line")
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    model, _ = load(name, path)
    row = torch.tensor([ids])
    with torch.no_grad():
        logs = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
    expected = -float(logs[range(len(ids) - 1), ids[1:]].sum())
    (found,) = evaluate([path], [text]).models
    assert found.overall.tokens == len(ids) - 1
    assert found.overall.nats == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in STRUCTURES if is_decoder(name)])
def test_every_structure_has_maps_samples_and_speed(
    name: str, structure: Callable[[str], Path], tmp_path: Path
) -> None:
    path = structure(name)
    text = tmp_path / "text.txt"
    text.write_text("a short line of a few more words, so that there is something to read")
    child = evaluate([path, path], [text], maps=True, samples=1, speed=True).models[1]
    figures = [x for x in child.against[0].similarity.diagonal if x is not None]
    assert figures == pytest.approx([1.0] * len(figures), abs=1e-6)
    assert len(figures) > 1
    assert child.samples[0].tokens > 0
    assert child.speed.prefill_per_second > 0
