"""Speed and memory of linear attention and of the window against softmax, one layer, in one run.

    PYTHONPATH=. python -m benchmarks.attention --work DIR [--device cuda] [--lengths 1024,65536]

Prefill, forward with backward, and decode, without projections. Every form and task has a process
of its own, which goes up in length and stops where the next is foreseen to take too long. What is
measured is kept in DIR; the same command goes on, and ends with a dated page in benchmarks/results.
"""

import argparse
import ctypes
import datetime
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.attention_forms import (
    FLASH,
    KERNELS,
    SOFTMAX,
    Sizes,
    attend,
    decoder,
    forms,
    heads_first,
    inputs,
    used,
)
from benchmarks.losses import peak, reset
from benchmarks.machine import describe
from benchmarks.report import table
from benchmarks.stack import HERE, commit, say

SIZES = {
    "cpu": {"heads": 8, "kv_heads": 2, "width": 64, "dtype": "float32"},
    "cuda": {"heads": 32, "kv_heads": 8, "width": 128, "dtype": "bfloat16"},
}
LENGTHS = {"cpu": "1024,4096,16384,65536", "cuda": "1024,2048,4096,8192,16384,32768,65536"}
ROWS = {"cpu": "1,16", "cuda": "1,64"}
LIMIT = {"cpu": 10.0, "cuda": 20.0}  # seconds of one call that are not exceeded knowingly
PATIENCE = 1800  # seconds of one process
TASKS = ("prefill", "training", "decode")
TOLERANCE = 0.02  # of kernels in bfloat16, against the largest output
Facts = dict[str, Any]


