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
