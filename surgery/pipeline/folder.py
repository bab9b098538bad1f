"""The folder of a pipeline's outputs: which are there, which are its own, what it remembers."""

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from surgery.disk import io_errors
from surgery.engine import Progress
from surgery.errors import PlanError, StepError
from surgery.pipeline.inputs import Ledger
from surgery.pipeline.output import Output, find_output
from surgery.pipeline.standin import write_hollow
from surgery.pipeline.state import State
from surgery.pipeline.task import Planned
from surgery.plan import fingerprint
from surgery.provenance import tool_version
from surgery.publish import discard
from surgery.run import Report, run
from surgery.write import is_occupied, unfinished

HIDDEN = ".surgery-pipeline"


class Folder:
    """Use as a context manager: one pipeline at a time works in a folder.

    A kill at any moment leaves it sound: outputs appear whole, removed ones vanish whole, and
    what is remembered is replaced in one step.

    Attributes:
        state: what is remembered.
        ledger: digests of inputs.
    """

    def __init__(self, path: str | Path, *, readonly: bool = False) -> None:
        """Take a folder, to be created where it is not there.

        Args:
            readonly: change nothing on disk, for a dry run.
        """
        self.path = Path(path)
        self.hidden = self.path / HIDDEN
        self.readonly = readonly
        self._lock = -1
        self._load()

    def _load(self) -> None:
        self.state = State.load(self.hidden / "state.json")
        self.ledger = Ledger(self.state)

    def __enter__(self) -> "Folder":
        if not self.readonly:
            self._take_lock()
            self._load()
            _discard(self.hidden / "trash")
        return self

    def _take_lock(self) -> None:
        try:
            self.hidden.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.hidden / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._drop_lock()
            fact = "another pipeline is working in it"
            raise PlanError(self.path, fact, "wait for it, or choose another folder") from error
        except OSError as error:
            raise PlanError(self.path, f"cannot be written ({error.strerror})") from error

    def _drop_lock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __exit__(self, *_: object) -> None:
        self._drop_lock()

    def save(self) -> None:
        """Put what is remembered on disk, but in a dry run."""
        if not self.readonly:
            self.state.save()

    def place(self, name: str, *, bare: bool = False) -> Path:
        """Return where the output of a step goes."""
        return self.path / (f"{name}.safetensors" if bare else name)

    def find(self, name: str) -> Path | None:
        """Return where the output of a step is, or None."""
        places = (self.place(name), self.place(name, bare=True))
        return next((path for path in places if is_occupied(path)), None)

    def stored(self, name: str) -> Path | None:
        """Return the stand-in of an output that was removed after use, or None."""
        if name not in self.state.removed or self.find(name):
            return None
        places = (self.place(name), self.place(name, bare=True))
        there = (self.hidden / "removed" / path.name for path in places)
        return next((path for path in there if path.exists()), None)

    def path_of_removed(self, name: str) -> Path:
        """Return where an output was that is no longer there."""
        stored = self.stored(name)
        return self.path / stored.name if stored else self.place(name)

    def make(
        self, name: str, planned: Planned, *, force: bool = False, progress: Progress | None = None
    ) -> Report:
        """Run a plan into the step's place, and remember what was read and written.

        Args:
            force: do not go on with what an interrupted run left.

        Raises:
            PlanError, StepError, Interrupted: see `surgery.run.run`.
        """
        plan, out = planned.plan, self.place(name, bare=planned.plan.bare)
        self._claim(name, out)
        limits = dict(planned.limits)
        resumes = limits.pop("fresh", False) is False and not force and _resumes(planned, out)
        report = run(plan, out, force=True, fresh=not resumes, progress=progress, **limits)
        self.ledger.note(plan, report.digests.inputs)
        for file, header in self._made(out).headers.items():
            found = {t.name: report.digests.outputs[t.name] for t in header.tensors}
            self.state.note_output(file, found)
        self.state.save()
        return report

    def _claim(self, name: str, out: Path) -> None:
        """Note that the output is this pipeline's before it is there, so that none is unowned."""
        if name not in self.state.own:
            self.state.own.append(name)
        self.state.removed.pop(name, None)
        self.state.save()
        _discard(self.hidden / "removed" / out.name)
        old = self.find(name)
        if old is not None and old != out:
            self._throw_away(old)

    def _made(self, out: Path) -> Output:
        output = find_output(out)
        if output is None:
            raise StepError(out, "vanished as soon as it was made", "let other programs be")
        return output

    def remove(self, name: str) -> None:
        """Remove an output that this pipeline made, and keep what tells that it was there."""
        path = self.find(name)
        output = find_output(path) if path else None
        if path is None or output is None or name not in self.state.own:
            return
        stand_in = self.hidden / "removed" / path.name
        half_done = stand_in.with_name(f".{path.name}")
        for old in (stand_in, half_done):
            _discard(old)
        with io_errors(half_done):
            write_hollow(output, half_done)
            half_done.rename(stand_in)
        self.state.removed[name] = {
            file.name: self.state.digests(file, header.stamp)
            for file, header in output.headers.items()
        }
        self.state.save()
        self._throw_away(path)

    def promise(self, files: Iterable[Path], name: str = "") -> None:
        """Take the files of a stand-in for those of an output.

        Args:
            name: of a step whose output was removed, so that its digests are known.
        """
        told = self.state.removed.get(name, {})
        for file in files:
            self.ledger.promised[file] = told.get(file.name, {})

    def _throw_away(self, path: Path) -> None:
        """Move a path out of the way in one step, then remove it."""
        trash = self.hidden / "trash"
        _discard(trash)
        with io_errors(path):
            path.rename(trash)
        _discard(trash)

    def free(self) -> int:
        """Return the bytes free where the outputs go."""
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free


def _discard(path: Path) -> None:
    try:
        if os.path.lexists(path):
            discard(path)
    except OSError as error:
        raise StepError(path, f"cannot be removed ({error.strerror})") from error


def _resumes(planned: Planned, out: Path) -> bool:
    """Whether an interrupted run of the very same plan left something to go on with."""
    return unfinished(out) == f"{tool_version()} {fingerprint(planned.plan, planned.shard_size)}"
