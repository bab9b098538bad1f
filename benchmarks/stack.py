"""Stack x2 against `cp`, a bare read-and-write loop and mergekit, in turn, warm and cold.

One command generates the input, measures, checks the output byte for byte, writes a dated page and
its raw numbers to benchmarks/results, and deletes its big files. Linux only.
"""

import argparse
import datetime
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import limit, machine, peer, report, stacked, startup
from benchmarks.meter import Usage, measure

FACTOR = 2
HERE = Path(__file__).parent
WORK = HERE.parent / "build" / "bench"
ENGINE = "{bin}/surgery stack {base} --factor 2 -o {out}"
MINE, COPY, LOOP = "surgery stack", "cp, then fsync", "bare loop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One competitor: its command for a new output, and the files it reads."""

    name: str
    command: Callable[[Path], list[str]]
    reads: tuple[Path, ...]
    timed_inside: bool = False
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One size of input: where its files are and who competes."""

    work: Path
    layers: int
    everything: bool
    base: Path
    reference: Path
    config: Path


def open_bench(work: Path, layers: int, *, everything: bool) -> Bench:
    """Generate the input of one size in a process of its own, which keeps this one small."""
    place = work / f"layers-{layers}"
    place.mkdir(parents=True)
    base, config = place / "base", place / "peer.json"
    generator = [sys.executable, "-m", "benchmarks.synthetic", str(base), "--layers", str(layers)]
    subprocess.run(generator, check=True, cwd=HERE.parent, stdout=sys.stderr)
    config.write_text(peer.recipe(base, layers, FACTOR))
    reference = place / "reference"
    return Bench(
        work=place,
        layers=layers,
        everything=everything,
        base=base,
        reference=reference,
        config=config,
    )


def say(text: str) -> None:
    """Tell on stderr how far the run is."""
    print(text, file=sys.stderr, flush=True)


def engine_arm(bench: Bench, template: str) -> Arm:
    """Return surgery itself."""
    words, programs = shlex.split(template), Path(sys.executable).parent

    def command(out: Path) -> list[str]:
        return [word.format(bin=programs, base=bench.base, out=out) for word in words]

    return Arm(name=MINE, command=command, reads=(bench.base,))


def copy_arm(bench: Bench) -> Arm:
    """Return `cp` of the same output bytes; the meter's fsync makes it durable."""
    return Arm(
        name=COPY,
        command=lambda out: ["cp", "-r", str(bench.reference), str(out)],
        reads=(bench.reference,),
    )


