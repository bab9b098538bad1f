"""What a command does to the machine, seen by an audit hook in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostile import CANARY, CASES

pytest.importorskip("cli.main")

HERE = Path(__file__).parent
REPO = HERE.parents[1]
SECONDS = 60  # of a busy machine: what is asked is that it ends at all
# Python's own files, this repository, and what the system says about itself.
OWN = [Path(p).resolve() for p in (sys.prefix, sys.base_prefix, REPO, *sys.path) if p]
SYSTEM = [Path(p) for p in ("/proc", "/sys", "/dev/null", "/dev/urandom", "/etc", "/usr")]
NEVER = {"torch", "transformers", "peft"}
NAMED = {case.name: case for case in CASES}
RUNS = [
    ("a FIFO named .safetensors", "inspect"),
    ("a FIFO named .safetensors", "stack"),
    ("shard is a FIFO", "stack"),
    ("config is a FIFO", "inspect"),
    ("tokenizer.json a FIFO", "stack"),
    ("a link to /dev/zero", "inspect"),
    ("pytorch_model.bin that runs a command", "inspect"),
    ("pickle renamed to .safetensors", "stack"),
    ("poisoned pickle as a shard of a safetensors index", "stack"),
    ("tensor placed in /etc/passwd", "stack"),
    ("tensor placed in a sound file of the parent", "stack"),
    ("shard is a link outside", "inspect"),
    ("chat_template.jinja a link outside", "stack"),
    ("code of the checkpoint under every name", "inspect"),
    ("code of the checkpoint under every name", "stack"),
    ("chat template that reaches for os.system", "inspect"),
    ("chat template that reaches for os.system", "stack"),
    ("num_hidden_layers 10^12", "stack"),
    ("config of objects nested 100000 deep", "stack"),
    ("two shards", "stack"),
    ("hub cache, shards", "stack"),
    ("plain header", "stack"),
]


def audited(arguments, folder, cwd):
    """Run a command under the hook; return the finished process and what the hook saw."""
    report = folder / "report.json"
    environment = {**os.environ, "HF_HOME": str(folder / "hub"), "HOME": str(folder)}
    environment.pop("HF_HUB_OFFLINE", None)  # offline must be what the command does by itself
    process = subprocess.run(
        [sys.executable, str(HERE / "audited.py"), str(report), *arguments],
        cwd=cwd,
        env=environment,
        timeout=SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    return process, json.loads(report.read_text())


def below(path, roots):
    return any(path == root or root in path.parents for root in roots)


def opened(seen, cwd):
    """The paths that were opened, links followed; descriptors and unnamed files left out."""
    return {Path(os.path.realpath(cwd / name)) for name in seen["opens"] if name}


@pytest.mark.parametrize(("name", "command"), RUNS, ids=lambda value: value)
def test_a_command_reads_the_model_and_does_nothing_else(name, command, place, tmp_path):
    case = NAMED[name]
    path = case.build(place)
    cwd = path if path.is_dir() else place
    out = tmp_path / "out"
    out.mkdir()
    made = out / ("made.safetensors" if path.is_file() else "made")
    more = ["--factor", "2", "-o", str(made)] if command == "stack" else []

    process, seen = audited([command, str(path), *more], tmp_path, cwd)

    if case.outcome(command) != "clean":
        success = case.outcome(command) == "success"
        assert (process.returncode == 0) == success, process.stderr
    assert process.returncode in {0, 1, 2}, process.stderr
    assert "fault in surgery" not in process.stderr
    assert seen["acts"] == []
    assert not (place / CANARY).exists()
    assert [file for file in seen["code"] if below(Path(file), [place])] == []
    assert NEVER.isdisjoint(seen["modules"])
    model = [path.resolve(), *([path.parents[1] / "blobs"] if "snapshots" in path.parts else [])]
    allowed = [*OWN, *SYSTEM, *model, out, tmp_path / "hub"]
    strangers = {p for p in opened(seen, cwd) if not below(p, allowed)}
    assert strangers - {tmp_path / "report.json", *path.parents} == set()


@pytest.mark.parametrize("ref", ["org/name", "org/name@main", "./missing", "missing"])
def test_a_model_that_is_not_there_is_not_looked_for_on_the_network(ref, place, tmp_path):
    process, seen = audited(["inspect", ref], tmp_path, place)
    assert process.returncode in {1, 2}
    assert ref in process.stderr
    assert len(process.stderr.splitlines()) <= 5
    assert seen["acts"] == []


def watched(act):
    """Run source text under the hook, in a process of its own; return what the hook saw."""
    begin = "import audited, json; seen = {'acts': [], 'opens': [], 'code': [], 'imports': []}"
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}; audited.watch(seen); {act}; print(json.dumps(seen))"],
        cwd=HERE,
        timeout=SECONDS,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


MISDEEDS = {
    "os.system": "import os; os.system('true')",
    "subprocess.Popen": "import subprocess; subprocess.run(['true'])",
    "socket.connect": "import socket; socket.socket().connect_ex(('127.0.0.1', 9))",
    "pickle.find_class": "import pickle; pickle.loads(b'cbuiltins\\nlen\\n.')",
}


@pytest.mark.parametrize("event", MISDEEDS)
def test_the_hook_sees_what_it_forbids(event):
    """Otherwise the tests above could not fail."""
    assert event in {name for name, _ in watched(MISDEEDS[event])["acts"]}


def test_the_hook_sees_files_and_foreign_code(tmp_path):
    stranger = tmp_path / "stranger.py"
    stranger.write_text("x = 1\n")
    seen = watched(f"import runpy; runpy.run_path({str(stranger)!r})")
    assert str(stranger) in seen["opens"]
    assert str(stranger) in seen["code"]
