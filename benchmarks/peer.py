"""mergekit's passthrough, doing the same stacking from its own virtualenv."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

# Found by trying: one compute thread (no barrier spin), small shards written behind the reader,
# nothing but weights and config. --write-threads has no effect in 0.1.5.
SETTINGS = {
    "mergekit, defaults": (),
    "mergekit, best settings": (
        "-j", "1", "--async-write", "--write-threads", "2", "--out-shard-size", "200M",
        "--no-copy-tokenizer", "--no-write-model-card",
    ),
}  # fmt: skip
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def recipe(base: Path, layers: int, factor: int) -> str:
    """Return the configuration that repeats all layers `factor` times."""
    source = {"model": str(base), "layer_range": [0, layers]}
    slices = [{"sources": [source]} for _ in range(factor)]
    return json.dumps({"merge_method": "passthrough", "dtype": "bfloat16", "slices": slices})


def command(venv: Path, config: Path, out: Path, options: Sequence[str]) -> list[str]:
    """Return the command line of one merge."""
    return [str(venv / "bin" / "mergekit-yaml"), str(config), str(out), *options]


def version(venv: Path) -> str:
    """Return the versions of the peer and of torch in its virtualenv."""
    code = "from importlib.metadata import version as v; print(v('mergekit'), v('torch'))"
    python = str(venv / "bin" / "python")
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    peer, torch = done.stdout.split()
    return f"mergekit {peer}, torch {torch}"
