"""Build the wheel, look at what is in it, install it alone and run it from another directory."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("surgery", "merges", "growth", "cli")
DEMO = "cli/demo_data/"
MODELS = ("base", "uni", "arith", "v2")
DEMO_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def main() -> None:
    """Raise on the first thing that is not as it should be."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch))
        check_contents(wheel)
        check_installed(wheel, Path(scratch))


def build(scratch: Path) -> Path:
    """The wheel, built with the tools of this virtualenv."""
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", scratch, ROOT,
        cwd=scratch,
    )  # fmt: skip
    (wheel,) = scratch.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Exactly the four packages, the embedded models and the metadata, each complete."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    expect(len(info) == 1, f"one dist-info directory, not {sorted(info)}")
    expect(tops - info == set(PACKAGES), f"top level {sorted(tops - info)} is not {PACKAGES}")

    tracked = set(run("git", "ls-files", *PACKAGES, cwd=ROOT).split("\n")) - {""}
    tracked -= demo(tracked)
    packaged = {name for name in names - demo(names) if name.startswith(PACKAGES)}
    expect(packaged == tracked, f"differs from the tracked files: {sorted(packaged ^ tracked)}")

    wanted = {f"{DEMO}{model}/{name}" for model in MODELS for name in DEMO_FILES}
    expect(names >= wanted, f"{DEMO} lacks {sorted(wanted - names)}")
    (license_directory,) = info
    expect(f"{license_directory}/licenses/LICENSE" in names, "the licence is not in the wheel")
    size = wheel.stat().st_size
    expect(size < 10 << 20, f"{size} bytes is more than a small tool with four small models needs")
    print(f"wheel: {wheel.name}, {len(names)} files, {size:,} bytes")


def check_installed(wheel: Path, scratch: Path) -> None:
    """A fresh virtualenv that sees this one's dependencies, but not the checkout."""
    home = scratch / "alone"
    venv.create(home, with_pip=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # A .pth line adds the directory without running the .pth files in it: no editable install.
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=scratch)

    where = run(python, "-c", "import surgery; print(surgery.__file__)", cwd=scratch).strip()
    expect(Path(where).is_relative_to(purelib), f"surgery was imported from {where}")
    surgery = home / "bin" / "surgery"
    expect("stack" in run(surgery, "--help", cwd=scratch), "surgery --help does not list stack")
    run(surgery, "inspect", purelib / DEMO / "base", cwd=scratch)
    print("wheel: installs alone, and runs from another directory")


def demo(names: set[str]) -> set[str]:
    """The embedded models' files."""
    return {name for name in names if name.startswith(DEMO)}


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    expect(done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def expect(holds: bool, what: str) -> None:
    """Stop with a sentence when a condition does not hold."""
    if not holds:
        sys.exit(f"wheel: {what}")


if __name__ == "__main__":
    main()
