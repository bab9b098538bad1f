"""Small transfers of the trained fixture: a second or two each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from recovering import BASE, TEXT
from surgery.checkpoint import open_checkpoint
from surgery.linearize.convert import linearize
from surgery.linearize.transfer import TransferAsk, TransferSettings, transfer
from surgery.recover.run import Recovery
from surgery.recover.sources import Source
from surgery.run import run

SMALL = {"context": 32, "batch_tokens": 128, "micro_tokens": 64, "tokens": 6 * 128, "warmup": 0.0}
WINDOWED = {"window": 8}


def converted(out: Path, method: str = "lolcats", **options: Any) -> Path:
    """Write an untrained model of the fixture."""
    windowed = WINDOWED if method in {"lolcats", "liger", "lizard", "based", "swa-sink"} else {}
    plan = linearize(open_checkpoint(BASE), method=method, **{**windowed, **options})
    return run(plan, out).out


def ask_of(student: Path, out: Path, **options: Any) -> TransferAsk:
    """An ask; what is no field of it is a setting."""
    kept = set(TransferAsk.__dataclass_fields__) & set(options)
    fields = {name: options.pop(name) for name in kept}
    fields.setdefault("data", (Source(TEXT),))
    settings = TransferSettings(**{**SMALL, **options})
    return TransferAsk(student=str(student), out=out, settings=settings, **fields)


def transferred(student: Path, out: Path, **options: Any) -> Recovery:
    return transfer(ask_of(student, out, **options), force=True)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def furthest(one: Path, other: Path) -> float:
    """The largest difference of any two numbers of two models with the same tensors."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
