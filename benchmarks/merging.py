"""Merge methods against mergekit on the same YAML and files, in turn; linear against a bare loop.

One command generates a base and two fine-tunes of it, measures, checks that both tools agree,
writes a dated page and its raw numbers to benchmarks/results, and deletes its big files.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import agreement, limit, machine, merging_page, peer
from benchmarks.meter import Usage, measure
from benchmarks.stack import HERE, WORK, commit, say

MODELS = ("base", "ft1", "ft2")
MINE, PEER, LOOP = "surgery", "mergekit", "bare loop"
# One compute thread: no barrier spin. The fastest of what its options can do (see stack.py).
BEST = (
    "-j", "1", "--lazy-unpickle", "--async-write", "--out-shard-size", "200M",
    "--no-copy-tokenizer", "--no-write-model-card",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One method: its YAML, how the tools may differ, and what is required of us.

    Attributes:
        cpu, wall: required ratio of the peer's time to ours, at least.
        memory: required peak, at most, in MB.
        slow: takes the peer minutes; measured in fewer rounds.
    """

    method: str
    parameters: dict[str, Any]
    cpu: float | None = None
    wall: float = 3
    memory: float = 1074
    tuned: int = 2
    base: bool = True
    listed: bool = False
    slow: bool = False
    random: bool = False

    def recipe(self, place: Path) -> str:
        """Return the YAML that both tools run."""
        names = [*([] if self.base and not self.listed else ["base"]), "ft1", "ft2"]
        models = [{"model": str(place / name), "parameters": {"weight": 0.4}} for name in names]
        config: dict[str, Any] = {
            "merge_method": self.method,
            "models": models[: self.tuned + 1] if self.listed else models,
            "dtype": "bfloat16",
            "parameters": self.parameters,
        }
        if self.base:
            config["base_model"] = str(place / "base")
        if "weight" not in NEEDS_WEIGHT.get(self.method, "weight"):
            for model in config["models"]:
                del model["parameters"]
        return json.dumps(config, indent=1)


