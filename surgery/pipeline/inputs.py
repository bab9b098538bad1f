"""Digests of a plan's inputs as they are now, of each tensor in the way that a run records it."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from surgery.checkpoint import TensorInfo
from surgery.digest import checksums, combine, leaf_digests
from surgery.pipeline.state import Digests, State
from surgery.plan import Plan
from surgery.preflight import default_workers
from surgery.slices import Scratch, Sources, pieces

Kind = Literal["sha256", "sum"]
HASHES = {"sha256": leaf_digests, "sum": checksums}


class Ledger:
    """Digests by file: remembered where the file has not changed, else read.

    Attributes:
        promised: files of stand-ins, with the digests that the real ones had or will have.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.promised: dict[Path, Digests] = {}

    def inputs(self, plan: Plan) -> dict[str, str] | None:
        """Return what a run would record of each tensor it reads, or None where it is not made.

        Raises:
            StepError: a file cannot be read, or changes meanwhile.
        """
        wanted = used(plan)
        marks = {file: mark for source in plan.sources for file, mark in source.stamps.items()}
        known = {file: self._known(file, marks) for file in marks}
        missing = [
            (tensor, kind)
            for tensor, kind in wanted.values()
            if tensor.name not in known[tensor.file].get(kind, {})
        ]
        if any(tensor.file in self.promised for tensor, _ in missing):
            return None
        if missing:
            with (plan.reader or Sources)(plan.sources) as sources:
                for (tensor, kind), digest in zip(missing, read(sources, missing), strict=True):
                    known[tensor.file].setdefault(kind, {})[tensor.name] = digest
                sources.check_unchanged()
        return {key: known[t.file][kind][t.name] for key, (t, kind) in wanted.items()}

    def _known(self, file: Path, marks: Mapping[Path, tuple[int, int, int, int]]) -> Digests:
        if file in self.promised:
            return self.promised[file]
        return self.state.digests(file, marks[file])

    def note(self, plan: Plan, found: Mapping[str, str]) -> None:
        """Remember the digests that a run has just recorded of its inputs."""
        marks = {file: mark for source in plan.sources for file, mark in source.stamps.items()}
        for key, (tensor, kind) in used(plan).items():
            if key in found:
                known = self._known(tensor.file, marks)
                known.setdefault(kind, {})[tensor.name] = found[key]


def used(plan: Plan) -> dict[str, tuple[TensorInfo, Kind]]:
    """Return each stored tensor that a plan reads, by the key of its digest, with its kind."""
    every = {f"{t.file}:{t.name}": t for step in plan.steps for t in step.stored}
    copied = {f"{t.file}:{t.name}" for step in plan.steps if step.is_copy for t in step.stored}
    return {key: (t, "sha256" if key in copied else "sum") for key, t in every.items()}


def read(sources: Sources, wanted: list[tuple[TensorInfo, Kind]]) -> list[str]:
    """Read tensors whole, in pieces, and return their digests."""

    def digest(tensor: TensorInfo, kind: Kind) -> str:
        scratch, leaves = Scratch(), []
        for start, count in pieces(tensor.nbytes):
            view = scratch.take(0, count)
            sources.read(tensor, start, view)
            leaves += HASHES[kind](view)
        return combine(leaves)

    with ThreadPoolExecutor(min(default_workers(), (os.cpu_count() or 1) + 1)) as pool:
        return list(pool.map(lambda one: digest(*one), wanted))
