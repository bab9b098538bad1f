"""`surgery vocab`: tokens added, trimmed, taken from another model; rows padded."""

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

from cli.writing import BASE, Writing, default_output, make, write_plan, writing_options
from growth.vocab.choices import How, Init, Method

SEED = Annotated[int, typer.Option(help="Seed of --init random.")]


def build(name: str) -> Any:  # noqa: ANN401 - click's own type
    """Return the group under the name of the command."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.callback(no_args_is_help=True)(command)
    for single in (extend_command, trim_command, transplant_command, pad_command):
        app.command(single.__name__.removesuffix("_command"))(single)
    found = typer.main.get_command(app)
    found.name = name
    return found


def command() -> None:
    """Add tokens, trim to those a text uses, take another tokenizer, pad the table.

    Embedding, head, tokenizer, config and generation config change together; tied stays tied, and
    the rows of tokens that stay are copied bit for bit.
    """


@writing_options
def extend_command(
    base: BASE,
    *,
    token: Annotated[
        list[str] | None, typer.Option(metavar="T", help="A token; several times for several.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with one token a line.")
    ] = None,
    init: Annotated[
        How, typer.Option(help="What the new rows are; subword: the mean of the old pieces.")
    ] = "mean",
    special: Annotated[
        bool, typer.Option("--special", help="They are control tokens, not text.")
    ] = False,
    seed: SEED = 0,
    writing: Writing,
) -> None:
    """Add tokens; old tokens keep their ids and rows."""
    from growth.vocab.extend import extend, read_tokens

    new = [*(token or ()), *(read_tokens(tokens) if tokens else ())]
    make(
        base,
        lambda source: extend(source, tokens=new, init=init, special=special, seed=seed),
        suffix="extended",
        writing=writing,
    )


@writing_options
def trim_command(
    base: BASE,
    *,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            "--calibration",
            metavar="FILE",
            help='Keep what it uses; of .jsonl the "text" of each line.',
        ),
    ] = None,
    min_count: Annotated[
        int, typer.Option(metavar="N", help="Leave out tokens that are used fewer times.")
    ] = 1,
    keep: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Tokens to keep besides, one a line.")
    ] = None,
    keep_special: Annotated[
        bool, typer.Option("--keep-special/--drop-special", help="Special tokens nothing names.")
    ] = True,
    writing: Writing,
) -> None:
    """Keep the tokens that texts use.

    The texts are cut as before, which is checked. Bytes or letters, the unknown token, tokens that
    configs name, and those that BPE joins kept ones from are kept as well. Ids are given anew.
    """
    from growth.vocab.usage import trim_to_text

    make(
        base,
        lambda source: trim_to_text(
            source, texts=text or (), min_count=min_count, keep=keep, keep_special=keep_special
        ),
        suffix="trimmed",
        writing=writing,
    )


@writing_options
def transplant_command(
    base: BASE,
    *,
    tokenizer_from: Annotated[
        str, typer.Option(metavar="OTHER", help="The model whose tokenizer is taken.")
    ],
    method: Annotated[
        Method, typer.Option(help="How rows are made for tokens that BASE lacks.")
    ] = "omp",
    k: Annotated[int, typer.Option(help="Of omp: how many shared tokens a row is made of.")] = 64,
    writing: Writing,
) -> None:
    """Take another model's tokenizer.

    Tokens that both have keep BASE's rows. omp writes OTHER's row of a token as a sum of OTHER's
    rows of shared tokens and takes the same sum of BASE's rows (arXiv 2506.06607). subword is the
    mean of the pieces that BASE's own tokenizer cuts the token into, mean that of all rows.
    """
    from growth.vocab.transplant import transplant

    writing.limits()
    sources = writing.open(base), writing.open(tokenizer_from)
    plan = transplant(*sources, method=method, k=k)
    write_plan(plan, writing.output or default_output(sources[0], "transplanted"), writing)


@writing_options
def pad_command(
    base: BASE,
    *,
    multiple: Annotated[
        int, typer.Option(metavar="N", help="What the number of rows is made a multiple of.")
    ] = 64,
    init: Annotated[Init, typer.Option(help="What the new rows are.")] = "mean",
    seed: SEED = 0,
    writing: Writing,
) -> None:
    """Append rows that no token stands for.

    The tokenizer stays as it is. The logit of a mean row is the mean of all logits, so that it is
    never the largest.
    """
    from growth.vocab.pad import pad

    make(
        base,
        lambda source: pad(source, multiple=multiple, init=init, seed=seed),
        suffix=f"pad{multiple}",
        writing=writing,
    )
