"""`surgery calibrate`: statistics of a model's activations on text, for plans that need them."""

from pathlib import Path
from typing import Annotated

import typer

from cli import render
from cli.writing import parse_size


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory or hub ref.")],
    *,
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            "--calibration",
            metavar="FILE",
            help="Text, or .jsonl with a document a line; repeatable.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    collect: Annotated[
        str, typer.Option(help="What to measure: layers, inputs, grams, joined by commas.")
    ] = "layers,inputs",
    context: Annotated[
        int | None,
        typer.Option(help="Tokens of a row.  [default: what the model takes, up to 2048]"),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows at most.")] = 128,
    batch_tokens: Annotated[int, typer.Option(help="Tokens fed at once.")] = 4096,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(help="What to compute in.  [default: float32 on cpu, as stored elsewhere]"),
    ] = None,
    memory: Annotated[str, typer.Option(help="Statistics to hold at most, such as 1G.")] = "1G",
    force: Annotated[bool, typer.Option("--force", help="Replace a file at the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Run a model over text, and keep what its activations show in a small file.

    `layers` tells which layers change little (surgery prune), `inputs` how large each input of
    each linear map is (width pruning, wanda), `grams` their products (sparsegpt, svd-llm).
    """
    held = parse_size(memory, "--memory")
    from surgery.calibrate import calibrate

    with render.progress(f"calibrate {output.name}", counted=True) as progress:
        found = calibrate(
            model,
            text,
            output,
            collect=[word.strip() for word in collect.split(",") if word.strip()],
            context=context,
            samples=samples,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype,
            memory=held,
            force=force,
            progress=progress,
        )
    told = {
        "output": str(found.out),
        "tensors": found.tensors,
        "bytes_written": found.nbytes,
        "rows": found.rows,
        "tokens": found.tokens,
        "passes": found.passes,
    }
    if as_json:
        render.print_json(told)
        return
    render.line(
        f"{found.out}  {found.tensors} tensors, {render.size(found.nbytes)}, from "
        f"{found.tokens} tokens in {found.rows} rows, {found.passes} pass(es)"
    )
