"""Sizes of functions and files, and no path of anyone's machine: a table, non-zero if broken."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("surgery", "merges", "growth", "cli")
TESTED = (*PACKAGES, "tests", "fixtures", "benchmarks", "docs", ".ci")

MEDIAN_FUNCTION, P95_FUNCTION, LONGEST_FUNCTION = 8, 35, 60
LONG_FILE, SHARE_OF_SHORT_FILES = 300, 0.95

# Built from parts so that this file does not name what it looks for.
HOMES = "|".join(["work", "root", "home", "Users", "private", "scratch"])
MACHINE_PATH = re.compile(rf"(?<![\w./~-])/(?:{HOMES})/[\w.-]+")
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ".html", ""}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> int:
    """Print the table and the breaches."""
    breaches = [*sizes_of_functions(), *sizes_of_files(), *machine_paths()]
    for breach in breaches:
        print(f"style: {breach}", file=sys.stderr)
    return 1 if breaches else 0


def sizes_of_functions() -> Iterator[str]:
    """Lines of code in a function of the packages; docstrings and option tables do not count."""
    lengths = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": (
            length(node) - (options(node) if path.is_relative_to(ROOT / "cli") else 0)
        )
        for path in sources(PACKAGES)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, Function)
    }
    ordered = sorted(lengths.values())
    median = statistics.median(ordered)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    row(f"functions ({len(ordered)}): median lines", median, MEDIAN_FUNCTION)
    row("functions: 95th percentile", p95, P95_FUNCTION)
    row("functions: longest", ordered[-1], LONGEST_FUNCTION)
    if median > MEDIAN_FUNCTION:
        yield f"the median function has {median} lines, more than {MEDIAN_FUNCTION}"
    if p95 > P95_FUNCTION:
        yield f"one function in twenty has {p95} lines or more, above {P95_FUNCTION}"
    for where, lines in lengths.items():
        if lines > LONGEST_FUNCTION:
            yield f"{where} has {lines} lines, more than {LONGEST_FUNCTION}"


def sizes_of_files() -> Iterator[str]:
    """Lines in every Python file of the repository."""
    lines = {path: len(path.read_text().splitlines()) for path in sources(TESTED)}
    long = {path: count for path, count in lines.items() if count > LONG_FILE}
    share = 1 - len(long) / len(lines)
    row(f"files ({len(lines)}): share within {LONG_FILE} lines", round(share, 3), 0.95)
    for path, count in sorted(long.items()):
        row(f"  {path.relative_to(ROOT)}", count, LONG_FILE)
    if share < SHARE_OF_SHORT_FILES:
        yield f"only {share:.1%} of the files have at most {LONG_FILE} lines"


def machine_paths() -> Iterator[str]:
    """Paths under somebody's home or work directory, in any tracked text."""
    for path in tracked():
        if path.suffix not in TEXT or path.stat().st_size > 1 << 20:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if found := MACHINE_PATH.search(line):
                yield f"{path.relative_to(ROOT)}:{number} has a machine's path: {found.group()}"


def options(node: Function) -> int:
    """Lines of a command's signature beyond the first: each option with its help, as a table."""
    return node.body[0].lineno - node.lineno - 1


def length(node: Function) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def sources(directories: tuple[str, ...]) -> list[Path]:
    """Tracked Python files below the directories."""
    return [
        path
        for path in tracked()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in directories
    ]


def tracked() -> list[Path]:
    """What git knows and the working tree still has."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def row(what: str, value: float, limit: float) -> None:
    """One line of the table."""
    print(f"{what:<48} {value:>8}   (limit {limit})")


if __name__ == "__main__":
    sys.exit(main())
