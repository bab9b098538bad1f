"""Speed and memory of `surgery recover` on one GPU, against Hugging Face Trainer and TRL.

    python -m benchmarks.gpu_recovery --work DIR [--shape 8b-lora 1b-full] [--page PAGE.md]

Models have real shapes and random weights. Every arm runs in a process of its own, on the same
model, rows and steps; each tool at several settings, and its best one counts. `--shape tiny`
runs everything on a CPU within minutes, to show that it works: its numbers mean nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import page
from benchmarks.machine import describe

TOKENIZER = Path(__file__).parent.parent / "fixtures" / "base"
LIMIT = 1500  # seconds of one arm
NEEDS = {"surgery": (), "trainer": ("accelerate",), "trl": ("trl", "datasets", "accelerate")}
NO_GPU = """no CUDA device is here, so nothing was measured. On a machine with one H100 run
    pip install 'model-surgery[liger]' accelerate trl datasets
    python -m benchmarks.gpu_recovery --work DIR --page benchmarks/results/DATE-gpu-recovery.md
To see on a CPU that the script works: python -m benchmarks.gpu_recovery --work DIR --shape tiny"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is trained, and how.

    Attributes:
        train: lora or full.
        rows: rows of an optimiser step.
        tries: rows fed at once that are tried.
        goal: share of the peak to reach, counting 4 N (lora) or 6 N (full) a token.
        speed: tokens a second to reach; 0 for none.
    """

    train: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    context: int
    rows: int
    tries: tuple[int, ...]
    goal: float = 0.0
    speed: float = 0.0


SHAPES = {
    # Llama 3.1 8B and Llama 3.2 1B, by their config.json.
    "8b-lora": Shape(train="lora", hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8,
                     vocabulary=128256, tied=False, context=4096, rows=4, tries=(1, 2),
                     goal=0.42, speed=13_000),
    "1b-full": Shape(train="full", hidden=2048, ffn=8192, layers=16, heads=32, kv_heads=8,
                     vocabulary=128256, tied=True, context=4096, rows=8, tries=(2, 4), goal=0.45),
    "tiny-lora": Shape(train="lora", hidden=64, ffn=128, layers=2, heads=4, kv_heads=2,
                       vocabulary=1024, tied=False, context=64, rows=4, tries=(2,)),
    "tiny-full": Shape(train="full", hidden=64, ffn=128, layers=2, heads=4, kv_heads=2,
                       vocabulary=1024, tied=True, context=64, rows=4, tries=(2,)),
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="needs 60 GB free for 8b-lora")
    parser.add_argument("--shape", nargs="+", default=["8b-lora", "1b-full"])
    parser.add_argument("--tools", nargs="+", choices=list(NEEDS), default=list(NEEDS))
    parser.add_argument("--steps", type=int, default=12, help="measured, after --warm ones")
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--page", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def arms(ask: argparse.Namespace, shape: Shape, *, cuda: bool) -> Iterator[dict[str, Any]]:
    """Yield the settings that are tried, of each tool."""
    liger = cuda and find_spec("liger_kernel") is not None
    settings = [(False, False, False), (False, False, True)]  # compile, liger, checkpointing
    if cuda:
        settings += [(True, False, False)]
    if liger:
        settings += [(False, True, False), (True, True, False), (False, True, True)]
    for tool in (name for name in ask.tools if is_here(name)):
        for rows in shape.tries:
            for compiled, kernels, recomputed in settings:
                yield {"tool": tool, "rows": rows, "compile": compiled, "liger": kernels,
                       "checkpointing": recomputed}  # fmt: skip


def is_here(tool: str) -> bool:
    """Whether the packages of a tool are installed."""
    return all(find_spec(name) is not None for name in NEEDS[tool])


def build(shape: Shape, out: Path, device: str) -> None:
    """Write a model of random weights, and one long text."""
    import random

    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if (out / "text.txt").exists():
        return
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied, rms_norm_eps=1e-5,
        max_position_embeddings=shape.context, rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out, max_shard_size="5GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, out)
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    count = 32 * shape.rows * shape.context
    text = " ".join("".join(draw.choices(letters, k=5)) for _ in range(count // 2))
    (out / "text.txt").write_text(text)


def run_arm(ask: argparse.Namespace, name: str, arm: dict[str, Any], device: str) -> dict[str, Any]:
    """Run one arm in a process of its own; a failure is told, not raised."""
    told = {
        **arm, "shape": asdict(SHAPES[name]), "device": device, "steps": ask.steps,
        "warm": ask.warm, "model": str(ask.work / name), "out": str(ask.work / "out"),
    }  # fmt: skip
    command = (sys.executable, "-m", "benchmarks.gpu_arms", json.dumps(told))
    shutil.rmtree(ask.work / "out", ignore_errors=True)
    (ask.work / "out").mkdir(parents=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {**arm, "failed": f"took more than {LIMIT} seconds"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or line.startswith("surgery:")]
        return {**arm, "failed": (errors or lines or ["no word"])[-1][:160]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**arm, **found}


def main(argv: list[str] | None = None) -> None:
    """Measure the shapes that were asked for, and write the page."""
    ask = parse(argv)
    import torch

    cuda = torch.cuda.is_available()
    wanted = [name for asked in ask.shape for name in SHAPES if name.startswith(asked)]
    if not wanted:
        sys.exit(f"--shape: is none of {', '.join(SHAPES)}")
    if not cuda and not all(name.startswith("tiny") for name in wanted):
        sys.exit(NO_GPU)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = "cuda" if cuda else "cpu"
    results = {}
    for name in wanted:
        build(SHAPES[name], ask.work / name, device)
        results[name] = []
        for arm in arms(ask, SHAPES[name], cuda=cuda):
            found = run_arm(ask, name, arm, device)
            results[name].append(found)
            print(name, json.dumps(found), flush=True)
        shutil.rmtree(ask.work / name)
    machine = describe(ask.work)
    machine |= {
        "GPU": torch.cuda.get_device_name(0) if cuda else "none",
        "torch": torch.__version__,
    }
    missing = [tool for tool in ("accelerate", "trl", "liger_kernel") if find_spec(tool) is None]
    day = datetime.now(UTC).date().isoformat()
    shapes = {name: asdict(SHAPES[name]) for name in wanted}
    text = page(day, machine, shapes, results, missing=missing, steps=ask.steps)
    if ask.page:
        ask.page.write_text(text)
        ask.page.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
