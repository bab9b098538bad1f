"""Whether an output is what a plan would make: its record against the plan, nothing computed."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.pipeline.output import UNREAD
from surgery.pipeline.task import Planned
from surgery.run import planned_record

Record = Mapping[str, Any]
LONGEST = 60  # characters of a value in a reason


def difference(
    planned: Planned, told: Record, inputs: Mapping[str, str] | None, moved: Mapping[str, str]
) -> str:
    """Return why a record is not that of the plan, in words, or nothing.

    Args:
        told: the record of an output.
        inputs: digests of what the plan reads; None where not all is made yet.
        moved: path of a stand-in to the path it stands for.
    """
    size = planned.shard_size
    wanted = planned_record(planned.plan, shard_size=size, inputs=inputs)
    text = json.dumps(wanted, default=str)
    for stand_in, path in moved.items():
        text = text.replace(json.dumps(stand_in)[1:-1], json.dumps(path)[1:-1])
    reasons = _reasons(told, json.loads(text), with_inputs=inputs is not None)
    return next(reasons, "")


def _reasons(told: Record, wanted: Record, *, with_inputs: bool) -> Iterator[str]:
    if told["operation"] != wanted["operation"]:
        yield f"it was made by {told['operation']}, not {wanted['operation']}"
    before, now = told["parameters"], wanted["parameters"]
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            yield f"{name} is {_short(now.get(name))}, was {_short(before.get(name))}"
    for name in ("surgery", "torch"):
        old, new = told["versions"].get(name), wanted["versions"].get(name)
        if old != new:
            yield f"{name} is {new or 'not needed'}, was {old or 'not needed'}"
    if with_inputs:
        yield from _other_inputs(told, wanted)
    yield from _other_files(told, wanted)
    if told.get("steps") != wanted["steps"]:
        yield "its inputs, or what is done to them, changed beside the weights"


def _other_inputs(told: Record, wanted: Record) -> Iterator[str]:
    if len(told["inputs"]) != len(wanted["inputs"]):
        yield f"it has {len(wanted['inputs'])} inputs, had {len(told['inputs'])}"
        return
    for before, now in zip(told["inputs"], wanted["inputs"], strict=True):
        if _digests(before) != _digests(now):
            yield f"the weights of {now['ref']} changed"


def _digests(entry: Record) -> list[Any]:
    return [facts.get("digest") for facts in entry["files"].values()]


def _other_files(told: Record, wanted: Record) -> Iterator[str]:
    if told["headers"] != wanted["headers"]:
        yield "its tensors have other shapes, dtypes, names or files"
    before, now = told["files"], wanted["files"]
    for name in {**before, **now}:
        if name not in UNREAD and before.get(name) != now.get(name):
            yield f"{name} changed"


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
