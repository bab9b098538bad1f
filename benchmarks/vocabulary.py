"""Time the union of two vocabularies against the peer's, on the same files in one run.

    python -m benchmarks.vocabulary --work DIR [--peer-venv PEER] [--page PAGE.md]

Each call runs in a process of its own, in turn; the seconds are those of the call alone, without
the imports. Ours reads both checkpoints' headers and tokenizers, makes the maps and the new
tokenizer's bytes; the peer's builds tokenizer and permutations, and writes nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.peer import ENVIRONMENT, version
from benchmarks.vocabularies import write

OURS = """
import json, resource, sys, time
began = time.perf_counter()
from surgery.checkpoint import open_checkpoint
from surgery.vocabulary import unify
ready = time.perf_counter()
models = [open_checkpoint(path) for path in sys.argv[1:]]
made = unify(models, choice="union", base=0)
done = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([done - ready, ready - began, usage.ru_maxrss / 1e3, len(made.ids)]))
"""
PEERS = """
import json, resource, sys, time
began = time.perf_counter()
from mergekit.common import ModelPath, ModelReference
from mergekit.tokenizer.build import build_tokenizer
ready = time.perf_counter()
models = [ModelReference(model=ModelPath(path=path)) for path in sys.argv[1:]]
made = build_tokenizer(
    base_model=models[0], referenced_models=models, tokenizer_source="union",
    trust_remote_code=False, add_tokens=[],
)
done = time.perf_counter()
usage = resource.getrusage(resource.RUSAGE_SELF)
tokens = len(made.tokenizer.get_vocab())
print(json.dumps([done - ready, ready - began, usage.ru_maxrss / 1e3, tokens]))
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the call and of the imports, peak memory in MB, tokens of the result."""

    call: float
    imports: float
    peak: float
    tokens: int


def once(python: Path | str, code: str, models: Sequence[Path], limit: float) -> Timing | None:
    """Run one union in a process of its own; None where it does not end within the limit."""
    command = [str(python), "-c", code, *map(str, models)]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=limit, env=_environment()
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return Timing(*json.loads(done.stdout.splitlines()[-1]))


def _environment() -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"}


def rows(args: argparse.Namespace) -> list[list[str]]:
    """Measure every size and return the lines of the table."""
    found = []
    for tokens in args.tokens:
        folder = args.work / str(tokens)
        models = [write(folder / name, tokens, seed=n) for n, name in enumerate("ab")]
        ours: list[Timing] = []
        peers: list[Timing | None] = []
        for number in range(args.rounds):
            ours += [t for t in [once(sys.executable, OURS, models, args.limit)] if t]
            if args.peer_venv and number < args.peer_rounds:
                python = args.peer_venv / "bin" / "python"
                peers.append(once(python, PEERS, models, args.limit))
        found.append(line(tokens, ours, peers, args.limit))
        print(" | ".join(found[-1]), file=sys.stderr)
    return found


def line(
    tokens: int, ours: Sequence[Timing], peers: Sequence[Timing | None], limit: float
) -> list[str]:
    """Return one line: sizes, seconds of both, their ratio, memory of both."""
    mine = statistics.median(t.call for t in ours)
    ended = [t for t in peers if t is not None]
    union = f"{ours[0].tokens}"
    spread = f"{mine:.2f} ({min(t.call for t in ours):.2f}-{max(t.call for t in ours):.2f})"
    memory = f"{max(t.peak for t in ours):.0f}"
    start = [f"2 x {tokens}", union, spread]
    if not peers:
        return [*start, "not measured", "", memory, ""]
    if len(ended) < len(peers):
        return [*start, f"stopped at {limit:.0f}", f"over {limit / mine:.0f}", memory, ""]
    theirs = statistics.median(t.call for t in ended)
    if {t.tokens for t in ended} != {ours[0].tokens}:
        raise RuntimeError(f"the peer has {ended[0].tokens} tokens, not {ours[0].tokens}")
    peak = f"{max(t.peak for t in ended):.0f}"
    return [*start, f"{theirs:.1f}", f"{theirs / mine:.0f}", memory, peak]


def page(args: argparse.Namespace, found: Sequence[Sequence[str]]) -> str:
    """Return the dated page."""
    peer = version(args.peer_venv) if args.peer_venv else "left out"
    facts = {**describe(args.work), "peer": peer, "OMP_NUM_THREADS": "1"}
    heads = ["vocabularies", "tokens of the union", "surgery, s", "peer, s", "peer / surgery",
             "surgery, peak MB", "peer, peak MB"]  # fmt: skip
    table = [heads, ["---"] * len(heads), *found]
    return "\n".join([
        f"# Union of two vocabularies, {datetime.now(UTC).date()}",
        "",
        "`python -m benchmarks.vocabulary --work $WORK --peer-venv $PEER`",
        "",
        "| machine |  |", "| --- | --- |",
        *(f"| {key} | {value} |" for key, value in facts.items()),
        "",
        *(f"| {' | '.join(row)} |" for row in table),
        "",
        f"Seconds of the call alone, imports left out: ours the median (least-most) of "
        f"{args.rounds}, the peer's of {args.peer_rounds}. Byte-level BPE, six tenths of the "
        "tokens shared, added tokens on top. Ours includes the bytes of the new tokenizer.json.",
        "",
    ])  # fmt: skip


def main() -> None:
    """Measure, print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-venv", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10_000, 20_000, 40_000, 150_000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    text = page(args, rows(args))
    print(text)
    if args.page:
        args.page.write_text(text)


if __name__ == "__main__":
    main()
