"""`surgery ablate`: every average of parts that were trained apart, measured on held-out text."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cli import render
from cli.eval import models_and_texts
from cli.saving import check_file, save_json
from cli.soup import change_cells
from cli.writing import parse_size
from surgery.errors import RecipeError

if TYPE_CHECKING:
    from surgery.soups.ablate import Ablation, Figure, Subset

PLACE = "ablate"


def command(
    parts: Annotated[
        list[str],
        typer.Argument(metavar="PARTS...", help="Models trained from one base on different data."),
    ],
    *,
    text: Annotated[
        list[str],
        typer.Option(metavar="FILE", help="Held-out text; a .jsonl line is a document."),
    ],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What they were trained from, beside them.")
    ] = None,
    against: Annotated[
        Literal["full", "best", "base"],
        typer.Option(help="What changes are from: the average of all parts, the best, the base."),
    ] = "full",
    sizes: Annotated[
        str | None,
        typer.Option(metavar="RANGES", help='How many parts to average, such as "1,3-5".'),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows to print; -o and --json have all.")] = 20,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens fed at most.  [default: what all models take, up to 2048]"),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens fed at once.")] = 8192,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    bootstrap: Annotated[int, typer.Option(min=1, help="Draws behind each interval.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    memory: Annotated[str, typer.Option(help="Memory for parts that need no second load.")] = "4G",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Save the result as JSON as well."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Take more than 10 parts; replace FILE of -o.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be measured.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the average of every subset of parts: what each part's data is worth.

    An average stands in for a model trained on the data of all its parts, so that N trainings
    tell of 2^N - 1 mixtures. Nothing is written but the table.

    Example: surgery ablate code math news --base base --text held-out.jsonl
    """
    from surgery.soups.ablate import ablate, count_subsets, wanted_sizes
    from surgery.soups.measure import HeldOut
    from surgery.soups.models import outputs_of

    named, more = models_and_texts(parts)
    wanted = wanted_sizes(len(named), _sizes(sizes), against=against)
    _check(named, base=base, against=against, force=force)
    room = parse_size(memory, "--memory")
    check_file(output, force=force)
    outputs = outputs_of(PLACE, named)
    held_out = HeldOut.read([*text, *more])
    count = count_subsets(len(named), wanted) + bool(base)
    if dry_run:
        _show_ask(named, count, as_json=as_json)
        return
    with render.progress("measure", counted=True) as progress:
        found = ablate(
            named,
            held_out,
            outputs,
            base=base,
            against=against,
            sizes=wanted,
            context=context,
            batch_tokens=batch_tokens,
            device=device,
            bootstrap=bootstrap,
            seed=seed,
            memory=room,
            progress=progress,
        )
    if output is not None:
        save_json(found.to_dict(), output)
    render.print_json(found.to_dict()) if as_json else show(found, top=top)


def _check(parts: Sequence[str], *, base: str | None, against: str, force: bool) -> None:
    from surgery.soups.ablate import MOST_PARTS

    if len(parts) > MOST_PARTS and not force:
        fact = f"has {len(parts)} parts, which are {2 ** len(parts) - 1} averages"
        raise RecipeError(PLACE, fact, "add --force, and --sizes to measure fewer")
    if against == "base" and base is None:
        raise RecipeError("--against base", "needs --base", "name what the parts were trained from")
    if base in parts:
        raise RecipeError("--base", f"{base} is one of the parts too", "name it once")


def _sizes(text: str | None) -> Collection[int] | None:
    """Read `1,3-5` as numbers."""
    if text is None:
        return None
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 1 << 10):
            raise RecipeError("--sizes", f"{text} is no list of sizes", "write for instance 1,3-5")
        found |= set(range(int(first), int(last) + 1))
    return found


def _show_ask(parts: Sequence[str], count: int, *, as_json: bool) -> None:
    if as_json:
        told = {"operation": PLACE, "parts": list(parts), "evaluations": count}
        render.print_json(told)
        return
    render.line(f"measure {count} times: averages of {len(parts)} parts, and the base if named")
    render.line("nothing was measured (--dry-run)", "dim")


def show(found: "Ablation", *, top: int) -> None:
    """Print the averages on each text, and on all together, the best first in each.

    The average of all parts, the base and what changes are from have a row wherever they rank.
    """
    texts = found.subsets[0].texts
    for place in range(len(texts)):
        title = Path(texts[place].name).name
        _table(found, [(row, row.texts[place]) for row in found.subsets], title, top=top)
        render.gap()
    if len(texts) > 1:
        _table(found, [(row, row.overall) for row in found.subsets], "overall", top=top)
        render.gap()
    reference = "the base" if found.against == "base" else f"the {found.against} average"
    render.line(f"changes are from {reference}; {found.documents} documents", "dim")
    if found.against == "best":
        note = "the documents chose the best, so changes from it look worse than they are"
        render.line(note, "dim")


def _table(
    found: "Ablation", rows: "Sequence[tuple[Subset, Figure]]", title: str, *, top: int
) -> None:
    ranked = sorted(rows, key=lambda row: row[1].bits_per_byte)
    kept = (found.parts, (), found.reference)
    cells = [
        (
            rank,
            " + ".join(subset.parts) or f"{found.base} (base)",
            f"{figure.bits_per_byte:.4f}",
            *change_cells(figure.change),
        )
        for rank, (subset, figure) in enumerate(ranked, start=1)
        if rank <= top or subset.parts in kept
    ]
    columns = ("rank", "parts", "bits/byte", "change", "95% interval", "verdict")
    render.table(columns, cells, numbers=(0, 2, 3, 4), title=title)
    if len(cells) < len(rows):
        render.line(f"{len(rows) - len(cells)} more: --top, -o or --json")
