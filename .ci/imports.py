"""Every module imports alone in a fresh interpreter, without torch where the design says so."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("surgery", "merges", "growth", "cli")
HEAVY = ("torch", "transformers", "peft")
# These run models, so importing them may import torch; for all others it waits until it is used.
MAY_LOAD_TORCH = (
    "surgery.calibrate",
    "surgery.models",
    "surgery.evaluate",
    "surgery.recover",
    "surgery.linearize",
)
PROBE = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))
"""


def main() -> int:
    """Import each module and print the failures."""
    names = sorted(module_name(path) for package in PACKAGES for path in sources(package))
    with ThreadPoolExecutor(max_workers=2) as pool:
        failures = [failure for failure in pool.map(probe, names) if failure]
    for failure in failures:
        print(f"imports: {failure}", file=sys.stderr)
    print(f"imports: {len(names) - len(failures)} of {len(names)} modules import alone")
    return 1 if failures or not names else 0


def probe(name: str) -> str | None:
    """What is wrong with the module, or None."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, name, *HEAVY],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        return f"{name} does not import alone:\n{done.stderr}"
    loaded = json.loads(done.stdout.splitlines()[-1])
    if loaded and not name.startswith(MAY_LOAD_TORCH):
        return f"{name} loads {', '.join(loaded)} when it is imported"
    return None


def sources(package: str) -> list[Path]:
    """The package's Python files, less those whose import is a run."""
    return [path for path in (ROOT / package).rglob("*.py") if path.name != "__main__.py"]


def module_name(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    sys.exit(main())