def loop_arm(bench: Bench, setting: limit.Setting) -> Arm:
    """Return the bare loop at one setting."""
    total = sum(path.stat().st_size for path in limit.weights(bench.reference))
    program = [sys.executable, "-m", "benchmarks.limit", str(bench.base)]
    options = ["--bytes", str(total), "--threads", str(setting.threads)]
    chunk = ["--chunk", str(setting.chunk // limit.MIB)]
    return Arm(
        name=LOOP,
        command=lambda out: [*program, str(out), *options, *chunk],
        reads=(bench.base,),
        timed_inside=True,
        environment={"PYTHONPATH": str(HERE.parent)},
    )


def peer_arms(bench: Bench, venv: Path | None) -> list[Arm]:
    """Return mergekit at its defaults and at its best settings."""
    if venv is None:
        return []

    def command(options: Sequence[str]) -> Callable[[Path], list[str]]:
        return lambda out: peer.command(venv, bench.config, out, options)

    return [
        Arm(name=name, command=command(opt), reads=(bench.base,), environment=peer.ENVIRONMENT)
        for name, opt in peer.SETTINGS.items()
    ]


def prepare(bench: Bench, arm: Arm, state: str) -> None:
    """Bring the page cache into the state for this arm, with nothing left to write back."""
    if state == "cold":
        machine.cool([bench.base, bench.reference], everything=bench.everything)
        return
    machine.settle()
    machine.warm(arm.reads)


def run(bench: Bench, arm: Arm, state: str) -> Usage:
    """Measure one run of one arm and delete its output."""
    place = bench.work / "run"
    place.mkdir()
    out, log = place / "out", bench.work / "log"
    prepare(bench, arm, state)
    try:
        return measure(arm.command(out), log=log, durable=[out], environment=arm.environment)
    finally:
        shutil.rmtree(place)


def one(bench: Bench, arm: Arm, state: str) -> dict[str, float | None]:
    """Return the numbers of one run; `seconds` is what is compared.

    For the bare loop that is the time inside the process, without the start of Python: the harder
    measure for whoever is compared with it.
    """
    usage = run(bench, arm, state)
    seconds = usage.wall
    if arm.timed_inside:
        seconds = json.loads((bench.work / "log").read_text())["seconds"] + usage.sync
    say(f"  {state:5} {arm.name:24} {seconds:7.2f} s  cpu {usage.cpu:6.2f} s  {usage.peak:7.0f} MB")
    return {"seconds": seconds, **asdict(usage)}


def make_reference(bench: Bench, arm: Arm) -> float:
    """Let the engine write the output once, check it, keep it for `cp`; return its bytes."""
    measure(arm.command(bench.reference), log=bench.work / "log")
    count = stacked.check(bench.base, bench.reference, layers=bench.layers, factor=FACTOR)
    say(f"{bench.layers} layers: all {count} tensors of the output equal their source")
    return sum(path.stat().st_size for path in limit.weights(bench.reference))


def tune(bench: Bench, state: str, repeats: int) -> dict[str, float]:
    """Return the best seconds of every setting of the bare loop."""
    table = {}
    for setting in limit.SETTINGS:
        arm = loop_arm(bench, setting)
        times = [one(bench, arm, state)["seconds"] for _ in range(repeats)]
        table[str(setting)] = min(t for t in times if t is not None)
    return table


def best(table: dict[str, float]) -> limit.Setting:
    """Return the fastest setting."""
    return min(limit.SETTINGS, key=lambda s: table[str(s)])


def compete(bench: Bench, arms: Sequence[Arm], state: str, rounds: int) -> dict[str, list[object]]:
    """Run the arms in turn, round by round."""
    results: dict[str, list[object]] = {arm.name: [] for arm in arms}
    for number in range(rounds):
        say(f"{bench.layers} layers, {state}, round {number + 1} of {rounds}")
        for arm in arms:
            results[arm.name].append(one(bench, arm, state))
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What to measure at one size."""

    layers: int
    rounds: int
    states: tuple[str, ...]


def measure_size(ask: Ask, args: argparse.Namespace, *, everything: bool) -> dict[str, object]:
    """Measure everyone at one size in every state asked for."""
    bench = open_bench(args.work, ask.layers, everything=everything)
    try:
        mine = engine_arm(bench, args.engine)
        written = make_reference(bench, mine)
        read = sum(path.stat().st_size for path in limit.weights(bench.base))
        states = {}
        for state in ask.states:
            settings = tune(bench, state, args.tune)
            arms = [mine, copy_arm(bench), loop_arm(bench, best(settings))]
            arms += peer_arms(bench, args.peer_venv)
            runs = compete(bench, arms, state, ask.rounds)
            states[state] = {"settings": settings, "runs": runs}
        sizes = {"layers": ask.layers, "input_bytes": read, "output_bytes": written}
        starts = start_costs(bench, args) if ask.layers == args.layers else []
        return {**sizes, "states": states, "starts": starts}
    finally:
        if not args.keep:
            shutil.rmtree(bench.work)


def start_costs(bench: Bench, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure `--help` and the errors of plan time, when the console script is installed."""
    script = Path(engine_arm(bench, args.engine).command(bench.work)[0])
    if script.name != "surgery":
        say("start-up is not measured: the engine is not the surgery command")
        return []
    return startup.measure_starts(script, bench.base, bench.work, max(args.rounds, 5))


def commit() -> str:
    """Return the commit that was measured, marked when files differ from it."""
    git = ["git", "-C", str(HERE.parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=False)
    state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, check=False)
    return head.stdout.decode().strip() + (" with local changes" if state.stdout else "")


def anonymous() -> str:
    """Return the command line without paths of this machine."""
    names = {"--work": "$WORK", "--peer-venv": "$PEER", "--results": "$RESULTS"}
    words, shown = iter(sys.argv[1:]), []
    for word in words:
        flag, _, value = word.partition("=")
        if flag in names:
            shown += [flag, names[flag]]
            value or next(words)
        else:
            shown.append(shlex.quote(word))
    return " ".join(["python", "-m", "benchmarks.stack", *shown])


def needed_bytes(asks: Sequence[Ask]) -> int:
    """Return the disk that the largest size takes: input, reference, one output, some slack."""
    layer, rest = 71_311_360, 262_148_096
    return max((1 + 2 * FACTOR) * a.layers * layer + 3 * rest for a in asks) + (1 << 30)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--work", type=Path, default=WORK, help="directory on the disk to measure")
    add("--peer-venv", type=Path, help="virtualenv with mergekit; not measured without")
    add("--rounds", type=int, default=5)
    add("--tune", type=int, default=2, help="runs of each setting of the bare loop")
    add("--layers", type=int, default=16, help="16 is 1.40 GB")
    add("--large-layers", type=int, default=67, help="67 is 5.04 GB; 0 leaves it out")
    add("--large-rounds", type=int, default=2)
    add("--states", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    add("--cold-files-only", action="store_true", help="evict the models, keep programs cached")
    add("--engine", default=ENGINE, help="command to measure, with {bin}, {base}, {out}")
    add("--results", type=Path, default=HERE / "results")
    add("--keep", action="store_true", help="leave the big files")
    return parser.parse_args()


def plan(args: argparse.Namespace) -> list[Ask]:
    """Return the sizes to measure; the large one is cold, as it may not fit in memory."""
    asks = [Ask(layers=args.layers, rounds=args.rounds, states=tuple(args.states))]
    if args.large_layers:
        asks.append(Ask(layers=args.large_layers, rounds=args.large_rounds, states=("cold",)))
    return asks


def main() -> None:
    """Measure everything and write the page."""
    args = parse()
    asks = plan(args)
    args.work.mkdir(parents=True, exist_ok=True)
    args.work = args.work.resolve()
    machine.require_free(args.work, needed_bytes(asks))
    everything = machine.can_drop() and not args.cold_files_only
    if args.peer_venv is None:
        say("mergekit is not measured: no --peer-venv given")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "command": anonymous(),
        "machine": machine.describe(args.work),
        "cold": "whole page cache dropped" if everything else "model files evicted",
        "peer": peer.version(args.peer_venv) if args.peer_venv else None,
        "peer_settings": {k: " ".join(v) for k, v in peer.SETTINGS.items()},
    }
    sizes = [measure_size(ask, args, everything=everything) for ask in asks]
    paths = report.write(args.results, {**facts, "sizes": sizes}, (MINE, COPY, LOOP))
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