NEEDS_WEIGHT = dict.fromkeys(("slerp", "model_stock", "sce", "karcher", "arcee_fusion"), "")
CASES = (
    Case(method="linear", parameters={}, cpu=3, wall=5, memory=256, base=False),
    Case(method="slerp", parameters={"t": 0.4}, cpu=3, tuned=1, listed=True),
    Case(method="task_arithmetic", parameters={}, cpu=3, memory=256),
    Case(method="model_stock", parameters={}, cpu=3, listed=True),
    Case(method="karcher", parameters={}, base=False),
    Case(method="arcee_fusion", parameters={}, tuned=1, listed=True),
    Case(method="dare_ties", parameters={"density": 0.5}, cpu=5, random=True, slow=True),
    Case(method="ties", parameters={"density": 0.5}, cpu=10, slow=True),
    Case(method="breadcrumbs", parameters={"density": 0.5, "gamma": 0.01}, cpu=10, slow=True),
    Case(method="sce", parameters={"select_topk": 0.5}, cpu=10, slow=True),
    Case(method="della", parameters={"density": 0.5}, cpu=10, random=True, slow=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where the models are."""

    work: Path
    models: Path
    layers: int
    everything: bool
    venv: Path | None


def make_models(place: Path, layers: int) -> None:
    """Generate the base and its fine-tunes, base + N(0, 1e-3)."""
    for number, name in enumerate(MODELS):
        words = [sys.executable, "-m", "benchmarks.synthetic", str(place / name)]
        words += ["--layers", str(layers), *(["--tuned", str(number)] if number else [])]
        subprocess.run(words, check=True, cwd=HERE.parent, stdout=sys.stderr)


def run(bench: Bench, who: str, command: Sequence[str], state: str) -> tuple[Usage, Path]:
    """Measure one run, and return it with its output."""
    out = bench.work / f"out-{who.replace(' ', '-')}"
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    sources = [bench.models / name for name in MODELS]
    if state == "cold":
        machine.cool(sources, everything=bench.everything)
    else:
        machine.settle()
        machine.warm(sources)
    words = [word.replace("{out}", str(out)) for word in command]
    environment = {**peer.ENVIRONMENT, "PYTHONPATH": str(HERE.parent) if who == LOOP else ""}
    usage = measure(words, log=bench.work / "log", durable=[out], environment=environment)
    return usage, out


def commands(bench: Bench, case: Case) -> dict[str, list[str]]:
    """Return who competes, and how."""
    recipe = bench.work / f"{case.method}.yaml"
    recipe.write_text(case.recipe(bench.models))
    surgery = str(Path(sys.executable).parent / "surgery")
    found = {MINE: [surgery, "run", str(recipe), "-o", "{out}"]}
    if bench.venv:
        mergekit = str(bench.venv / "bin" / "mergekit-yaml")
        found[PEER] = [mergekit, str(recipe), "{out}", *BEST]
    return found


def loop_command(bench: Bench, setting: limit.Setting) -> list[str]:
    """Return the bare loop: every input read once, one output of a model's size written."""
    total = sum(path.stat().st_size for path in limit.weights(bench.models / "base"))
    words = [sys.executable, "-m", "benchmarks.limit", str(bench.models / "base"), "{out}"]
    words += ["--also", *(str(bench.models / name) for name in MODELS[1:])]
    words += ["--bytes", str(total), "--threads", str(setting.threads)]
    return [*words, "--chunk", str(setting.chunk // limit.MIB)]


def one(bench: Bench, who: str, command: Sequence[str], state: str) -> tuple[dict[str, Any], Path]:
    """Return the numbers of one run; the bare loop's seconds leave out the start of Python."""
    usage, out = run(bench, who, command, state)
    seconds = usage.wall
    if who == LOOP:
        seconds = json.loads((bench.work / "log").read_text())["seconds"] + usage.sync
    say(f"  {state:5} {who:10} {seconds:7.2f} s  cpu {usage.cpu:6.2f} s  {usage.peak:6.0f} MB")
    return {"seconds": seconds, **asdict(usage)}, out


def measure_case(bench: Bench, case: Case, rounds: int) -> dict[str, Any]:
    """Run both tools in turn and compare their last outputs."""
    runs: dict[str, list[Any]] = {}
    outputs: dict[str, Path] = {}
    for number in range(rounds):
        say(f"{case.method}, warm, round {number + 1} of {rounds}")
        for who, command in commands(bench, case).items():
            numbers, outputs[who] = one(bench, who, command, "warm")
            runs.setdefault(who, []).append(numbers)
    agreed = None
    if PEER in outputs:
        agreed = agreement.compare(outputs[MINE], outputs[PEER], bench.models / "base")
    return {"case": asdict(case), "runs": runs, "agreement": agreed}


def measure_loop(bench: Bench, rounds: int, tune: int) -> dict[str, Any]:
    """Compare linear with the bare loop, warm and cold."""
    case, found = CASES[0], {}
    for state in ("warm", "cold"):
        settings = {}
        for setting in limit.SETTINGS:
            times = [one(bench, LOOP, loop_command(bench, setting), state) for _ in range(tune)]
            settings[str(setting)] = min(numbers["seconds"] for numbers, _ in times)
        best = min(limit.SETTINGS, key=lambda s: settings[str(s)])
        arms = {MINE: commands(bench, case)[MINE], LOOP: loop_command(bench, best)}
        runs: dict[str, list[Any]] = {who: [] for who in arms}
        for _ in range(rounds):
            for who, command in arms.items():
                runs[who].append(one(bench, who, command, state)[0])
        found[state] = {"settings": settings, "runs": runs}
    return found


def measure_size(args: argparse.Namespace, layers: int, *, large: bool) -> dict[str, Any]:
    """Measure one size of models; of the large one, memory is the question."""
    place = args.work / f"layers-{layers}"
    place.mkdir(parents=True, exist_ok=True)
    everything = machine.can_drop()
    bench = Bench(
        work=place, models=place, layers=layers, everything=everything, venv=args.peer_venv
    )
    cases = [case for case in CASES if not args.methods or case.method in args.methods]
    try:
        make_models(place, layers)
        done = []
        for case in cases:
            alone = large and case.method != "linear"
            given = Bench(**{**asdict(bench), "venv": None}) if alone else bench
            rounds = 1 if large else args.slow_rounds if case.slow else args.rounds
            done.append(measure_case(given, case, rounds))
        loop = {} if large else measure_loop(bench, args.rounds, args.tune)
        size = sum(path.stat().st_size for path in limit.weights(place / "base"))
        return {"layers": layers, "bytes": size, "cases": done, "loop": loop}
    finally:
        if not args.keep:
            shutil.rmtree(place)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, default=WORK, help="directory on the disk to measure")
    add("--peer-venv", type=Path, help="virtualenv with mergekit; not measured without")
    add("--rounds", type=int, default=5)
    add("--slow-rounds", type=int, default=5, help="for methods that take the peer minutes")
    add("--tune", type=int, default=1, help="runs of each setting of the bare loop")
    add("--layers", type=int, default=16, help="16 is 1.40 GB a model")
    add("--large-layers", type=int, default=67, help="67 is 5.04 GB a model; 0 leaves it out")
    add("--methods", nargs="*", default=(), help="only these")
    add("--results", type=Path, default=HERE / "results")
    add("--keep", action="store_true", help="leave the big files")
    return parser.parse_args()


def anonymous() -> str:
    """Return the command line without paths of this machine."""
    names = {"--work": "$WORK", "--peer-venv": "$PEER", "--results": "$RESULTS"}
    words = iter(sys.argv[1:])
    shown = [f"{word} {names[word]}" if word in names and next(words) else word for word in words]
    return " ".join(["python -m benchmarks.merging", *shown])


def main() -> None:
    """Measure everything and write the page."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    args.work = args.work.resolve()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "command": anonymous(),
        "machine": machine.describe(args.work),
        "cold": "whole page cache dropped" if machine.can_drop() else "model files evicted",
        "peer": peer.version(args.peer_venv) if args.peer_venv else None,
        "peer_options": " ".join(BEST),
    }
    sizes = [measure_size(args, args.layers, large=False)]
    if args.large_layers:
        sizes.append(measure_size(args, args.large_layers, large=True))
    print("\n".join(map(str, merging_page.write(args.results, {**facts, "sizes": sizes}))))


if __name__ == "__main__":
    main()
