"""What a run promises: the same bytes whatever the threads, nothing touched that is not its own."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from growth.prune import prune
from growth.stack import stack
from surgery.checkpoint import open_checkpoint, read_header
from surgery.errors import CheckpointError, Interrupted, PlanError, StepError
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.run import dry_digests, run

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "surgery"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "base")


def stacked(base: Path) -> Plan:
    return stack(open_checkpoint(base), factor=2)


def sparse(path: Path, layers: int, megabytes: int) -> Path:
    """A bare file of `layers` zero tensors that takes no disk."""
    size = megabytes << 20
    header = {
        f"model.layers.{i}.w": {
            "dtype": "F16",
            "shape": [size // 2],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(layers)
    }
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + layers * size)
    return path


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("shard_size", [20_000, 1 << 40])
def test_bytes_do_not_depend_on_threads(
    base: Path, tmp_path: Path, workers: int, shard_size: int
) -> None:
    run(stacked(base), tmp_path / "one", workers=1, shard_size=shard_size)
    run(stacked(base), tmp_path / "many", workers=workers, shard_size=shard_size)
    assert tiny.tree(tmp_path / "one") == tiny.tree(tmp_path / "many")


def test_bytes_do_not_depend_on_the_hash_seed(base: Path, tmp_path: Path) -> None:
    for seed in ("0", "3"):
        words = ["stack", str(base), "--factor", "2", "-o", str(tmp_path / seed)]
        subprocess.run(
            [*COMMAND, *words], env={**ENVIRONMENT, "PYTHONHASHSEED": seed}, check=True, timeout=60
        )
    assert tiny.tree(tmp_path / "0") == tiny.tree(tmp_path / "3")


def test_inputs_are_not_touched(base: Path, tmp_path: Path) -> None:
    before = tiny.tree(base)
    run(stacked(base), tmp_path / "out")
    assert tiny.tree(base) == before


def test_output_has_the_umasks_mode_aligned_data_and_a_right_index(
    base: Path, tmp_path: Path
) -> None:
    old = os.umask(0o027)
    try:
        run(stacked(base), tmp_path / "out", shard_size=20_000)
    finally:
        os.umask(old)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o640 for p in (tmp_path / "out").iterdir())
    for file in files:
        header = read_header(file)
        assert header.data_start % 4096 == 0
        assert header.metadata["format"] == "pt"
        with safe_open(file, "np") as opened:
            assert all(index["weight_map"][name] == file.name for name in opened.keys())  # noqa: SIM118
    specs = stacked(base).outputs.values()
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in specs)
    assert index["metadata"]["total_parameters"] == sum(spec.numel for spec in specs)


def test_shards_fill_in_layer_order(base: Path, tmp_path: Path) -> None:
    run(stacked(base), tmp_path / "out", shard_size=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = {}
    for name, file in index["weight_map"].items():
        if ".layers." in name:
            shards.setdefault(int(name.split(".")[2]), []).append(file)
    lasts = [max(shards[layer]) for layer in sorted(shards)]
    assert lasts == sorted(lasts)


def test_a_bare_file_gives_a_bare_file_with_its_record_inside(base: Path, tmp_path: Path) -> None:
    source = base / "model-00001-of-00002.safetensors"
    plan = stack(open_checkpoint(source), factor=2)
    report = run(plan, tmp_path / "out.safetensors")
    record = json.loads(read_header(tmp_path / "out.safetensors").metadata["surgery"])
    assert record == json.loads(json.dumps(report.record))
    assert record["outputs"] == dict(dry_digests(plan)["outputs"])
    assert "0" * 64 not in record["outputs"].values()


def kill_midway(base: Path, out: Path) -> None:
    """Kill a run at two thirds of its calls: shards are there, some steps finished."""
    import test_faults

    at = test_faults.count_calls(base, out.with_name("counted")) * 2 // 3
    code = test_faults.in_child(
        lambda: test_faults.make(base, out, fault=test_faults.Fault("kill", at))
    )
    assert code == -9


def journal(out: Path) -> list[dict]:
    text = (out.parent / f"{out.name}.surgery-partial" / "journal").read_text()
    return [json.loads(line) for line in text.splitlines() if line][1:]


def test_a_resume_redoes_no_finished_step(base: Path, tmp_path: Path) -> None:
    kill_midway(base, tmp_path / "out")
    finished = journal(tmp_path / "out")
    assert 2 <= len(finished) < len(stacked(base).steps)
    report = run(stacked(base), tmp_path / "out", shard_size=20_000)
    assert report.reused == len(finished)
    run(stacked(base), tmp_path / "reference", shard_size=20_000)
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "reference")


def test_a_finished_step_whose_bytes_were_lost_is_done_again(base: Path, tmp_path: Path) -> None:
    kill_midway(base, tmp_path / "out")
    finished = journal(tmp_path / "out")
    name = next(iter(finished[0]["outputs"]))
    shards = sorted((tmp_path / "out.surgery-partial" / "out").glob("*.safetensors"))
    place = next(t for shard in shards for t in read_header(shard).tensors if t.name == name)
    with place.file.open("r+b") as file:
        file.seek(place.offset)
        byte = file.read(1)
        file.seek(place.offset)
        file.write(bytes([byte[0] ^ 1]))
    report = run(stacked(base), tmp_path / "out", shard_size=20_000)
    assert report.reused == len(finished) - 1
    run(stacked(base), tmp_path / "reference", shard_size=20_000)
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "reference")


def test_another_commands_unfinished_output_is_kept_unless_fresh(
    base: Path, tmp_path: Path
) -> None:
    kill_midway(base, tmp_path / "out")
    other = prune(open_checkpoint(base), layers="0")
    with pytest.raises(PlanError, match=r"unfinished output of another command.*--fresh"):
        run(other, tmp_path / "out")
    assert journal(tmp_path / "out")
    run(other, tmp_path / "out", fresh=True)
    assert not (tmp_path / "out.surgery-partial").exists()


def test_an_existing_output_is_refused_and_an_empty_folder_is_not(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    run(stacked(base), tmp_path / "out")
    before = tiny.tree(tmp_path / "out")
    with pytest.raises(PlanError, match=r"exists already.*--force"):
        run(stacked(base), tmp_path / "out")
    assert tiny.tree(tmp_path / "out") == before


def test_force_does_not_replace_what_is_no_model(base: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(PlanError, match="something else than a model"):
        run(stacked(base), tmp_path / "thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_force_on_a_link_replaces_the_link_and_not_what_it_leads_to(
    base: Path, tmp_path: Path
) -> None:
    other = tiny.write(tmp_path / "other", seed=1)
    before = tiny.tree(other)
    (tmp_path / "link").symlink_to(other)
    run(stacked(base), tmp_path / "link", force=True)
    assert not (tmp_path / "link").is_symlink()
    assert tiny.tree(other) == before


def alias(kind: str, base: Path, tmp_path: Path) -> Path:
    if kind == "same":
        return base
    if kind == "inside":
        return base / "out"
    if kind == "around":
        return base.parent
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(base)
    return link if kind == "link" else link / "out"


@pytest.mark.parametrize("kind", ["same", "inside", "around", "link", "inside a link"])
@pytest.mark.parametrize("force", [False, True])
def test_an_output_that_touches_an_input_is_refused(tmp_path: Path, kind: str, force: bool) -> None:
    base = tiny.write(tmp_path / "models" / "base")
    before = tiny.tree(tmp_path / "models")
    with pytest.raises(PlanError, match=r"is the input|inside the input|holds the input"):
        run(stacked(base), alias(kind, base, tmp_path), force=force)
    assert tiny.tree(tmp_path / "models") == before


@pytest.mark.parametrize("link", ["same", "symlink_to", "hardlink_to"])
def test_a_bare_output_that_is_the_input_is_refused(tmp_path: Path, link: str) -> None:
    source = sparse(tmp_path / "base.safetensors", 2, 1)
    out = source
    if link != "same":
        out = tmp_path / "other.safetensors"
        getattr(out, link)(source)
    with pytest.raises(PlanError, match="is the input"):
        run(stack(open_checkpoint(source), factor=2), out, force=True)


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("missing/out", "does not exist"),
        ("out.safetensors", "output of a directory is a directory"),
    ],
)
def test_an_impossible_output_is_refused_in_one_sentence(
    base: Path, tmp_path: Path, out: str, told: str
) -> None:
    with pytest.raises(PlanError, match=told):
        run(stacked(base), tmp_path / out)


def test_a_read_only_file_system_is_told_in_one_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    plan = stacked(base)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PlanError, match=r"cannot be written .Read-only file system"):
        run(plan, tmp_path / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told_in_one_sentence(base: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(PlanError, match="cannot be written"):
        run(stacked(base), tmp_path / "locked" / "out")


def test_too_little_disk_is_told_before_the_first_byte(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(PlanError, match=r"needs .* of disk, but .* are free"):
        run(stacked(base), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_of_two_runs_into_one_output_one_wins(base: Path, tmp_path: Path) -> None:
    import test_faults

    wanted = None
    for number in range(25):
        out = tmp_path / f"out{number}"
        children = [os.fork() for _ in range(1)]
        if children[0] == 0:
            os._exit(test_faults.in_child(lambda out=out: test_faults.make(base, out)))
        mine = test_faults.in_child(lambda out=out: test_faults.make(base, out))
        other = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
        assert sorted((mine, other)) == [0, 1]
        wanted = wanted or tiny.tree(out)
        assert tiny.tree(out) == wanted
    assert not list(tmp_path.glob("*.surgery-partial"))


def test_an_input_that_changes_during_the_run_stops_it(base: Path, tmp_path: Path) -> None:
    plan = stacked(base)
    file = base / "model-00001-of-00002.safetensors"

    def change(*_: int) -> None:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)

    with pytest.raises(StepError, match="changed while it was read"):
        run(plan, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists()


def test_an_input_replaced_after_planning_stops_the_run(base: Path, tmp_path: Path) -> None:
    plan = stacked(base)
    file = base / "model-00001-of-00002.safetensors"
    copy = file.with_suffix(".new")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)
    with pytest.raises(StepError, match="changed while it was read"):
        run(plan, tmp_path / "out")


def test_an_interrupt_keeps_what_is_finished(base: Path, tmp_path: Path) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="run the same command again"):
        run(stacked(base), tmp_path / "out", progress=stop)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.surgery-partial").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_75_in_two_seconds(
    tmp_path: Path, number: signal.Signals
) -> None:
    source = sparse(tmp_path / "base.safetensors", 40, 32)
    out = tmp_path / "out.safetensors"
    words = [*COMMAND, "stack", str(source), "--factor", "2", "-o", str(out), "--workers", "1"]
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        partial = tmp_path / "out.safetensors.surgery-partial" / "journal"
        limit = time.monotonic() + 30
        while not partial.exists() and time.monotonic() < limit:
            time.sleep(0.01)
        process.send_signal(number)
        sent = time.monotonic()
        _, told = process.communicate(timeout=30)
    assert process.returncode == 75, told
    assert time.monotonic() - sent < 5  # two seconds, and room for a loaded machine
    assert "run the same command again" in told
    assert not out.exists()


def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (4, 16):
        source = sparse(tmp_path / f"{layers}.safetensors", layers, 8)
        words = [
            "stack",
            str(source),
            "--factor",
            "1",
            "-o",
            str(tmp_path / f"o{layers}.safetensors"),
        ]
        process = subprocess.Popen([*COMMAND, *words], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss / 1024)
    assert max(peaks) < 64, peaks
    assert abs(peaks[0] - peaks[1]) < 6, peaks


def test_a_truncated_copy_is_found_when_read(base: Path, tmp_path: Path) -> None:
    plan = stacked(base)
    os.truncate(base / "model-00002-of-00002.safetensors", 3000)
    with pytest.raises((StepError, CheckpointError)):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_that_loses_a_tensor_is_refused(base: Path) -> None:
    plan = stacked(base)
    broken = Plan(
        operation="broken",
        parameters={},
        sources=plan.sources,
        steps=plan.steps[1:],
        order=tuple(n for n in plan.order if n not in dict(plan.steps[0].outputs)),
        config=plan.config,
    )
    with pytest.raises(PlanError, match="loses the tensor"):
        check_plan(broken)


def computed(base: Path, fn, *, elementwise: bool, dtype: str = "F16", scratch: int = 0) -> Plan:
    source = open_checkpoint(base)
    steps = tuple(
        Step(
            inputs=(t,),
            outputs=((t.name, TensorSpec(dtype, t.shape)),),
            fn=fn,
            elementwise=elementwise,
            scratch=scratch,
            why="test",
        )
        for t in source.tensors.values()
    )
    return Plan(
        operation="test",
        parameters={},
        sources=(source,),
        steps=steps,
        order=tuple(source.tensors),
        config=dict(source.config or {}),
    )


def third(x):
    return x / 3


@pytest.mark.parametrize("elementwise", [True, False])
@pytest.mark.parametrize("workers", [1, 3])
def test_computed_tensors_are_float64_rounded_once(
    base: Path, tmp_path: Path, elementwise: bool, workers: int
) -> None:
    run(computed(base, third, elementwise=elementwise), tmp_path / "out", workers=workers)
    for name, tensor in tiny.tensors().items():
        with safe_open(tmp_path / "out" / "model.safetensors", "np") as opened:
            wanted = (tensor.astype(np.float64) / 3).astype(np.float16)
            np.testing.assert_array_equal(opened.get_tensor(name), wanted)


def test_a_result_that_is_not_finite_stops_the_run(base: Path, tmp_path: Path) -> None:
    plan = computed(base, lambda x: x * 1e6, elementwise=True)
    with pytest.raises(StepError, match="NaN or infinity"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_tensor_over_the_budget_is_told_before_the_run(base: Path, tmp_path: Path) -> None:
    plan = computed(base, third, elementwise=False, scratch=1 << 31)
    with pytest.raises(PlanError, match=r"holds the whole tensor.*--memory 2"):
        run(plan, tmp_path / "out")
    run(plan, tmp_path / "out", memory=3 << 30)
