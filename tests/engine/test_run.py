"""What a run promises: the same bytes whatever the threads, nothing touched that is not its own."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from growth.stack import stack
from surgery.checkpoint import open_checkpoint, read_header
from surgery.errors import PlanError, StepError
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.run import dry_digests, run

REPO = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "surgery"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("shard_size", [20_000, 1 << 40])
def test_bytes_do_not_depend_on_threads(
    base: Path, tmp_path: Path, workers: int, shard_size: int
) -> None:
    run(tiny.stacked(base), tmp_path / "one", workers=1, shard_size=shard_size)
    run(tiny.stacked(base), tmp_path / "many", workers=workers, shard_size=shard_size)
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
    run(tiny.stacked(base), tmp_path / "out")
    assert tiny.tree(base) == before


def test_output_has_the_umasks_mode_aligned_data_and_a_right_index(
    base: Path, tmp_path: Path
) -> None:
    old = os.umask(0o027)
    try:
        run(tiny.stacked(base), tmp_path / "out", shard_size=20_000)
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
    specs = tiny.stacked(base).outputs.values()
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in specs)
    assert index["metadata"]["total_parameters"] == sum(spec.numel for spec in specs)


def test_shards_fill_in_layer_order(base: Path, tmp_path: Path) -> None:
    run(tiny.stacked(base), tmp_path / "out", shard_size=30_000)
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
    assert {**record, "seal": ""} == {**json.loads(json.dumps(report.record)), "seal": ""}
    assert record["outputs"] == dict(dry_digests(plan)["outputs"])
    assert "0" * 64 not in record["outputs"].values()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own high-water mark")
def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "lines = Path('/proc/self/status').read_text().splitlines()\n"
        "print(next(line.split()[1] for line in lines if line.startswith('VmHWM')))"
    )
    peaks = []
    for layers in (4, 16):
        source = tiny.sparse(tmp_path / f"{layers}.safetensors", layers, 8)
        words = [
            "stack",
            str(source),
            "--factor",
            "1",
            "-o",
            str(tmp_path / f"{layers}o.safetensors"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert max(peaks) < 64, peaks
    assert abs(peaks[0] - peaks[1]) < 6, peaks


def test_a_plan_that_loses_a_tensor_is_refused(base: Path) -> None:
    plan = tiny.stacked(base)
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


def test_threads_are_fewer_where_the_budget_is_small(base: Path, tmp_path: Path) -> None:
    from surgery.preflight import preflight

    plan = computed(base, third, elementwise=True)
    wide = preflight(plan, tmp_path / "out", memory=1 << 30, workers=16).memory
    narrow = preflight(plan, tmp_path / "out", memory=32 << 20, workers=16).memory
    assert narrow <= 32 << 20 < wide
    run(plan, tmp_path / "out", memory=1 << 20, workers=16)
