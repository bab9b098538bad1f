"""What the measurements ran on, and the state of its page cache and disk."""

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

DROP = Path("/proc/sys/vm/drop_caches")
READ_BYTES = 8 << 20
SETTLE_SECONDS = 0.5


def first(path: str, key: str) -> str:
    """Return the value of the first `key : value` line of a /proc file, or nothing."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")


def filesystem(path: Path) -> str:
    """Return type and options of the file system that holds `path`."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    roots = [m for m in mounts if path.resolve().is_relative_to(m[1])]
    best = max(roots, key=lambda m: len(m[1]))
    return f"{best[2]} ({best[3]})"


def describe(work: Path) -> dict[str, str]:
    """Return the machine in words, without its name or any path."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    model = first("/proc/cpuinfo", "model name") or platform.processor()
    hypervisor = " (virtual machine)" if "hypervisor" in first("/proc/cpuinfo", "flags") else ""
    return {
        "CPU": model + hypervisor,
        "cores": str(os.cpu_count()),
        "RAM": f"{memory:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "file system": filesystem(work),
        "Python": sys.version.split()[0],
        "load at start (1, 5, 15 min)": " ".join(f"{x:.2f}" for x in os.getloadavg()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
    }


def require_free(path: Path, needed: int) -> None:
    """Stop unless `needed` bytes are free where `path` is."""
    free = shutil.disk_usage(path).free
    if free < needed:
        sys.exit(f"{path}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def files(roots: Iterable[Path]) -> list[Path]:
    """Return every file under the roots."""
    return [f for root in roots for f in sorted(root.rglob("*")) if f.is_file()]


def warm(roots: Iterable[Path]) -> None:
    """Read every file, so that the page cache holds it."""
    buffer = bytearray(READ_BYTES)
    for path in files(roots):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def evict(roots: Iterable[Path]) -> None:
    """Ask the kernel to forget these files; needs no privilege."""
    for path in files(roots):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def can_drop() -> bool:
    """Tell whether the whole page cache can be dropped."""
    return os.access(DROP, os.W_OK)


def cool(roots: Iterable[Path], *, everything: bool) -> None:
    """Empty the page cache of the files, or of everything: then programs load cold too."""
    settle()
    evict(roots)
    if everything:
        DROP.write_text("3\n")


def settle() -> None:
    """Write back what is dirty and let the disk finish discarding what was deleted."""
    subprocess.run(["sync"], check=True)
    time.sleep(SETTLE_SECONDS)
