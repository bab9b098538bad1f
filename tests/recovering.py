"""Small recoveries of the trained fixtures: a second each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.recover.ask import Ask
from surgery.recover.run import Recovery, recover
from surgery.recover.settings import Settings
from surgery.recover.sources import Source

FIXTURES = Path(__file__).parent.parent / "fixtures"
BASE, TEXT, RECALL = (
    FIXTURES / "base",
    *(FIXTURES / "heldout" / f"{name}.jsonl" for name in ("mix", "recall")),
)
SMALL = {
    "rank": 8, "context": 64, "batch_tokens": 256, "micro_tokens": 128, "tokens": 8 * 256,
    "warmup": 0.0, "decay": 0.25, "lr": 1e-3,
}  # fmt: skip


def settings_of(*, teacher: bool = False, **options: Any) -> Settings:
    losses = {"kl": 1.0} if teacher else {"ce": 1.0}
    return Settings(**{**SMALL, "losses": losses, **options})


def ask_of(student: Path, out: Path, **options: Any) -> Ask:
    """An ask; what is no field of it is a setting."""
    fields = {name: options.pop(name) for name in set(options) & set(Ask.__slots__)}
    fields.setdefault("data", (Source(TEXT),))
    taught = fields.get("teacher") is not None
    settings = settings_of(teacher=taught, **options)
    return Ask(student=str(student), out=out, settings=settings, **fields)


def recovered(student: Path, out: Path, *, force: bool = False, **options: Any) -> Recovery:
    return recover(ask_of(student, out, **options), force=force)


def figures(out: Path) -> list[dict[str, Any]]:
    lines = (out.parent / f"{out.name}.surgery-run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(out: Path) -> list[float]:
    """The loss of every step; the steps are told in order, each once."""
    told = figures(out)
    assert [one["step"] for one in told] == list(range(len(told)))
    return [one["loss"] for one in told]


def words(student: Path, out: Path, *more: str, **options: Any) -> list[str]:
    """The command line of a small recovery."""
    chosen = {**SMALL, "data": TEXT, **options}
    named = [
        part
        for name, value in chosen.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return ["recover", str(student), "-o", str(out), *named, *more]
