"""A linearization from beginning to end: convert, transfer, recover, measure, write."""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.disk import io_errors
from surgery.errors import StepError
from surgery.evaluate.load import find_device
from surgery.linearize.ask import TRANSFER, Ask, Stage, check_ask
from surgery.linearize.assembled import assembled, changed
from surgery.linearize.compared import compared
from surgery.linearize.convert import linearize
from surgery.linearize.identity import digest_of, file_digest, identity_of, recorded_digests
from surgery.linearize.methods import METHODS
from surgery.linearize.table import Held, as_dicts
from surgery.publish import discard
from surgery.recover.ask import Ask as Recovering
from surgery.recover.lock import FolderLock
from surgery.recover.sources import Source
from surgery.run import run

if TYPE_CHECKING:
    from surgery.evaluate.pairs import Progress as Measuring
    from surgery.recover.loop import Progress, Remark

CONVERTED, KEPT, UNTRAINED = "converted", "kept", "untrained"
CHANGED = "changed.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Who hears what happens; None hears nothing.

    Attributes:
        stage: called with the name of what begins.
        training: with the figures of every step.
        measuring: with a model's name, tokens fed, and tokens to feed.
        remark: with what the user should know.
    """

    stage: Callable[[str], None] = lambda _: None
    training: "Progress | None" = None
    measuring: "Measuring | None" = None
    remark: "Remark | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out.

    Attributes:
        out: the linearized model; None where the run was asked to stop before its end.
        stopped: the stage that was stopped.
        told: what the record holds of the stages.
    """

    out: Path | None
    stopped: Stage | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


