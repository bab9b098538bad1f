"""A pipeline as a program: each call makes or measures, or finds that nothing changed."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError
from surgery.pipeline.folder import Folder
from surgery.pipeline.task import Outcome, Planned, Task
from surgery.pipeline.work import Drawn, carry_out, survey
from surgery.plan import Plan

Ref = str | Path


class Pipeline:
    """Makes checkpoints and measures them in one folder; use as a context manager.

    Attributes:
        outcomes: what was done for each step so far.
    """

    def __init__(
        self,
        folder: Ref,
        *,
        force: bool = False,
        progress: Drawn = lambda _: nullcontext(),
        **limits: Any,  # noqa: ANN401 - those of `run`
    ) -> None:
        """Take a folder for the outputs.

        Args:
            force: make everything anew.
            progress: given a step's name, returns a context that gives what draws its progress.
            limits: workers, memory and shard_size, as `surgery.run.run` takes them.
        """
        self.folder = Folder(folder)
        self.force, self.progress, self.limits = force, progress, limits
        self.outcomes: list[Outcome] = []

    def __enter__(self) -> "Pipeline":
        self.folder.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.__exit__()

    def make(
        self,
        name: str,
        operation: Callable[..., Plan],
        *inputs: Ref | Sequence[Ref],
        **parameters: Any,  # noqa: ANN401 - the operation's own
    ) -> Path:
        """Make a checkpoint, unless it is there and nothing that it depends on has changed.

        Args:
            name: of the output in the folder.
            operation: takes opened checkpoints and parameters, and returns a plan.
            inputs: paths or hub refs, such as what an earlier `make` returned; a list of them is
                given to the operation as a list.

        Raises:
            SurgeryError: the step cannot be planned, or failed.
        """

        def plan(_: Mapping[str, Path]) -> Planned:
            opened = [_opened(one) for one in inputs]
            return Planned(plan=operation(*opened, **parameters), limits=self.limits)

        what = getattr(operation, "__name__", "operation")
        return self._do(Task(name=name, what=what, plan=plan))

    def measure(
        self,
        name: str,
        function: Callable[..., Any],
        *inputs: Ref | Sequence[Ref],
        **arguments: Any,  # noqa: ANN401 - the function's own
    ) -> Any:  # noqa: ANN401 - what a JSON document holds
        """Call a function on models, unless its result is there and would be the same.

        Args:
            name: of the JSON file in the folder.
            function: returns what JSON can hold, or a dataclass; it counts by its name.

        Raises:
            SurgeryError: the function failed.
        """
        made = {one.output: one.task.name for one in self.outcomes}
        refs = [str(one) for ref in inputs for one in _refs(ref)]
        outputs = {name: path for path, name in made.items() if str(path) in refs}
        told = [made.get(Path(ref), ref) for ref in refs]
        task = Task(
            name=name,
            what=f"{function.__module__}.{function.__qualname__}",
            uses=tuple(outputs),
            measure=lambda _: _as_json(function(*inputs, **arguments)),
            asked=(*told, json.dumps(arguments, sort_keys=True, default=str)),
        )
        return json.loads(self._do(task, outputs).read_bytes())

    def _do(self, task: Task, outputs: Mapping[str, Path] | None = None) -> Path:
        if any(task.name == one.task.name for one in self.outcomes):
            raise RecipeError(task.name, "is the name of an earlier step", "choose another")
        found = survey([task], self.folder, force=self.force, there=outputs)
        done = list(carry_out(found, self.folder, force=self.force, progress=self.progress))
        self.outcomes += done
        return done[0].output


def _refs(ref: Ref | Sequence[Ref]) -> Sequence[Ref]:
    return [ref] if isinstance(ref, str | Path) else ref


def _opened(ref: Ref | Sequence[Ref]) -> Checkpoint | list[Checkpoint]:
    if isinstance(ref, str | Path):
        return open_checkpoint(ref)
    return [open_checkpoint(one) for one in ref]


def _as_json(found: object) -> str:
    document = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
    return json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
