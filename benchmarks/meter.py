"""Run a command as a whole process and measure time, CPU and memory of its process tree."""

import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.01
FIELDS = ("VmRSS", "VmHWM", "RssAnon", "RssShmem")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one run took; seconds and megabytes (10^6 bytes).

    `wall` ends when every output file is on the disk: `sync`, the part spent in fsync after the
    process has ended, is included. `peak` is the high-water mark of the largest process, `tree` the
    largest sampled sum over all processes, `private` the same without file mappings; the last two
    are None where there is no /proc.
    """

    wall: float
    sync: float
    cpu: float
    user: float
    system: float
    peak: float
    tree: float | None
    private: float | None


@dataclass(slots=True)
class Watch:
    """Largest memory seen so far in a process tree, in bytes."""

    tree: int = 0
    private: int = 0
    highest: int = 0


def status(pid: int) -> dict[str, int]:
    """Return the memory fields of one process in bytes; empty when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key: int(text.split()[0]) * 1024 for key, text in pairs if key in FIELDS}


def descendants(pid: int) -> list[int]:
    """Return the process and everything it started."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(word) for word in children.read_text().split()]
            except OSError:
                continue
    return found


def observe(pid: int, watch: Watch) -> None:
    """Take one sample of the tree under `pid`."""
    processes = [status(one) for one in descendants(pid)]
    watch.tree = max(watch.tree, sum(p.get("VmRSS", 0) for p in processes))
    private = sum(p.get("RssAnon", 0) + p.get("RssShmem", 0) for p in processes)
    watch.private = max(watch.private, private)
    watch.highest = max(watch.highest, *(p.get("VmHWM", 0) for p in processes))


def follow(pid: int, watch: Watch, stop: threading.Event) -> None:
    """Sample until told to stop."""
    while not stop.wait(SAMPLE_SECONDS):
        observe(pid, watch)


def peak_bytes(usage: resource.struct_rusage, watch: Watch) -> int:
    """Return the high-water mark of the largest process that the command started.

    The kernel's figure starts from the memory of the process that forks, which is this one; where
    it is no larger than that, the sampled high-water mark tells.
    """
    kernel = usage.ru_maxrss * 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return kernel if kernel > own or not watch.highest else watch.highest


def make_durable(root: Path) -> None:
    """Flush the data and names of every file under `root` to the disk."""
    paths = [root, *sorted(root.rglob("*"))] if root.is_dir() else [root]
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def wait(process: subprocess.Popen[bytes], limit: float) -> tuple[int, resource.struct_rusage]:
    """Wait for the process, killing it at the limit; return exit code and usage."""
    killer = threading.Timer(limit, process.kill)
    killer.start()
    try:
        _, code, usage = os.wait4(process.pid, 0)
    finally:
        killer.cancel()
    process.returncode = os.waitstatus_to_exitcode(code)
    return process.returncode, usage


def measure(
    command: Sequence[str],
    *,
    log: Path,
    durable: Iterable[Path] = (),
    environment: Mapping[str, str] | None = None,
    limit: float = 1800,
    expected: Sequence[int] = (0,),
) -> Usage:
    """Run `command`, output to `log`, then fsync the `durable` paths, and return what it took.

    Raises:
        RuntimeError: if the exit code is not among the `expected` ones.
    """
    env = {**os.environ, **(environment or {})}
    watch, stop = Watch(), threading.Event()
    with log.open("wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=env)
        sampler = threading.Thread(target=follow, args=(process.pid, watch, stop))
        sampler.start()
        code, usage = wait(process, limit)
        ended = time.perf_counter()
        stop.set()
        sampler.join()
    if code not in expected:
        tail = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(command)}: exit code {code}\n{tail}")
    flush = time.perf_counter()
    for path in durable:
        make_durable(path)
    sync = time.perf_counter() - flush
    return Usage(
        wall=ended - start + sync,
        sync=sync,
        cpu=usage.ru_utime + usage.ru_stime,
        user=usage.ru_utime,
        system=usage.ru_stime,
        peak=peak_bytes(usage, watch) / 1e6,
        tree=watch.tree / 1e6 if watch.tree else None,
        private=watch.private / 1e6 if watch.tree else None,
    )
