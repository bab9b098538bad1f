"""What LoRA has trained, as an adapter that peft and `surgery lora fuse` read: plain, scale 1."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.adapters import CONFIG, PREFIX
from surgery.lora.written import key, task_of
from surgery.recover.lowrank import Lora, pair
from surgery.recover.targets import config_of

if TYPE_CHECKING:
    import torch


def adapter_config(lora: Lora, student: Checkpoint, whole: Iterable[str]) -> dict[str, Any]:
    """Return the adapter_config.json of plain LoRA with scale 1.

    Args:
        whole: parameters that the adapter holds whole.
    """
    own = [t for t in lora.targets.values() if t.first == t.name]
    more = 2 if lora.start else 1
    return config_of(
        [replace(t, rank=t.rank * more) for t in own],
        base=student.ref,
        task=task_of(student.config),
        whole=sorted({name.rpartition(".")[0] for name in whole}),
    )


def adapter_tensors(
    model: Any,  # noqa: ANN401
    lora: Lora,
    whole: "Mapping[str, torch.Tensor]",
    gather: "Callable[[torch.Tensor], torch.Tensor]",
) -> "dict[str, torch.Tensor]":
    """Return the adapter's tensors in float32 by peft's names, the scale in B.

    A start that took B0 A0 out of the base gives it back: B A - B0 A0 = [B, -B0] [A; A0], which
    is peft's own conversion (`path_initial_model_for_weight_conversion`).
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    for module, target in lora.targets.items():
        if target.first != target.name:
            continue
        a, b = (gather(x).detach().float() for x in pair(model, module))
        if module in lora.start:
            a0, b0 = (x.float().to(a.device) for x in lora.start[module])
            a, b = torch.cat([a, a0]), torch.cat([b, -b0], dim=1)
        found |= {key(module, "A"): a, key(module, "B"): b * lora.scale}
    return found | {f"{PREFIX}{name}": gather(p).detach().float() for name, p in whole.items()}


def write_config(folder: Path, told: Mapping[str, Any]) -> None:
    """Write adapter_config.json."""
    (folder / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n")
