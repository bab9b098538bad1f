"""What reports are made of: saved evaluations, records of checkpoints, folders of recoveries."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint.jsonfile import read_json_object, read_small_file
from surgery.errors import CheckpointError
from surgery.provenance import RECORD
from surgery.report.fields import Fields
from surgery.report.lineage import RUN_FOLDER, Ancestor, Lineage, trace

EVALUATION = "surgery-eval-1"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The folder of a recovery.

    Attributes:
        name: of the model that it makes.
        settings: as they were asked for.
        steps: a line of metrics each, in order.
    """

    path: Path
    name: str
    settings: Mapping[str, Any]
    steps: tuple[Fields, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """All that was read, in the order it was named."""

    evaluations: tuple[Fields, ...]
    lineage: Lineage
    trainings: tuple[Training, ...]

    @property
    def is_empty(self) -> bool:
        """Whether a page would show nothing."""
        models = any(run.plain("models") for run in self.evaluations)
        return not (models or self.lineage.made or any(run.steps for run in self.trainings))

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return {
            "format": "surgery-report-1",
            "evaluations": [{"path": str(r.file), **r.values} for r in self.evaluations],
            "models": [model.as_dict() for model in self.lineage.models.values()],
            "trainings": [
                {
                    "path": str(run.path),
                    "name": run.name,
                    "settings": run.settings,
                    "steps": [step.values for step in run.steps],
                }
                for run in self.trainings
            ],
        }


def read_all(paths: Sequence[Path]) -> Collected:
    """Read runs, each by what it is.

    Raises:
        CheckpointError: one is missing, broken or of no kind that a report can show, or there is
            nothing in any of them.
    """
    evaluations: dict[Path, Fields] = {}
    trainings: dict[Path, Training] = {}
    roots: list[Ancestor] = []
    for path in paths:
        if not path.exists():
            raise CheckpointError(path, "does not exist", "name a run.json or a directory")
        if path.is_dir() and (path / METRICS).exists():
            trainings[path.resolve()] = read_training(path)
        elif path.is_dir() and (inside := _runs_in(path)):
            trainings |= {run.resolve(): read_training(run) for run in inside}
        elif path.is_dir() or path.name.endswith(".safetensors"):
            roots.append(trace_root(path))
        elif path.name == RECORD:
            roots.append(trace_root(path.parent))
        else:
            evaluations[path.resolve()] = read_evaluation(path)
    found = Collected(
        evaluations=tuple(evaluations.values()),
        lineage=trace(roots),
        trainings=tuple(trainings.values()),
    )
    if found.is_empty:
        raise CheckpointError(paths[0], "holds nothing that a report could show")
    return found


def _runs_in(folder: Path) -> list[Path]:
    """Return the folders of recoveries that a run of several stages holds, in a fixed order."""
    return sorted(p.parent for p in folder.glob(f"*{RUN_FOLDER}/{METRICS}"))


def trace_root(path: Path) -> Ancestor:
    """Return a checkpoint that the user named.

    Raises:
        CheckpointError: it has no record.
    """
    found = Ancestor.at(path)
    if found is None or found.record is None:
        fact = f"has no {RECORD}, and no {METRICS} of a recovery"
        raise CheckpointError(path, fact, "name a checkpoint that surgery has made")
    return found


def read_evaluation(path: Path) -> Fields:
    """Read what `surgery eval -o` has saved.

    Raises:
        CheckpointError: it is something else.
    """
    document = read_json_object(path)
    if document.get("format") != EVALUATION:
        fact = f"is of format {document.get('format')!r}, and no saved evaluation ({EVALUATION})"
        raise CheckpointError(path, fact, "save one by surgery eval ... -o run.json")
    return Fields(document, path)


def read_training(folder: Path) -> Training:
    """Read the folder of a recovery, one that is going on too.

    Raises:
        CheckpointError: a line is broken; the last one may be, while it is being written.
    """
    file = folder / METRICS
    lines = read_small_file(file).decode("utf-8", "replace").split("\n")
    steps = [_line(file, i, line) for i, line in enumerate(lines[:-1], 1) if line.strip()]
    settings = folder / "settings.json"
    return Training(
        path=folder,
        name=folder.resolve().name.removesuffix(RUN_FOLDER),
        settings=read_json_object(settings) if settings.exists() else {},
        steps=tuple(steps),
    )


def _line(file: Path, number: int, line: str) -> Fields:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, f"line {number} is not JSON", "restore the file") from error
    if not isinstance(found, dict):
        raise CheckpointError(file, f"line {number} is not a JSON object", "restore the file")
    return Fields(found, file, f"line {number}")