def sync(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str) -> Facts:
    """Seconds of a call, and the extra peak of the first, which is not timed."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed hides what is taken anew
    before = reset(device)
    began = time.perf_counter()
    call()
    sync(device)
    first, extra = time.perf_counter() - began, peak(device) - before
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < 0.5 and len(seconds) < 50):
        began = time.perf_counter()
        call()
        sync(device)
        seconds.append(time.perf_counter() - began)
        if first > 5:  # once more is enough
            break
    return {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds),
            "runs": len(seconds), "extra": extra}  # fmt: skip


def call_of(form: str, task: str, sizes: Sizes, t: int) -> Callable[[], Any]:
    """One prefill, or one forward and backward pass."""
    import torch

    given = used(form, inputs(sizes, 1, t))
    if task == "prefill":
        return torch.no_grad()(lambda: attend(form, sizes, given))
    leaves = [x.requires_grad_() for x in given.values()]

    def train() -> None:
        torch.autograd.grad(attend(form, sizes, given).float().sum(), leaves)

    return train


def sweep(form: str, task: str, ask: argparse.Namespace, sizes: Sizes) -> Iterator[Facts]:
    """Go up in length, and in rows for decoding, until memory or patience ends."""
    import torch

    if task != "decode":
        call_of(form, task, sizes, 64)()  # what is loaded once is no memory of the form
    power, last = (2 if form in {SOFTMAX, FLASH} and task != "decode" else 1), None
    for rows in numbers(ask.rows) if task == "decode" else [1]:
        for t in numbers(ask.lengths):
            told = {"rows": rows, "length": t}
            if last and last[1] * (t / last[0]) ** power > LIMIT[ask.device]:
                yield told | {"left": f"over {LIMIT[ask.device]:.0f} s foreseen"}
                continue
            try:
                if task == "decode":
                    made = decoder(form, sizes, rows, t)
                    if made is None:
                        return
                    with torch.no_grad():
                        found = timed(made, ask.device)
                else:
                    found = timed(call_of(form, task, sizes, t), ask.device)
            except torch.OutOfMemoryError:
                yield told | {"left": "out of memory"}
                continue
            last = (t, found["seconds"]) if task != "decode" else None
            yield told | found


def numbers(text: str) -> list[int]:
    """Read a list of numbers."""
    return [int(word) for word in text.split(",")]


def differs(form: str, sizes: Sizes) -> float:
    """The largest difference of a kernel to our form, over the largest output."""
    import torch

    with torch.no_grad():
        given = inputs(sizes, 1, 1000)
        ours = attend(KERNELS[form], sizes, used(KERNELS[form], given))
        theirs = heads_first(attend(form, sizes, used(form, given)), sizes.kv_heads)
        return float((ours - theirs.float()).abs().max() / ours.abs().max())


def once(ask: argparse.Namespace, sizes: Sizes) -> Facts:
    """Measure one form at one task, here."""
    form, task = ask.form, ask.task
    if form in KERNELS:
        apart = differs(form, sizes)
        if not apart < TOLERANCE:
            return {"failed": f"differs by {apart:.2g} of the largest output"}
    return {"cells": list(sweep(form, task, ask, sizes))}


def apart(form: str, task: str, ask: argparse.Namespace, sizes: Sizes) -> Facts:
    """Measure in a process of its own, or take what an earlier run of the same command found."""
    asked = {"sizes": asdict(sizes), "lengths": ask.lengths, "rows": ask.rows, "commit": commit()}
    name = "".join(c if c.isalnum() else "-" for c in f"{form}-{task}")
    file: Path = ask.work / f"{name}.json"
    if file.exists() and (known := json.loads(file.read_text()))["asked"] == asked:
        found: Facts = known["found"]
        return found
    say(f"{form}: {task}")
    words = {"work": ask.work, "device": ask.device, "lengths": ask.lengths, "rows": ask.rows,
             "window": sizes.window, "form": form, "task": task}  # fmt: skip
    options = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "benchmarks.attention", *options]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"over {PATIENCE} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"failed": lines[-1][:200] if lines else f"exit code {done.returncode}"}
    found = json.loads(done.stdout.splitlines()[-1])
    file.write_text(json.dumps({"asked": asked, "found": found}, indent=1) + "\n")
    return found


def cell_text(task: str, cell: Facts | None) -> str:
    """Tokens a second and, where it says something, extra memory."""
    if cell is None:
        return "-"
    if "left" in cell:
        return str(cell["left"])
    tokens = cell["rows"] * (1 if task == "decode" else cell["length"])
    speed = f"{tokens / cell['seconds']:,.0f}"
    return speed if task == "decode" else f"{speed} ({cell['extra'] / 1e6:,.0f})"


def part(task: str, rows: int, lengths: list[int], found: dict[str, Facts], sizes: Sizes) -> str:
    """The table of one task."""
    what = {
        "prefill": "Prefill: tokens/s (extra peak, MB)",
        "training": "Forward and backward: tokens/s (extra peak, MB)",
        "decode": f"Decode, {rows} {'row' if rows == 1 else 'rows'}: tokens/s after so many tokens",
    }[task]
    lines = []
    for form, facts in found.items():
        cells = {(c["rows"], c["length"]): c for c in facts.get("cells", ())}
        shown = [cell_text(task, cells.get((rows, t))) for t in lengths]
        if "failed" in facts:
            shown = [facts["failed"], *[""] * (len(lengths) - 1)]
        kept = f"{sizes.kept(form, lengths[-1]) / 2**20:.2f}"
        lines.append([form, *shown, *([kept] if task == "decode" else [])])
    head = ["form", *(f"{t:,}" for t in lengths)]
    head += [f"kept by a row at {lengths[-1]:,}, MiB"] if task == "decode" else []
    return "\n".join([f"## {what}", "", *table(head, lines)]).rstrip()


def page(ask: argparse.Namespace, sizes: Sizes, found: dict[str, dict[str, Facts]]) -> str:
    """The whole page."""
    import torch

    told = describe(ask.work)
    kept = ("CPU", "cores", "RAM", "Python", "load at start (1, 5, 15 min)", "OMP_NUM_THREADS")
    where = [f"{key} {told[key]}" for key in kept]
    where += [torch.cuda.get_device_name()] if ask.device == "cuda" else []
    lengths, here = numbers(ask.lengths), forms(ask.device)
    absent = [name for name in (FLASH, *KERNELS) if name not in here]
    parts = [
        f"# Attention of one layer, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        f"`PYTHONPATH=. python -m benchmarks.attention --work DIR --device {ask.device} --lengths "
        f"{ask.lengths} --rows {ask.rows} --window {sizes.window}` at {commit()}. "
        f"{'; '.join(where)}; torch {torch.__version__}, {torch.get_num_threads()} threads.",
        f"{sizes.heads} query heads on {sizes.kv_heads} KV heads of width {sizes.width}, inputs in "
        f"{sizes.dtype}, a window of {sizes.window}; attention alone, without projections. Medians "
        "of up to 50 calls; memory of the first, on top of the inputs. Our forms compute in "
        "float32 whatever they are given, softmax in what it is given. On a CPU its keys are "
        "repeated for it beforehand; neither that nor the growing of its cache is counted."
        + (f" Not here: {', '.join(absent)}." if absent else ""),
        part("prefill", 1, lengths, found["prefill"], sizes),
        part("training", 1, lengths, found["training"], sizes),
        *(part("decode", n, lengths, found["decode"], sizes) for n in numbers(ask.rows)),
    ]
    return "\n\n".join(parts) + "\n"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--lengths", help="tokens, rising")
    parser.add_argument("--rows", help="sequences decoded at once")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    ask = parser.parse_args()
    ask.lengths = ask.lengths or LENGTHS[ask.device]
    ask.rows = ask.rows or ROWS[ask.device]
    return ask


def main() -> None:
    """Measure every form at every task, in turn, and write the page."""
    ask = arguments()
    sizes = Sizes(window=ask.window, device=ask.device, **SIZES[ask.device])
    if ask.form:
        sys.stdout.write(json.dumps(once(ask, sizes)) + "\n")
        return
    ask.work.mkdir(parents=True, exist_ok=True)
    found = {task: {f: apart(f, task, ask, sizes) for f in forms(ask.device)} for task in TASKS}
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    ask.results.mkdir(parents=True, exist_ok=True)
    file = ask.results / f"{today}-attention.md"
    file.write_text(page(ask, sizes, found))
    file.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    say(str(file))


if __name__ == "__main__":
    main()
