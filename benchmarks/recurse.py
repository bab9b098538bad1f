"""Relaxed recursion of a model of 1.4 GB: randomised SVD of all layers, the exact one of two.

One command generates the models, measures whole processes, loads the tied result in a fresh one to
see what memory it takes, writes a dated page to benchmarks/results, and deletes its big files.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import machine
from benchmarks.meter import Usage, measure
from benchmarks.stack import HERE, WORK, commit, say

RANK = 256
SURGERY = [sys.executable, "-m", "surgery"]
WHOLE = "randomised SVD, all layers"
LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
unrolled = sum(p.numel() * p.element_size() for _, p in
               model.named_parameters(remove_duplicate=False))
print(json.dumps({"held": sum(held.values()), "unrolled": unrolled}))
"""


def main() -> None:
    """Measure and write the page."""
    args = parse()
    place = args.work.resolve() / "recurse"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        rows = run_all(place, args)
        loading = loaded(place / "tied")
        sizes = {name: size_of(place / name) for name in ("whole", "tied")}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    page = args.results / f"{datetime.datetime.now(tz=datetime.UTC).date()}-recurse.md"
    page.write_text(written(rows, loading, sizes, args))
    say(str(page))


def run_all(place: Path, args: argparse.Namespace) -> dict[str, Usage]:
    """Generate the models and measure every case."""
    generate(place / "whole", args.layers)
    generate(place / "two", 2)
    relax = ("relax", "--blocks", "2", "--rank", str(RANK), "--svd")
    cases = {
        WHOLE: ("whole", (*relax, "randomized")),
        "plain tying, all layers": ("whole", ("tie", "--blocks", "2")),
        "randomised SVD, two layers": ("two", (*relax, "randomized")),
        "Gram matrix, two layers": ("two", (*relax, "gram")),
        "exact SVD, two layers": ("two", (*relax, "exact")),
    }
    found = {}
    for name, (source, words) in cases.items():
        out = place / ("tied" if name == WHOLE else "out")
        shutil.rmtree(out, ignore_errors=True)
        verb, *options = words
        command = [*SURGERY, "recurse", verb, str(place / source), *options, "-o", str(out)]
        found[name] = measure(command, log=place / "log", durable=[out])
        say(f"{name}: {found[name].wall:.1f} s, {found[name].peak:.0f} MB")
    return found


def generate(out: Path, layers: int) -> None:
    """Write a synthetic model."""
    command = [sys.executable, "-m", "benchmarks.synthetic", str(out), "--layers", str(layers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def loaded(model: Path) -> dict[str, int]:
    """Return bytes that the tied model's parameters hold in a fresh process, and unrolled."""
    command = [sys.executable, "-c", LOAD, str(model)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = json.loads(told.strip().splitlines()[-1])
    return found


def size_of(model: Path) -> int:
    """Return the bytes of a model's weight files."""
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def written(
    rows: dict[str, Usage], loading: dict[str, int], sizes: dict[str, int], args: argparse.Namespace
) -> str:
    """Return the page."""
    table = "\n".join(
        f"| {name} | {u.wall:.1f} | {u.cpu:.1f} | {u.peak:.0f} |" for name, u in rows.items()
    )
    told = "\n".join(f"- {key}: {value}" for key, value in machine.describe(args.work).items())
    mega = {name: size / 1e6 for name, size in (sizes | loading).items()}
    return f"""# Relaxed recursion, {datetime.datetime.now(tz=datetime.UTC).date()}

`python -m benchmarks.recurse --layers {args.layers}` at {commit()}. Whole processes, Python's start
and fsync of the output included; bfloat16 Llama of hidden 2048, feed-forward 3072, random weights
(a flat spectrum, the hardest case), rank {RANK}, two loops, default memory budget of 1 GiB.

| case | wall, s | CPU, s | peak, MB |
|---|---|---|---|
{table}

The whole model has {args.layers} layers and {mega["whole"]:.0f} MB. An exact SVD of all of it takes
as many times the two-layer figure as it has pairs of layers; it was not run to its end.

Loaded in a fresh process, the relaxed model's parameters hold {mega["held"]:.0f} MB
({mega["unrolled"]:.0f} MB if every depth had its own); its file has {mega["tied"]:.0f} MB.

{told}
"""


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
