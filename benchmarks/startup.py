"""What it costs to start: CPU seconds of `--help` and of plan-time errors, and what is loaded."""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.meter import measure

HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors", "typer", "rich")

# Runs a console script in the same interpreter and tells which heavy modules it left loaded.
SPY = """
import atexit, json, runpy, sys
target, sys.argv = sys.argv[1], sys.argv[2:]
heavy = {heavy!r}
def tell():
    loaded = [m for m in heavy if m in sys.modules]
    with open(target, "w") as f:
        json.dump({{"heavy": loaded, "modules": len(sys.modules)}}, f)
atexit.register(tell)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One command: CPU and wall seconds (median), memory, exit code, what was imported."""

    command: str
    exit_code: int
    cpu: float
    cpu_min: float
    cpu_max: float
    wall: float
    peak: float
    heavy: list[str]
    modules: int
    last_line: str


def imports(script: Path, arguments: Sequence[str], work: Path) -> tuple[int, list[str], int]:
    """Return exit code, heavy modules and module count of one command."""
    target = work / "modules.json"
    command = [sys.executable, "-c", SPY.format(heavy=HEAVY), str(target), str(script), *arguments]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    told = json.loads(target.read_text())
    return done.returncode, told["heavy"], told["modules"]


def start(script: Path, arguments: Sequence[str], *, work: Path, rounds: int) -> Start:
    """Measure one command `rounds` times after one unmeasured run."""
    code, heavy, modules = imports(script, arguments, work)
    log = work / "start.log"
    runs = [
        measure([str(script), *arguments], log=log, limit=120, expected=(code,))
        for _ in range(rounds)
    ]
    cpu = [r.cpu for r in runs]
    lines = log.read_text(errors="replace").replace(str(work), "$WORK").strip().splitlines()
    return Start(
        command=" ".join(["surgery", *arguments]).replace(str(work), "$WORK"),
        exit_code=code,
        cpu=statistics.median(cpu),
        cpu_min=min(cpu),
        cpu_max=max(cpu),
        wall=statistics.median(r.wall for r in runs),
        peak=max(r.peak for r in runs),
        heavy=heavy,
        modules=modules,
        last_line=lines[-1] if lines else "",
    )


def commands(base: Path, work: Path) -> list[list[str]]:
    """Return `--help` and commands that must fail before any weight is read."""
    out = ["-o", str(work / "never")]
    return [
        ["--help"],
        ["stack", "--help"],
        ["stack", str(work / "missing"), "--factor", "2", *out],
        ["stack", str(base), "--factor", "0", *out],
        ["stack", str(base), "--map", "3-1", *out],
        ["stack", str(base), "--factor", "2", "-o", str(base)],
    ]


def measure_starts(script: Path, base: Path, work: Path, rounds: int) -> list[dict[str, object]]:
    """Measure every command; the first is `--help`, the rest but the second must fail."""
    table = commands(base, work)
    return [asdict(start(script, one, work=work, rounds=rounds)) for one in table]
