"""`surgery convert`: turn a pickle checkpoint into safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from cli.writing import Writing, write_plan, writing_options
from surgery.checkpoint import Checkpoint
from surgery.convert import convert, open_pickle


@writing_options
def command(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A directory with pytorch_model.bin, or a .bin, .pt."),
    ],
    *,
    writing: Writing,
) -> None:
    """Turn a pickle checkpoint into safetensors, running none of its code.

    A directory gives a directory with config and tokenizer, a file gives a .safetensors file.
    """
    source = open_pickle(path, weights=writing.weights, allow_download=writing.allow_download)
    write_plan(convert(source), writing.output or _beside(source), writing)


def _beside(source: Checkpoint) -> Path:
    if source.config is None:
        return source.root / f"{source.name if source.bare else 'model'}.safetensors"
    folder = Path() if source.revision else source.root.parent
    return folder / f"{source.name}-safetensors"
