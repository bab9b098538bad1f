"""What changes of shape cost on the trained fixtures: bits per byte with paired intervals.

One command makes every model from fixtures/base by the command line, measures them on the held-out
text, and writes a dated page to benchmarks/results. Nothing is trained.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.stack import HERE, commit, say
from surgery.evaluate import evaluate

FIXTURES = HERE.parent / "fixtures"
BASE, TEXT = FIXTURES / "base", FIXTURES / "heldout" / "mix.jsonl"
RANKS = (4, 8, 16, 32, 64, 128)
MEASURED = ("--calibration", str(FIXTURES / "heldout" / "recall.jsonl"))


def main() -> None:
    """Make, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        made = {name: make(Path(scratch), name, words) for name, words in asks()}
        found = evaluate([BASE, *made.values()], [TEXT])
    lines = [f"| base | {found.models[0].domains[0].bits_per_byte:.4f} | | |"]
    for name, model in zip(made, found.models[1:], strict=True):
        figures = model.domains[0]
        change = figures.difference
        assert change is not None
        lines.append(
            f"| {name} | {figures.bits_per_byte:.4f} | {change.bits_per_byte:+.4f} | "
            f"{change.low:+.4f} {change.high:+.4f} |"
        )
    day = datetime.datetime.now(tz=datetime.UTC).date()
    page = args.results / f"{day}-effects.md"
    page.write_text(written(lines, day))
    say(str(page))


def asks() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a name and a command for each model."""
    yield "tied, stepwise", ("recurse", "tie", "--blocks", "2")
    yield "tied, average", ("recurse", "tie", "--blocks", "2", "--init", "average")
    for rank in RANKS:
        yield f"relaxed, rank {rank}", ("recurse", "relax", "--blocks", "2", "--rank", str(rank))
    ask = ("prune", "--method", "block-influence", "--layers", "1", *MEASURED)
    yield "pruned by block influence, 1 of 4 layers", ask
    for layer in range(4):
        yield f"without layer {layer}", ("prune", "--layers", str(layer))
    for method in ("magnitude", "wanda", "sparsegpt"):
        more = () if method == "magnitude" else MEASURED
        yield f"{method}, 2:4", ("sparsify", "--method", method, "--sparsity", "2:4", *more)
    yield "width, ffn 352 to 200", ("prune", "--width", "ffn=200", *MEASURED)
    yield "widened twice", ("widen", "--factor", "2")
    yield "upcycled to 4 experts, top 2", ("upcycle", "--experts", "4", "--top-k", "2")


def make(folder: Path, name: str, words: tuple[str, ...]) -> Path:
    """Make one model by the command line."""
    out = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    at = 2 if words[0] == "recurse" else 1
    command = [*words[:at], str(BASE), *words[at:], "-o", str(out)]
    subprocess.run([sys.executable, "-m", "surgery", *command], check=True, capture_output=True)
    return out


def written(lines: list[str], day: datetime.date) -> str:
    """Return the page."""
    table = "\n".join(lines)
    return f"""# Changes of shape on the trained fixtures, {day}

`python -m benchmarks.effects` at {commit()}. Bits per byte of held-out text (fixtures/heldout/mix,
64 documents), change from the base and its 95% interval, paired over documents. Nothing is trained
after the change. Calibration runs over other text, fixtures/heldout/recall.

| model | bits per byte | change | 95% interval |
|---|---|---|---|
{table}
"""


if __name__ == "__main__":
    main()
