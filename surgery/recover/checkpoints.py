"""The checkpoints of a run: each appears whole or not at all, and a damaged one is passed over.

A checkpoint is written to `step-00000120.tmp/`: tensors as safetensors, the rest as JSON, a
manifest with every file's size and digest. Files and folder are put on disk, one rename gives it
its name, then `LATEST` is replaced. Nothing but these names is trusted: `LATEST` is for people.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.disk import io_errors
from surgery.errors import CheckpointError, RecipeError, SurgeryError
from surgery.publish import discard, replace_directory, sync_directory
from surgery.recover.distributed import World
from surgery.recover.lock import FolderLock
from surgery.recover.manifest import (
    NAME,
    FileTold,
    Manifest,
    read_manifest,
    versions,
)
from surgery.recover.saved import FACTS, Saved, open_saved
from surgery.recover.sharded import agreed, holds_tensors, write_bytes, write_tensors
from surgery.recover.soundness import find_damage, set_aside

FINISHED = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """A folder of checkpoints that one run at a time reads and writes.

    All processes of a run call `save`, `load_newest` and `load_best`; the first one alone
    touches the disk. The folder is locked from the first call on until `close` or the end of the
    process, however it ends.

    Attributes:
        notes: one sentence for everything that was not as it should be.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        keep_best: bool = False,
        settings: Mapping[str, Any] | None = None,
        world: World | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        """Take a folder, to be made where it is not there.

        Args:
            keep: how many of the newest stay.
            keep_best: the one with the lowest score stays as well.
            settings: what must be the same whenever the run goes on; JSON values.
            tell: is given every note at once.

        Raises:
            RecipeError: none would stay.
        """
        if keep < 1:
            raise RecipeError(f"--keep {keep}", "is below 1", "the newest checkpoint has to stay")
        self.folder, self.keep, self.keep_best = Path(folder), keep, keep_best
        self.settings: Mapping[str, Any] = settings or {}
        self.world = world or _alone()
        self.notes: list[str] = []
        self._tell = tell
        self._lock = FolderLock(self.folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs have the folder."""
        self._lock.drop()

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        *,
        tokens: int = 0,
        score: float | None = None,
    ) -> None:
        """Save a state; what was saved before stays usable whatever happens.

        Args:
            state: per section a table of tensors, sharded or not, or anything that JSON has.

        Raises:
            StepError, PlanError: the disk refuses, or another run has the folder.
        """
        new = self._place(step).with_suffix(".tmp")
        sections = {name: table for name, table in state.items() if holds_tensors(table)}
        facts = {name: value for name, value in state.items() if name not in sections}
        manifest = Manifest(
            step=step,
            tokens=tokens,
            score=score,
            settings=self.settings,
            versions=versions(),
            files={},
        )
        agreed(self.world, lambda: self._begin(new))
        try:
            files = {
                f"{name}.safetensors": write_tensors(new / f"{name}.safetensors", table, self.world)
                for name, table in sections.items()
            }
            agreed(self.world, lambda: self._finish(new, manifest, files, facts))
        except SurgeryError:
            if self.world.is_first:
                _sweep(new)
            raise

    def load_newest(self, *, limit: int | None = None) -> tuple[int, Saved] | None:
        """Return the newest sound checkpoint, or None; damaged ones are renamed and told.

        Args:
            limit: the newest of this step or before.

        Raises:
            RecipeError: it is of a run that was asked something else.
            CheckpointError: it cannot be read, or is of a later format.
            PlanError: another run has the folder.
        """
        return self._load(lambda: self._find(self._steps(limit)))

    def load_best(self) -> tuple[int, Saved] | None:
        """Return the sound checkpoint of the lowest score, or None where none has one.

        Raises:
            RecipeError, CheckpointError, PlanError: as `load_newest`.
        """
        return self._load(lambda: self._find(self._by_score()))

    def forget(self, *, after: int) -> None:
        """Remove the checkpoints after a step: the run takes another way from there.

        Raises:
            StepError, PlanError: the disk refuses, or another run has the folder.
        """

        def act() -> None:
            self._lock.take()
            with io_errors(self.folder):
                for place in (self._place(step) for step in self._steps() if step > after):
                    old = place.with_suffix(".tmp")
                    if os.path.lexists(old):
                        discard(old)
                    place.rename(old)
                    discard(old)
                sync_directory(self.folder)

        agreed(self.world, act)

    def _load(self, find: Callable[[], str | None]) -> tuple[int, Saved] | None:
        def act() -> str | None:
            self._lock.take()
            return find()

        name = agreed(self.world, act)
        if name is None:
            return None
        saved = open_saved(self.folder / name, self.world)
        return int(name.partition("-")[2]), saved

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _steps(self, limit: int | None = None) -> list[int]:
        """Return the steps there are, newest first."""
        try:
            names = [path.name for path in self.folder.iterdir()]
        except OSError as error:
            raise CheckpointError(self.folder, f"cannot be read ({error.strerror})") from error
        steps = [int(found[1]) for name in names if (found := FINISHED.fullmatch(name))]
        return sorted((s for s in steps if limit is None or s <= limit), reverse=True)

    def _by_score(self) -> list[int]:
        scores = {step: self._score(step) for step in self._steps()}
        known = [(score, step) for step, score in scores.items() if score is not None]
        return [step for _, step in sorted(known)]

    def _score(self, step: int) -> float | None:
        try:
            return read_manifest(self._place(step)).score
        except (OSError, CheckpointError):
            return None

    def _find(self, steps: list[int]) -> str | None:
        """Return the name of the first sound checkpoint."""
        for number, step in enumerate(steps):
            place = self._place(step)
            damage = find_damage(place, step, self.settings)
            if damage is None:
                if number:
                    self._note(f"{place}: is the newest sound checkpoint; the run goes on from it")
                return place.name
            self._note(set_aside(place, damage))
        if steps:
            self._note(f"{self.folder}: holds no sound checkpoint; the run starts anew")
        return None

    def _note(self, sentence: str) -> None:
        self.notes.append(sentence)
        if self._tell:
            self._tell(sentence)

    def _begin(self, new: Path) -> None:
        """Make the folder that a checkpoint grows in; what broken-off saves left goes."""
        self._lock.take()
        with io_errors(self.folder):
            for old in self.folder.glob("step-*.tmp"):
                discard(old)
            new.mkdir()

    def _finish(
        self,
        new: Path,
        manifest: Manifest,
        files: Mapping[str, FileTold | None],
        facts: Mapping[str, Any],
    ) -> None:
        """Write the rest, give the checkpoint its name, and remove those that need not stay."""
        known = {name: told for name, told in files.items() if told is not None}
        known[FACTS] = write_bytes(new / FACTS, json.dumps(facts).encode())
        write_bytes(new / NAME, replace(manifest, files=known).document())
        place = self._place(manifest.step)
        with io_errors(self.folder):
            sync_directory(new)
            if os.path.lexists(place):
                replace_directory(new, place, place.with_suffix(".old.tmp"))
            else:
                new.rename(place)
            sync_directory(self.folder)
            self._point_to(place)
        self._prune(manifest.step)

    def _point_to(self, place: Path) -> None:
        latest = self.folder / "LATEST"
        new = latest.with_suffix(".tmp")
        new.unlink(missing_ok=True)
        write_bytes(new, f"{place.name}\n".encode())
        new.replace(latest)
        sync_directory(self.folder)

    def _prune(self, newest: int) -> None:
        """Remove the oldest; each first gets a name that no resume looks at."""
        steps = self._steps()
        staying = {newest, *steps[: self.keep]}
        if self.keep_best:
            staying |= set(self._by_score()[:1])
        self._remove(step for step in steps if step not in staying)
        _sweep(*self.folder.glob("step-*.tmp"))

    def _remove(self, steps: Iterable[int]) -> None:
        for place in map(self._place, steps):
            old = place.with_suffix(".tmp")
            try:
                place.rename(old)
                discard(old)
            except OSError as error:
                self._note(f"{place}: is not needed, and cannot be removed ({error.strerror})")


def _alone() -> World:
    import torch

    return World(0, 1, torch.device("cpu"))


def _sweep(*paths: Path) -> None:
    """Remove what is half done; what stays is ignored, and swept by the next save."""
    for path in paths:
        with suppress(OSError):
            discard(path)