def linearize_in_stages(
    ask: Ask,
    *,
    force: bool = False,
    watch: Watch | None = None,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> Outcome:
    """Linearize a model: convert it, train what is new, recover, and measure what it cost.

    A stage that is done for the same ask is not done again; one that was interrupted goes on.

    Args:
        force: replace a model that stands at the output.
        limits: memory, shard_size, workers of the writing.

    Raises:
        RecipeError, PlanError, CheckpointError: something does not fit; nothing was trained.
        TrainError: a stage failed; those before it are kept.
    """
    check_ask(ask, force=force)
    if ask.stages or ask.held_out:
        find_device(ask.device)
    lock = FolderLock(ask.folder)
    lock.take()
    try:
        return _Chain(ask, watch or Watch(), limits).run(force=force)
    finally:
        lock.drop()


class _Chain:
    """The stages of one ask, each with its mark: `STAGE.json` in the folder of the run."""

    def __init__(self, ask: Ask, watch: Watch, limits: Mapping[str, Any]) -> None:
        self.ask, self.watch, self.limits = ask, watch, limits
        self.base = open_checkpoint(ask.model)
        self.key = digest_of([identity_of(self.base), ask.conversion(ask.keep_softmax)])
        self.keep = None if ask.measured is not None else ask.keep_softmax
        self.models: dict[str, Path] = {}
        self.told: list[dict[str, Any]] = []
        self.chosen: Mapping[str, Any] | None = None

    def run(self, *, force: bool) -> Outcome:
        """Do what is not done yet."""
        at = self._model(CONVERTED, lambda: self.ask.convert(self.base))
        self.models[UNTRAINED] = at
        for stage in self.ask.stages:
            found = self._stage(stage, at)
            if found is None:
                return Outcome(out=None, stopped=stage)
            at = found
            if stage == TRANSFER and self.ask.measured is not None:
                at = self._choose(at)
            self.models[stage] = at
        return self._finish(at, force=force)

    def _model(self, name: str, plan: Callable[[], Any]) -> Path:
        """Write a model of the run by a plan, unless that is done."""
        out, key = self.ask.folder / name, digest_of([self.key, name, self.keep])
        if self._mark(name).get("key") != key or not _is_whole(out):
            self.watch.stage(name)
            run(plan(), out, force=True, fresh=not self.ask.resume, **self.limits)
            self._write_mark(name, {"key": key})
        return out

    def _stage(self, stage: Stage, student: Path) -> Path | None:
        """Train a stage, unless that is done; None where it was asked to stop."""
        out, settings = self.ask.folder / stage, self.ask.settings(stage, self.base.config)
        data = [file_digest(source) for source in self.ask.data]
        blocks = self.ask.training.blocks if stage == TRANSFER else None
        asked = [settings.as_dict(), data, self.ask.device, blocks]
        after, self.key = self.key, digest_of([self.key, stage, asked])
        mark = self._mark(stage)
        if mark.get("key") != self.key or not _is_whole(out):
            resume = self.ask.resume and mark.get("after") == after
            self._write_mark(stage, {"after": after})
            self.watch.stage(stage)
            train = self._transfer if stage == TRANSFER else self._recover
            told = train(stage, student, out, resume=resume)
            if told is None:
                return None
            mark = {"after": after, "key": self.key, "told": told}
            self._write_mark(stage, mark)
        self.told.append({"stage": stage, **mark["told"]})
        return out

    def _recover(
        self, stage: Stage, student: Path, out: Path, *, resume: bool
    ) -> dict[str, Any] | None:
        from surgery.recover.run import recover

        asked = Recovering(
            student=str(student),
            data=self.ask.data,
            out=out,
            settings=self.ask.settings(stage, self.base.config),
            teacher=self.ask.model if stage == "kd" else None,
            device=self.ask.device,
            resume=resume,
        )
        watch = self.watch
        found = recover(
            asked, force=True, progress=watch.training, remark=watch.remark, **self.limits
        )
        return None if found.out is None else dict(found.told)

    def _transfer(
        self, stage: Stage, student: Path, out: Path, *, resume: bool
    ) -> dict[str, Any] | None:
        from surgery.linearize.transfer import transfer
        from surgery.linearize.transfer_ask import TransferAsk

        asked = TransferAsk(
            student=str(student),
            data=self.ask.data,
            out=out,
            settings=self.ask.settings(stage, self.base.config),
            blocks=self.ask.training.blocks,
            device=self.ask.device,
            resume=resume,
        )
        watch = self.watch
        found = transfer(
            asked, force=True, progress=watch.training, remark=watch.remark, **self.limits
        )
        return None if found.out is None else dict(found.told)

    def _choose(self, transferred: Path) -> Path:
        """Give the layers that cost most their softmax attention back."""
        from surgery.linearize.choose import choose_layers

        mark = self._mark("chosen")
        key = digest_of([self.key, self.ask.keep_softmax])
        if mark.get("key") != key:
            self.watch.stage("chosen")
            trains = METHODS[self.ask.method].projections
            found = choose_layers(
                transferred,
                self.ask.data,
                count=self.ask.measured or 0,
                teacher=self.ask.model if trains else None,
                context=self.ask.settings(TRANSFER, self.base.config).context,
                device=self.ask.device,
                seed=self.ask.seed,
                progress=self._progress("layers"),
            )
            mark = {"key": key, **found.as_dict()}
            self._write_mark("chosen", mark)
        self.chosen = {name: mark[name] for name in ("layers", "kl", "tokens")}
        self.keep = ",".join(str(n) for n in mark["layers"])
        self.key = digest_of([self.key, self.keep])
        asked = self.ask.conversion(self.keep)
        self.models[UNTRAINED] = self._model(UNTRAINED, lambda: linearize(self.base, **asked))
        student = open_checkpoint(transferred)
        return self._model(KEPT, lambda: linearize(student, self.base, **asked))

    def _progress(self, what: str) -> Callable[[int, int], None] | None:
        watch = self.watch.measuring
        return None if watch is None else lambda done, total: watch(what, done, total)

    def _finish(self, at: Path, *, force: bool) -> Outcome:
        """Measure, and write the model with all that is told of it."""
        told: dict[str, Any] = {"stages": self.told, "recipe": self.ask.recipe.source}
        if self.ask.stages:
            told["trained"] = ", ".join(self.ask.stages)
        if self.chosen is not None:
            told["chosen"] = self.chosen
        if self.ask.held_out:
            told["table"] = self._table(at)
        self.watch.stage("written")
        trained = self._changed(at)
        asked = self.ask.conversion(self.keep)
        plan = assembled(self.base, trained, asked=asked, told=told)
        report = run(plan, self.ask.out, force=force, fresh=not self.ask.resume, **self.limits)
        if report.record["outputs"] != recorded_digests(at):
            fact = "does not hold what the stages made"
            raise StepError(self.ask.out, fact, f"what they made is {at}")
        if not self.ask.keep_stages:
            for name in (CONVERTED, UNTRAINED, KEPT, *self.ask.stages):
                _remove(self.ask.folder / name)
        return Outcome(out=self.ask.out, told={**plan.facts})

    def _changed(self, at: Path) -> Checkpoint | None:
        """Keep what was trained in a file beside the model, as its record names it."""
        if not self.ask.stages:
            return None
        file = self.ask.folder / CHANGED
        plan = changed(
            open_checkpoint(at), recorded_digests(self.models[UNTRAINED]), recorded_digests(at)
        )
        _remove(file)
        run(plan, file, **self.limits)
        return open_checkpoint(file)

    def _table(self, at: Path) -> dict[str, Any]:
        self.watch.stage("measured")
        held = Held(texts=self.ask.held_out, device=self.ask.device, seed=self.ask.seed)
        asked = self.ask.conversion(self.keep)
        rows = compared(
            self.base, self.models, at, asked, held, progress=self.watch.measuring, **self.limits
        )
        texts = {str(path): file_digest(Source(path)) for path in self.ask.held_out}
        return {"rows": as_dicts(rows), "texts": texts, "model": self.ask.model}

    def _mark(self, name: str) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            found = json.loads((self.ask.folder / f"{name}.json").read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def _write_mark(self, name: str, mark: Mapping[str, Any]) -> None:
        place = self.ask.folder / f"{name}.json"
        with io_errors(place):
            new = place.with_suffix(".tmp")
            new.write_text(json.dumps(mark, indent=1) + "\n")
            new.replace(place)


def _is_whole(model: Path) -> bool:
    """Whether a model stands there: a run leaves all of it or nothing."""
    return (model / "surgery.json").is_file()


def _remove(place: Path) -> None:
    if os.path.lexists(place):
        with io_errors(place):
            discard(place)
