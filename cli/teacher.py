"""`surgery teacher`: a teacher's answers kept on disk, for recoveries that do not run it along."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from cli import render


def build(name: str) -> Any:  # noqa: ANN401 - click's own type
    """Return the group under the name of the command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback(no_args_is_help=True)(command)
    app.command("cache")(cache_command)
    found = typer.main.get_command(app)
    found.name = name
    return found


def command() -> None:
    """Keep a teacher's answers on disk, so that a recovery needs no room for the teacher."""


def cache_command(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="A directory or hub ref.")],
    *,
    data: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="What the recovery will train on; repeatable."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    replay_data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Its replay; repeatable.")
    ] = None,
    replay: Annotated[float, typer.Option(help="Its share of rows from the replay.")] = 0.05,
    top_k: Annotated[int, typer.Option(help="Tokens to keep; the rest is one number.")] = 64,
    context: Annotated[
        int | None,
        typer.Option(help="Its tokens of a row.  [default: what the model takes, up to 2048]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Its seed, which packs the rows.")] = 0,
    batch_tokens: Annotated[int, typer.Option(help="Tokens fed at once.")] = 8192,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="What to compute in.  [default: float32 on cpu, bfloat16 on cuda]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file at the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a teacher over data once, and keep its likeliest tokens with their probabilities.

    `surgery recover --teacher-cache FILE` learns from them, with the same --data, --context and
    --seed; with other ones the file is refused. Divergences over the kept tokens and one outcome
    for all the rest are lower bounds of the whole ones.
    """
    from surgery.checkpoint import open_checkpoint
    from surgery.recover.settings import default_context
    from surgery.recover.sources import Source
    from surgery.recover.teacher import cache_teacher

    if context is None:
        context = default_context(open_checkpoint(teacher).config)
    sources = [Source(path) for path in data]
    sources += [Source(path, share=replay) for path in replay_data or ()]
    with render.progress(f"cache {output.name}", counted=True) as progress:
        found = cache_teacher(
            teacher,
            sources,
            output,
            top_k=top_k,
            context=context,
            seed=seed,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype,
            force=force,
            progress=progress,
        )
    told = {
        "output": str(found.out),
        "rows": found.rows,
        "tokens": found.tokens,
        "top_k": found.top_k,
        "bytes_written": found.nbytes,
        "bytes_per_token": found.bytes_per_token,
    }
    if as_json:
        render.print_json(told)
        return
    render.line(
        f"{found.out}  {found.tokens} tokens in {found.rows} rows, {render.size(found.nbytes)}, "
        f"{found.bytes_per_token} bytes a token"
    )
