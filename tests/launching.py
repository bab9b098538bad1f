"""Programs in two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent / "recover"
RUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=0")


def environment() -> dict[str, str]:
    paths = os.pathsep.join(map(str, TESTS.parents[:2]))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def in_two(*program: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes."""
    done = subprocess.run(
        (sys.executable, *RUN, *map(str, program)),
        env=environment(),
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-3000:]
    return done
