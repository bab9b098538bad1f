"""A teacher that is trained a little on the data before it teaches.

Source: "LLM Pruning and Distillation in Practice: The Minitron Approach", arXiv 2408.11796,
section 2 (teacher correction): where the data is not what the teacher was trained on, a light
fine-tuning of the teacher on it lowers the student's loss. Deviation: they tune the whole
teacher; here LoRA and the norms train, at LoRA's learning rate.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.checkpoint import open_checkpoint
from surgery.provenance import read_record
from surgery.recover.ask import Ask
from surgery.recover.distributed import World
from surgery.recover.sharded import agreed

if TYPE_CHECKING:
    from surgery.recover.run import Recovery

FOLDER = "teacher"  # of the corrected teacher, in the run's folder


def correction(ask: Ask) -> Ask:
    """Return what corrects the teacher of a recovery: cross-entropy on the same data."""
    settings = replace(
        ask.settings,
        train="lora",
        losses={"ce": 1.0},
        tokens=ask.settings.correct_teacher,
        correct_teacher=0,
        lr=None,
        lora_init="default",
        include=(),
        exclude=(),
        select=None,
        kernels=None,
    )
    return replace(
        ask,
        student=str(ask.teacher),
        teacher=None,
        out=ask.folder / FOLDER,
        settings=settings,
        keep_adapter=False,
        logs=(),
    )


def correct(lesson: Ask, world: World, train: "Callable[[], Recovery]") -> "Recovery | None":
    """Train the teacher unless an earlier run of the same ask has; all processes call it.

    Returns:
        What was come to where somebody asked to stop; None once the teacher is there.
    """
    if agreed(world, lambda: _is_there(lesson)):
        return None
    found = train()
    return found if found.out is None else None


def _is_there(lesson: Ask) -> bool:
    if not lesson.resume or not lesson.out.is_dir():
        lesson.out.parent.mkdir(parents=True, exist_ok=True)
        return False
    facts = (read_record(open_checkpoint(lesson.out)) or {}).get("facts", {})
    asked = json.loads(json.dumps(lesson.settings.as_dict()))
    return bool(facts.get("settings") == asked)
