"""A transfer of models that do not fit: some layers at a time, hidden states on disk between them.

A block is trained as a whole model would be, from the teacher's states before it; then the
teacher's states after it are written, file by file, and each file before it goes as soon as the
one after it is there. So one set of states lies on disk, and one file more.
"""

import gc
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.calibrate.statistics import identify
from surgery.checkpoint import TensorInfo, open_checkpoint
from surgery.disk import io_errors
from surgery.evaluate.load import open_source
from surgery.linearize.blocks import DONE, Blocks
from surgery.linearize.comparing import decoder_of
from surgery.linearize.objective import TransferGoal
from surgery.linearize.summing import Part, curve_of, summed
from surgery.linearize.transfer_ask import TransferAsk
from surgery.plan import TensorSpec
from surgery.publish import discard, sync_directory
from surgery.recover.distributed import joined
from surgery.recover.interrupts import Asked, listening
from surgery.recover.lock import FolderLock
from surgery.recover.loop import Loop, Progress, Remark
from surgery.recover.manifest import check_same
from surgery.recover.output import TRAINED
from surgery.recover.run import Recovery, export, told_of, write
from surgery.recover.session import (
    Session,
    to_masters,
)
from surgery.recover.sharded import write_bytes
from surgery.recover.tensor_file import write_tensors
from surgery.recover.trainable import make_trainable

if TYPE_CHECKING:
    import torch

IDENTITY = "blocks.json"


def transfer_blocks(
    ask: TransferAsk,
    *,
    force: bool,
    progress: Progress | None,
    remark: Remark | None,
    **limits: Any,  # noqa: ANN401 - those of `run`
) -> Recovery:
    """Transfer block by block, and write; for an ask that was checked.

    Unlike a whole transfer, what was written is not loaded again to be compared: it does not fit.

    Raises:
        RecipeError, CheckpointError, TrainError: as `transfer`.
        PlanError: hidden states do not fit on the disk.
    """
    assert ask.blocks is not None  # noqa: S101 - told by the caller
    with joined(ask.device) as world, ExitStack() as scratch:
        source = open_source(ask.student, scratch)
        blocks = Blocks(ask, world, source)
        with listening() as asked:
            run = _Run(blocks, asked, progress, remark)
            stopped = run.train()
        gc.collect()
        told = summed(run.done)
        curve = curve_of(run.done, stopped=stopped)
        if stopped:
            return Recovery(first=True, out=None, adapter=None, curve=curve, told=told)
        run.join()
        told |= {"blocks": ask.blocks, "hidden_state_bytes": blocks.nbytes}
        write(ask, told, mode="transfer", force=force, **limits)
    return Recovery(first=True, out=ask.out, adapter=None, curve=curve, told=told)


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockAsk(TransferAsk):
    """What is asked of one block; its checkpoints lie in a folder of its own."""

    at: Path

    @property
    def folder(self) -> Path:
        """Where the block keeps its checkpoints and figures."""
        return self.at


