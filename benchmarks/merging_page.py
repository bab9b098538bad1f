"""The dated page of the merge benchmark; the losing numbers are on it too."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report import column, middle, spread, table, yes

Facts = dict[str, Any]
MINE, PEER, LOOP, LOOP_LIMIT = "surgery", "mergekit", "bare loop", 1.3
HEAD = (
    "method", "rounds", "surgery: seconds", "CPU s", "peak MB",
    "mergekit: seconds", "CPU s", "peak MB", "wall ratio", "CPU ratio",
)  # fmt: skip


def case_row(measured: Facts) -> list[str]:
    """Return one method's line."""
    mine, other = measured["runs"][MINE], measured["runs"].get(PEER)
    row = [measured["case"]["method"], str(len(mine)), *told(mine)]
    if not other:
        return [*row, "-", "-", "-", "-", "-"]
    ratios = [f"{middle(other, k) / middle(mine, k):.1f}" for k in ("seconds", "cpu")]
    return [*row, *told(other), *ratios]


def told(runs: list[Facts]) -> list[str]:
    """Return seconds, CPU and memory of one tool."""
    return [spread(runs, "seconds"), f"{middle(runs, 'cpu'):.1f}", f"{peak(runs):.0f}"]


def peak(runs: list[Facts]) -> float:
    """Return the largest peak, in MB."""
    return max(column(runs, "peak"))


def verdicts(measured: Facts) -> list[list[str]]:
    """Return what was required of one method, and whether it holds."""
    case, mine, other = measured["case"], measured["runs"][MINE], measured["runs"].get(PEER)
    name, rows = case["method"], []
    if other:
        for key, field in (("wall", "seconds"), ("cpu", "cpu")):
            if case[key] is not None:
                value = middle(other, field) / middle(mine, field)
                rows.append([f"{name}: {key} time of mergekit / surgery", f">= {case[key]:g}",
                             f"{value:.1f}", yes(value >= case[key])])  # fmt: skip
    bound = case["memory"]
    held = yes(peak(mine) <= bound)
    return [*rows, [f"{name}: peak memory", f"<= {bound:g} MB", f"{peak(mine):.0f} MB", held]]


def agreement_rows(size: Facts) -> list[list[str]]:
    """Return how near the two tools' outputs are."""
    return [
        [
            one["case"]["method"] + (" (random masks)" if one["case"]["random"] else ""),
            f"{one['agreement']['equal']:.2%}",
            f"{one['agreement']['within_one']:.2%}",
            f"{one['agreement']['distance']:.2g}",
        ]
        for one in size["cases"]
        if one["agreement"]
    ]


def loop_part(size: Facts) -> list[str]:
    """Return the comparison of linear with the bare loop."""
    if not size["loop"]:
        return []
    lines = ["## Linear of three models against a bare loop", ""]
    rows = []
    for state, data in size["loop"].items():
        runs = data["runs"]
        ratio = middle(runs[MINE], "seconds") / middle(runs[LOOP], "seconds")
        rows.append([state, spread(runs[MINE], "seconds"), spread(runs[LOOP], "seconds"),
                     f"{ratio:.2f}", f"<= {LOOP_LIMIT}", yes(ratio <= LOOP_LIMIT)])  # fmt: skip
    head = ("cache", "surgery, Python's start included", "loop, without", "ratio", "bound", "holds")
    lines += table(head, rows)
    for state, data in size["loop"].items():
        grid = ", ".join(f"{name}: {s:.2f}" for name, s in data["settings"].items())
        lines += [f"Settings of the loop, {state} (threads x chunk: seconds): {grid}.", ""]
    return lines


def size_part(size: Facts) -> list[str]:
    """Return the section of one size."""
    lines = [f"## Models of {size['bytes'] / 1e9:.2f} GB, page cache warm", ""]
    lines += table(HEAD, [case_row(one) for one in size["cases"]])
    near = agreement_rows(size)
    if near:
        lines += ["How near the outputs of the two tools are (bf16; the distance is relative to "
                  "what the merge changed):", ""]  # fmt: skip
        lines += table(("method", "equal", "within one step", "distance"), near)
    return [*lines, *loop_part(size)]


def page(facts: Facts) -> str:
    """Return the whole page."""
    required = [row for size in facts["sizes"] for one in size["cases"] for row in verdicts(one)]
    lines = [
        f"# Merging, {facts['date']}",
        "",
        f"- command: `{facts['command']}`",
        f"- commit: {facts['commit']}",
        f"- machine: {facts['machine']}",
        f"- peer: {facts['peer'] or 'not measured'}, options `{facts['peer_options']}`",
        f"- cold means: {facts['cold']}",
        "- Both tools run the same YAML on the same files, in turn. Seconds end when the output is "
        "on the disk; the start of Python is in them. Each figure: median (min-max).",
        "",
        "## What was required",
        "",
        *table(("what", "bound", "measured", "holds"), required),
    ]
    for size in facts["sizes"]:
        lines += size_part(size)
    return "\n".join(lines)


def write(folder: Path, facts: Facts) -> list[Path]:
    """Write the page and the raw numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{facts['date']}-merging.{suffix}" for suffix in ("md", "json")]
    paths[0].write_text(page(facts))
    paths[1].write_text(json.dumps(facts, indent=1) + "\n")
    return paths
