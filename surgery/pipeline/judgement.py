"""Whether the output of a step is up to date."""

from collections.abc import Mapping
from typing import Literal

from surgery.errors import PlanError
from surgery.pipeline.folder import Folder
from surgery.pipeline.freshness import difference
from surgery.pipeline.output import find_output, what_changed
from surgery.pipeline.task import Planned

Verdict = tuple[Literal["run", "perhaps", "fresh", "removed"], str]


def judge(
    folder: Folder, name: str, planned: Planned, *, moved: Mapping[str, str] | None = None
) -> Verdict:
    """Compare a step's output with what its plan would make, and tell the reason.

    Args:
        moved: path of a stand-in to the path it stands for.

    Returns:
        `fresh`; `removed` after use, and would be; `perhaps`, as an input is not made yet; `run`.

    Raises:
        PlanError: the output is no longer what was made, or is not this pipeline's to replace.
    """
    path = folder.find(name)
    if path is None:
        return _judge_removed(folder, name, planned, moved or {})
    output = find_output(path)
    if output is None:
        fact = "is in the way, and is nothing that surgery made"
        raise PlanError(path, fact, "move it away, or choose another folder with -o")
    changed = what_changed(output, folder.state)
    if changed:
        fact = f"was changed since it was made ({changed})"
        raise PlanError(path, fact, "move it away, or make it again with --force")
    inputs = folder.ledger.inputs(planned.plan)
    reason = difference(planned, output.record, inputs, moved or {})
    if reason and name not in folder.state.own:
        fact = f"is in the way: {reason}, and this pipeline did not make it"
        raise PlanError(path, fact, "move it away, or replace it with --force")
    if reason:
        return "run", reason
    return ("fresh", "nothing changed") if inputs is not None else ("perhaps", "an input is remade")


def _judge_removed(
    folder: Folder, name: str, planned: Planned, moved: Mapping[str, str]
) -> Verdict:
    stored = folder.stored(name)
    output = find_output(stored) if stored else None
    if output is None:
        return "run", "it is not there"
    inputs = folder.ledger.inputs(planned.plan)
    reason = difference(planned, output.record, inputs, moved)
    if reason or inputs is None:
        return "run", reason or "it was removed after use, and an input is remade"
    return "removed", "removed after use, and nothing changed"