class _Run:
    """All blocks, one after the other, from where an earlier run stopped.

    Attributes:
        done: what trained blocks told, in their order.
    """

    def __init__(
        self, blocks: Blocks, asked: Asked, progress: Progress | None, remark: Remark | None
    ) -> None:
        self.blocks, self.asked, self.progress, self.remark = blocks, asked, progress, remark
        self.ask = blocks.ask
        self.done: list[Part] = []

    def train(self) -> bool:
        """Train every block; return whether somebody asked to stop.

        Raises:
            RecipeError: the folder is of a run that was asked something else.
            PlanError: another run has the folder, or the disk is too small.
        """
        lock = FolderLock(self.blocks.folder)
        lock.take()
        try:
            self._begin()
            for number in range(len(self.blocks)):
                if self._train(number) or self._hand_on(number):
                    return True
        finally:
            lock.drop()
        return False

    def join(self) -> None:
        """Write what all blocks have trained as one file."""
        found = [
            open_checkpoint(path)
            for path in sorted(self.blocks.folder.glob(f"*/trained/{TRAINED}"))
        ]
        infos = {name: tensor for one in found for name, tensor in one.tensors.items()}
        place = self.ask.folder / "trained"
        with io_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            specs = {name: TensorSpec(t.dtype, t.shape) for name, t in infos.items()}
            write_tensors(place / TRAINED, specs, _read_whole(infos))

    def _begin(self) -> None:
        """Refuse a folder of another run, and a disk that is too small; tell what it takes."""
        place = self.blocks.folder / IDENTITY
        with io_errors(self.blocks.folder):
            if not self.ask.resume:
                for block in self.blocks.folder.glob("[0-9]*"):
                    discard(block)
                place.unlink(missing_ok=True)
        told = self._identity()
        if place.is_file():
            check_same(self.ask.folder, told, json.loads(place.read_text()))
        self.blocks.check_disk()
        if self.remark is not None and self.blocks.nbytes:
            self.remark(f"{self.blocks.folder}: hidden states take {self.blocks.needs()} bytes")
        _write_json(place, told)

    def _identity(self) -> dict[str, Any]:
        free = self.ask.settings.free
        kept = {n: v for n, v in self.ask.settings.as_dict().items() if n not in free}
        held = self.blocks.data.held_out and self.blocks.data.held_out.digest
        found = {
            "student": identify(open_checkpoint(self.ask.student)),
            "data": self.blocks.data.rows.digest,
            "held_out": held,
        }
        return {**kept, **found, "blocks": self.ask.blocks}

    def _train(self, number: int) -> bool:
        """Train a block unless that is done; return whether somebody asked to stop."""
        place = self.blocks.place(number)
        linear = tuple(n for n in self.blocks.layers[number] if n in self.blocks.linear)
        if not linear:
            return False
        if (place / DONE).is_file():
            self.done.append(Part.read(place / DONE))
            return False
        session = self._session(number)
        goal = TransferGoal(session, self.blocks.feed(number))
        loop = Loop(session, self.asked, self._progress(number), self.remark, goal)
        curve = loop.run()
        self.done.append(Part(told_of(loop), linear, tuple(curve.losses)))
        if curve.stopped:
            return True
        export(session, place / "trained")
        _write_json(place / DONE, self.done[-1].as_dict())
        return False

    def _session(self, number: int) -> Session:
        loaded, student = self.blocks.load(number), open_checkpoint(self.ask.student)
        self.blocks.data.check_fits(loaded.embeddings, self.ask.student)
        trainable = make_trainable(loaded.model, student, self.ask.settings, part=True)
        to_masters(trainable, self.ask.settings)
        given = {f.name: getattr(self.ask, f.name) for f in fields(self.ask)}
        return Session(
            ask=_BlockAsk(**given, at=self.blocks.place(number)),
            world=self.blocks.world,
            student=student,
            loaded=loaded,
            head=None,
            trainable=trainable,
            layers=list(decoder_of(loaded.model).layers),
            rows=self.blocks.data.rows,
            selection=None,
            held_out=self.blocks.data.held_out,
            teacher=None,
        )

    def _progress(self, number: int) -> Progress | None:
        hears = self.progress
        if hears is None:
            return None
        return lambda told: hears({**told, "block": number, "blocks": len(self.blocks)})

    def _hand_on(self, number: int) -> bool:
        """Write what goes into the next block, and drop what went into this one.

        Returns:
            Whether somebody asked to stop.
        """
        before = None if number == 0 else self.blocks.states(number)
        if number + 1 < len(self.blocks) and not self.blocks.is_past(number + 1):
            after = self.blocks.states(number + 1)
            left = [n for n in range(len(after)) if not after.has(n)]
            loaded = self.blocks.load(number) if left else None
            for part in range(len(after)):
                if loaded is not None and part in left:
                    self.blocks.hand_on(number, part, after, loaded.model)
                if before is not None:
                    before.drop(part)
                if self.asked:
                    return True
        if before is not None:
            with io_errors(before.folder):
                shutil.rmtree(before.folder, ignore_errors=True)
        return False


def _write_json(path: Path, told: Mapping[str, Any]) -> None:
    new = path.with_suffix(".tmp")
    with io_errors(path):
        new.unlink(missing_ok=True)
        write_bytes(new, json.dumps(told).encode())
        new.replace(path)
        sync_directory(path.parent)


def _read_whole(tensors: "Mapping[str, TensorInfo]") -> "Iterator[tuple[str, torch.Tensor]]":
    from safetensors import safe_open

    for name, tensor in tensors.items():
        with safe_open(tensor.file, framework="pt") as file:
            yield name, file.get_tensor(name)
