"""Turn the raw numbers of a run into a dated page; the losing ones are on it too."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
COPY_LIMIT, LOOP_LIMIT, MEMORY_LIMIT, START_LIMIT = 1.0, 1.3, 60.0, 0.3


def column(runs: Sequence[Facts], key: str) -> list[float]:
    """Return one number of every run, leaving out what could not be read."""
    return [run[key] for run in runs if run[key] is not None]


def middle(runs: Sequence[Facts], key: str) -> float:
    """Return the median of one number."""
    return statistics.median(column(runs, key))


def spread(runs: Sequence[Facts], key: str) -> str:
    """Return `median (min-max)`."""
    values = column(runs, key)
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def largest(runs: Sequence[Facts], key: str) -> str:
    """Return the largest of one number, in whole megabytes."""
    values = column(runs, key)
    return f"{max(values):.0f}" if values else "-"


def paired(mine: Sequence[Facts], other: Sequence[Facts]) -> list[float]:
    """Return the ratio of seconds of each round."""
    pairs = zip(mine, other, strict=True)
    return [a["seconds"] / b["seconds"] for a, b in pairs]


def ratio(mine: Sequence[Facts], other: Sequence[Facts]) -> str:
    """Return the ratio of the medians and the range over the rounds."""
    rounds = paired(mine, other)
    value = middle(mine, "seconds") / middle(other, "seconds")
    return f"{value:.2f} ({min(rounds):.2f}-{max(rounds):.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def arm_row(name: str, runs: Sequence[Facts], mine: Sequence[Facts], written: float) -> list[str]:
    """Return one line of the table of a state."""
    speed = written / 1e9 / middle(runs, "seconds")
    memory = [largest(runs, key) for key in ("peak", "tree", "private")]
    cpu = f"{middle(runs, 'user'):.2f} + {middle(runs, 'system'):.2f}"
    return [name, spread(runs, "seconds"), f"{speed:.2f}", ratio(mine, runs), cpu, *memory]


ARM_HEAD = (
    "who", "seconds until durable", "GB/s written", "surgery / this", "CPU s (user + system)",
    "peak MB", "tree MB", "private MB",
)  # fmt: skip


def state_part(size: Facts, state: str, mine: str) -> list[str]:
    """Return the section of one size in one state."""
    data = size["states"][state]
    runs = data["runs"]
    title = f"## {size['input_bytes'] / 1e9:.2f} GB in, {size['output_bytes'] / 1e9:.2f} GB out"
    rows = [arm_row(n, r, runs[mine], size["output_bytes"]) for n, r in runs.items()]
    grid = ", ".join(f"{name}: {s:.2f}" for name, s in data["settings"].items())
    rounds = len(runs[mine])
    return [
        f"{title}, {state} ({rounds} rounds, in turn)",
        "",
        *table(ARM_HEAD, rows),
        f"Settings of the bare loop (threads x chunk: best seconds): {grid}.",
        "",
    ]


def start_part(starts: Sequence[Facts]) -> list[str]:
    """Return the section on start-up."""
    if not starts:
        return []
    head = ("command", "exit", "CPU s", "wall s", "peak MB", "torch loaded", "heavy modules")
    rows = [
        [
            f"`{s['command']}`",
            str(s["exit_code"]),
            f"{s['cpu']:.2f} ({s['cpu_min']:.2f}-{s['cpu_max']:.2f})",
            f"{s['wall']:.2f}",
            f"{s['peak']:.0f}",
            "yes" if "torch" in s["heavy"] else "no",
            ", ".join(s["heavy"]) or "none",
        ]
        for s in starts
    ]
    return ["## Start-up and errors of plan time", "", *table(head, rows)]


def verdict(what: str, value: float, bound: float, unit: str) -> list[str]:
    """Return one line of the table of requirements."""
    return [what, f"<= {bound:g}{unit}", f"{value:.2f}{unit}", yes(value <= bound)]


def size_verdicts(size: Facts, names: tuple[str, str, str]) -> list[list[str]]:
    """Return the requirements on speed and memory at one size."""
    mine, copy, loop = names
    rows, label = [], f"{size['input_bytes'] / 1e9:.1f} GB"
    for state, data in size["states"].items():
        runs = data["runs"]
        seconds = {name: middle(runs[name], "seconds") for name in names}
        where = f"{label}, {state}"
        rows += [
            verdict(f"{where}: {copy}", seconds[mine] / seconds[copy], COPY_LIMIT, "x"),
            verdict(f"{where}: {loop}", seconds[mine] / seconds[loop], LOOP_LIMIT, "x"),
            verdict(f"{where}: peak", max(column(runs[mine], "peak")), MEMORY_LIMIT, " MB"),
        ]
    return rows


def start_verdicts(starts: Sequence[Facts]) -> list[list[str]]:
    """Return the requirements on start-up; a heavy import or a success counts as a failure."""
    rows = [verdict(f"`{s['command']}`", s["cpu"], START_LIMIT, " CPU s") for s in starts]
    torch = [s["command"] for s in starts if "torch" in s["heavy"]]
    rows.append(["commands above that load torch", "none", str(len(torch)), yes(not torch)])
    passed = [s["command"] for s in starts if "--help" not in s["command"] and not s["exit_code"]]
    return [*rows, ["bad commands above that exit 0", "none", str(len(passed)), yes(not passed)]]


def yes(holds: bool) -> str:
    """Return the last column of a requirement."""
    return "yes" if holds else "**no**"


def page(facts: Facts, names: tuple[str, str, str]) -> str:
    """Return the whole page."""
    sizes, starts = facts["sizes"], facts["sizes"][0]["starts"]
    rows = [row for size in sizes for row in size_verdicts(size, names)]
    rows += start_verdicts(starts) if starts else []
    about = [[key, value] for key, value in facts["machine"].items()]
    about += [["cold means", facts["cold"]], ["peer", facts["peer"] or "not measured"]]
    about += [[name, f"`{options}`"] for name, options in facts["peer_settings"].items() if options]
    parts = [state_part(size, state, names[0]) for size in sizes for state in size["states"]]
    lines = [
        f"# Stack x2, {facts['date']}, commit {facts['commit']}",
        "",
        f"`{facts['command']}`",
        "",
        *table(("machine", ""), about),
        "## What must hold",
        "",
        *table(("surgery stack against", "bound", "measured", "holds"), rows),
        *(line for part in parts for line in part),
        *start_part(starts),
    ]
    return "\n".join(lines).rstrip() + "\n"


def write(results: Path, facts: Facts, names: tuple[str, str, str]) -> list[Path]:
    """Write the page and the raw numbers; return their paths."""
    results.mkdir(parents=True, exist_ok=True)
    stem = results / f"{facts['date']}-stack"
    paths = [stem.with_suffix(".md"), stem.with_suffix(".json")]
    paths[0].write_text(page(facts, names))
    paths[1].write_text(json.dumps(facts, indent=1) + "\n")
    return paths
