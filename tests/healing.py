"""A few steps of training on tiny students, and what is written then."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.models.own_code import own_model_class
from surgery.recover.output import healed, open_trained
from surgery.recover.selected import handed_on
from surgery.recover.settings import Settings
from surgery.recover.trainable import Trainable, make_trainable
from surgery.run import run

LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
IDS = torch.arange(24).reshape(2, 12) * 7 % 250


@dataclass(frozen=True)
class Healed:
    """A student, what it became in memory, and what was written of it."""

    student: Checkpoint
    trainable: Trainable
    before: torch.Tensor
    start: torch.Tensor
    after: torch.Tensor
    folder: Path
    out: Path

    def written(self) -> torch.Tensor:
        """Logits of the output, loaded anew; nothing may be missing or left over."""
        model, info = load(self.out)
        assert not any(info[key] for key in LOADING)
        return logits(model)

    def changed(self) -> set[str]:
        """Names of the tensors whose bytes are others than the student's."""
        old, new = tensors(self.student.root), tensors(self.out)
        assert {n: (t.shape, t.dtype) for n, t in old.items()} == {
            n: (t.shape, t.dtype) for n, t in new.items()
        }
        return {n for n in old if not torch.equal(old[n], new[n])}


def load(path: Path) -> tuple[Any, dict[str, Any]]:
    """The model in float32, of the class that a user would take."""
    kind = json.loads((path / "config.json").read_text())["model_type"]
    auto: Any = own_model_class(kind)
    if auto is None:
        vision = hasattr(AutoConfig.from_pretrained(path), "vision_config")
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def steps(trainable: Trainable, settings: Settings, *, count: int = 3) -> None:
    optimiser = torch.optim.AdamW(trainable.groups(settings), lr=0.01)
    trainable.model.train()
    for _ in range(count):
        optimiser.zero_grad()
        trainable.model(input_ids=IDS, labels=IDS).loss.backward()
        trainable.before_step()
        optimiser.step()
        trainable.after_step()


def heal(path: Path, out: Path, *, samples: Any = (), told: Any = None, **options: Any) -> Healed:
    """Train for three steps and write the result."""
    settings = Settings(**{"rank": 8, "seed": 3, **options})
    student = open_checkpoint(path)
    model, _ = load(path)
    before = logits(model)
    trainable = make_trainable(model, student, settings, samples=samples)
    start = logits(model)
    steps(trainable, settings)
    after = logits(model)
    trainable.export(out / "trained")
    sources = open_trained(student, out / "trained")
    plan = healed(*sources, mode=settings.train, handed_on=handed_on(student), told=told)
    run(plan, out / "healed")
    return Healed(student, trainable, before, start, after, out / "trained", out / "healed")
