"""Fixtures that every test may use."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Read by the libraries when they are imported, which happens later and only where a test needs it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices lose time to a second thread
# Code of checkpoints runs from copies, which transformers finds in one place a process.
MODULES = tempfile.mkdtemp(prefix="modules-of-tests-")
os.environ["HF_MODULES_CACHE"] = MODULES

# In a shell's background it is ignored, and so it would be by the commands that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPO = Path(__file__).resolve().parent.parent


def pytest_sessionfinish() -> None:
    """Leave no copies behind."""
    shutil.rmtree(MODULES, ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` on a machine without one."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def structure(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a structure fixture by its name, built once; read it, never write to it."""
    from structures import build

    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = build(name, tmp_path_factory.mktemp("structures") / name)
        return built[name]

    return get


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The trained checkpoints and hostile files of the repository."""
    return REPO / "fixtures"


@pytest.fixture(scope="session")
def test_data() -> Path:
    """A directory with data/, weights/ and oracle/ that the repository does not carry."""
    told = os.environ.get("SURGERY_TEST_DATA")
    beside = sorted(p.parent.parent for p in REPO.parent.glob("*/data/SOURCES.md"))
    found = Path(told) if told else next(iter(beside), None)
    if found is None or not (found / "data").is_dir():
        pytest.skip("no extra test data: set SURGERY_TEST_DATA to a directory that has it")
    return found
