"""`surgery reproduce`: make it again, and compare."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli import render
from cli.writing import parse_size
from surgery.checkpoint.adapter_source import open_any
from surgery.errors import RecipeError, VerificationError

if TYPE_CHECKING:
    from surgery.reproduce import Reproduction

SHOWN = 20  # differences; --json has all


def command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint that surgery made.")],
    *,
    moved: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="OLD=NEW", help="Where an input of the record is now."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write the result too; by default only compare."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads.  [default: by cores]")
    ] = None,
    memory: Annotated[str, typer.Option(help="Memory to hold at most, such as 512M or 4G.")] = "1G",
) -> None:
    """Make a checkpoint again from its record, and compare every tensor's digest.

    Nothing is written unless -o is given. Exit code 3 when a tensor or an input differs.
    """
    from cli.operations import find_operation
    from surgery.reproduce import reproduce

    limits = {"memory": parse_size(memory, "--memory"), "workers": workers}
    renamed = dict(map(_parse_moved, moved or ()))
    checkpoint = open_any(path)
    with render.progress(f"reproduce {checkpoint.name}") as progress:
        found = reproduce(
            checkpoint, find_operation, moved=renamed, out=output, progress=progress, **limits
        )
    differences = [*found.inputs, *found.outputs]
    if as_json:
        render.print_json({"path": path, "reproduced": not differences, **asdict(found)})
    else:
        _show(found, differences)
    if differences:
        count = f"{len(differences)} differences, the first: " if len(differences) > 1 else ""
        raise VerificationError(path, f"not reproduced: {count}{differences[0]}")


def _parse_moved(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        fact = "does not say what is where"
        raise RecipeError(f"--input {text}", fact, "write --input OLD=NEW")
    return old, new


def _show(found: "Reproduction", differences: list[str]) -> None:
    for note in found.versions:
        render.remark(f"note: {note}")
    for difference in differences[:SHOWN]:
        render.line(difference)
    if len(differences) > SHOWN:
        render.line(f"and {len(differences) - SHOWN} more (--json lists all)")
    if not differences:
        render.line(f"reproduced: {found.identical} tensors identical ({found.operation})")
