"""Run the README: every `surgery` line and every Python block, in order, in one directory.

The directory holds a copy of fixtures/ and, as `base.safetensors`, the weights of fixtures/base:
the files that the README speaks of. A block under `<!-- not run: why -->` is left out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n+)?^```(?P<kind>console|bash|python)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A command line or a Python block, and where it stands."""

    line: int
    kind: str
    text: str


def main() -> int:
    """Run them all and stop at the first that fails."""
    found = pieces((ROOT / "README.md").read_text())
    if not any(piece.kind == "shell" for piece in found):
        sys.exit("README: no line starts with surgery in a console or bash block")
    with tempfile.TemporaryDirectory() as scratch:
        lay_out(Path(scratch))
        for piece in found:
            run(piece, Path(scratch))
    print(f"README: {len(found)} commands and blocks ran")
    return 0


def pieces(readme: str) -> list[Piece]:
    """What the README asks a reader to run."""
    found: list[Piece] = []
    for block in FENCE.finditer(readme):
        line = readme.count("\n", 0, block.start("body")) + 1
        if block["skip"]:
            continue
        if block["kind"] == "python":
            found.append(Piece(line=line, kind="python", text=block["body"]))
        else:
            found += commands(block["body"], line)
    return found


def commands(body: str, first: int) -> list[Piece]:
    """Lines that start with surgery, after a prompt or not, with their continuations."""
    found = []
    for match in re.finditer(r"^(?:\$ )?(surgery (?:[^\n]*\\\n)*[^\n]*)$", body, re.MULTILINE):
        line = first + body.count("\n", 0, match.start())
        found.append(Piece(line=line, kind="shell", text=match[1]))
    return found


def lay_out(directory: Path) -> None:
    """The files that the README speaks of."""
    shutil.copytree(ROOT / "fixtures", directory / "fixtures")
    shutil.copy(ROOT / "fixtures" / "base" / "model.safetensors", directory / "base.safetensors")


def run(piece: Piece, directory: Path) -> None:
    """Run one, with this virtualenv first on the path."""
    print(f"README.md:{piece.line}: {piece.text.strip()}", flush=True)
    here = Path(sys.executable).parent
    command = ["bash", "-ec"] if piece.kind == "shell" else [sys.executable, "-c"]
    done = subprocess.run(
        [*command, piece.text],
        check=False,
        cwd=directory,
        env=os.environ | {"PATH": f"{here}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        sys.exit(f"README.md:{piece.line}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.exit(main())
