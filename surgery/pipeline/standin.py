"""An output without its weights, so that later steps can be planned while it is not there.

Headers, config and tokenizer are the real ones; tensor data is a hole in a sparse file. A plan
reads no weights, so it is the same plan.
"""

import os
import shutil
from pathlib import Path

from surgery.pipeline.output import Output
from surgery.pipeline.task import Planned
from surgery.provenance import RECORD, sealed
from surgery.run import beside, layout_of, planned_record


def write_standin(planned: Planned, path: Path) -> tuple[Path, ...]:
    """Write the stand-in of a plan's output at a path that is free; return its weight files."""
    plan = planned.plan
    layout = layout_of(plan, planned.shard_size)
    if plan.bare:
        _write_hole(path, layout.shards[0].header, layout.shards[0].size)
        return (path,)
    path.mkdir(parents=True)
    for shard in layout.shards:
        _write_hole(path / shard.name, shard.header, shard.size)
    for name, data in beside(plan, layout):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)
    record = planned_record(plan, shard_size=planned.shard_size)
    (path / RECORD).write_text(sealed(record, indent=2))
    return tuple(path / shard.name for shard in layout.shards)


def write_hollow(output: Output, path: Path) -> None:
    """Write the stand-in of an output that is there, its record included."""
    for file, header in output.headers.items():
        place = path / file.name if not output.bare else path
        place.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as opened:
            _write_hole(place, opened.read(header.data_start), header.size)
    for name in (*output.record["files"], RECORD) if not output.bare else ():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output.path / name, path / name)


def _write_hole(path: Path, header: bytes, size: int) -> None:
    path.write_bytes(header)
    os.truncate(path, size)
