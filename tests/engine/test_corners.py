"""Systems that lack a call, disks that fail to read, plans that contradict themselves."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))
import tiny

import surgery.publish
from growth.stack import stack
from surgery import slices
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError, StepError
from surgery.plan import Plan, Step, TensorSpec, check_plan
from surgery.provenance import model_card, read_record
from surgery.run import run
from surgery.slices import Sources


@pytest.fixture
def reference(base: Path, tmp_path: Path) -> dict[str, str]:
    run(tiny.stacked(base), tmp_path / "reference")
    return tiny.tree(tmp_path / "reference")


def no_such_call(*_: object, **__: object) -> None:
    raise AttributeError("not on this system")


def refuses(code: int):
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("fault", [no_such_call, refuses(errno.EOPNOTSUPP)])
def test_a_system_that_cannot_preallocate_still_writes(
    base: Path, reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fault)
    run(tiny.stacked(base), tmp_path / "out")
    assert tiny.tree(tmp_path / "out") == reference


def test_a_system_without_advice_still_reads(
    base: Path, reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fadvise", no_such_call)
    run(tiny.stacked(base), tmp_path / "out")
    assert tiny.tree(tmp_path / "out") == reference


@pytest.mark.parametrize("fault", [None, errno.EAGAIN, errno.EOPNOTSUPP])
def test_only_what_may_not_be_in_memory_is_asked_for_ahead(
    base: Path, monkeypatch: pytest.MonkeyPatch, fault: int | None
) -> None:
    real, asked = os.preadv, []

    def preadv(fd, buffers, offset, flags=0):
        return refuses(fault)() if flags and fault else real(fd, buffers, offset)

    source = open_checkpoint(base)
    tensor = next(iter(source.tensors.values()))
    tensor.file.read_bytes()
    monkeypatch.setattr(slices, "FEW", 1)
    with Sources([source]) as sources:
        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, count, advice: asked.append(count))
        for _ in range(2):
            sources.prefetch(tensor, 0, tensor.nbytes)
            sources.read(tensor, 0, memoryview(bytearray(tensor.nbytes)))
    from_memory = fault is None and slices.NOWAIT
    assert asked == [tensor.nbytes] * (1 if from_memory else 2)


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_file_system_that_refuses_direct_writes_is_written_through_its_cache(
    base: Path, reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from surgery import disk

    real_open, real_pwrite, direct = os.open, os.pwrite, set()

    def open_(path, flags, *mode):
        if disk.DIRECT and flags & disk.DIRECT:
            if call == "open":
                raise OSError(errno.EINVAL, "Invalid argument")
            direct.add(fd := real_open(path, flags, *mode))
            return fd
        return real_open(path, flags, *mode)

    def pwrite(fd, data, offset):
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_pwrite(fd, data, offset)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "pwrite", pwrite)
    run(tiny.stacked(base), tmp_path / "out")
    assert tiny.tree(tmp_path / "out") == reference


def test_without_an_exchange_the_old_model_is_moved_aside_and_removed(
    base: Path, reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(stack(open_checkpoint(base), factor=3), tmp_path / "out")
    monkeypatch.setattr(surgery.publish, "exchange", refuses(errno.ENOSYS))
    run(tiny.stacked(base), tmp_path / "out", force=True)
    assert tiny.tree(tmp_path / "out") == reference
    assert not (tmp_path / "out.surgery-partial").exists()


def test_a_replacement_that_died_between_its_two_renames_is_undone(
    base: Path, tmp_path: Path
) -> None:
    run(tiny.stacked(base), tmp_path / "out")
    before = tiny.tree(tmp_path / "out")
    (tmp_path / "out.surgery-partial").mkdir()
    (tmp_path / "out").rename(tmp_path / "out.surgery-partial" / "old")
    with pytest.raises(PlanError, match="exists already"):
        run(tiny.stacked(base), tmp_path / "out")
    assert tiny.tree(tmp_path / "out") == before


def test_a_disk_that_fails_to_read_is_told_with_the_tensor(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tiny.stacked(base)
    monkeypatch.setattr(os, "preadv", refuses(errno.EIO))
    with pytest.raises(StepError, match=r"reading 'model\..*failed \(Input/output error\)"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_that_ends_early_is_told_with_the_tensor(base: Path) -> None:
    source = open_checkpoint(base)
    tensor = next(iter(source.tensors.values()))
    with Sources([source]) as sources, pytest.raises(StepError, match="ends inside"):
        sources.read(tensor, 1 << 30, memoryview(bytearray(10)))


def test_a_file_that_is_gone_at_the_start_is_told(base: Path, tmp_path: Path) -> None:
    plan = tiny.stacked(base)
    (base / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(StepError, match="cannot be opened"):
        run(plan, tmp_path / "out")


def step(*outputs: str, **fields) -> Step:
    return Step(outputs=tuple((name, TensorSpec("F16", (2,))) for name in outputs), **fields)


@pytest.mark.parametrize(
    ("steps", "order", "told"),
    [
        ((step("a"), step("a")), ("a",), "two steps"),
        ((step("a"),), ("a", "b"), "does not name each output once"),
        ((step("a"),), ("a", "a"), "does not name each output once"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(steps, order, told: str) -> None:
    plan = Plan(
        operation="broken", parameters={}, sources=(), steps=steps, order=order, config=None
    )
    with pytest.raises(PlanError, match=told):
        check_plan(plan)


@pytest.mark.parametrize("elementwise", [False, True])
def test_a_step_whose_output_has_another_size_is_refused(base: Path, elementwise: bool) -> None:
    plan = tiny.stacked(base)
    first = plan.steps[0]
    fn = (lambda x: x) if elementwise else None
    wrong = tuple((name, TensorSpec("F16", (1,))) for name, _ in first.outputs)
    broken = replace(first, outputs=wrong, fn=fn, elementwise=elementwise)
    with pytest.raises(PlanError, match="another size than its source"):
        check_plan(replace(plan, steps=(broken, *plan.steps[1:])))


def test_a_copy_of_two_inputs_is_refused(base: Path) -> None:
    plan = tiny.stacked(base)
    broken = replace(plan.steps[0], inputs=plan.steps[0].inputs * 2)
    with pytest.raises(PlanError, match="a copy has one input"):
        check_plan(replace(plan, steps=(broken, *plan.steps[1:])))


def test_float64_stays_float64(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    save_file({"model.layers.0.o_proj.weight": values, "model.layers.0.down_proj.weight": values},
              tmp_path / "base.safetensors")  # fmt: skip
    plan = stack(open_checkpoint(tmp_path / "base.safetensors"), factor=2, scale=["1:0.1"])
    run(plan, tmp_path / "out.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "out.safetensors", "np") as opened:
        np.testing.assert_array_equal(
            opened.get_tensor("model.layers.1.o_proj.weight"), values * 0.1
        )


def test_a_whole_step_that_returns_another_shape_is_told(base: Path, tmp_path: Path) -> None:
    source = open_checkpoint(base)
    steps = tuple(
        Step(
            inputs=(t,),
            outputs=((t.name, TensorSpec(t.dtype, t.shape)),),
            fn=lambda x: x.reshape(-1)[:1],
        )
        for t in source.tensors.values()
    )
    plan = Plan(
        operation="test",
        parameters={},
        sources=(source,),
        steps=steps,
        order=tuple(source.tensors),
        config={},
    )
    with pytest.raises(StepError, match=r"came out as \(1,\), planned was"):
        run(plan, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "told"), [('{"surgery": 99}', "record of format 99"), ("[]", "not a JSON object")]
)
def test_a_record_that_cannot_be_used_is_told(base: Path, text: str, told: str) -> None:
    (base / "surgery.json").write_text(text)
    with pytest.raises(CheckpointError, match=told):
        read_record(open_checkpoint(base))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_record_in_a_header_is_told(tmp_path: Path, text: str) -> None:
    save_file({"w": np.zeros(2)}, tmp_path / "x.safetensors", metadata={"surgery": text})
    with pytest.raises(CheckpointError, match="broken record in its header"):
        read_record(open_checkpoint(tmp_path / "x.safetensors"))


def test_a_card_cannot_be_driven_by_names(base: Path) -> None:
    plan = replace(
        tiny.stacked(base), parameters={"x": "```\n<script>"}, notes=("<b>*bold* [x](y)</b>",)
    )
    hub = replace(plan.sources[0], ref='org/na"me@main', revision="0" * 40)
    card = model_card(replace(plan, sources=(hub,)))
    assert "````json" in card
    assert "<b>" not in card
    assert "\\*bold\\* \\[x\\](y)" in card
    assert json.dumps('org/na"me') in card.split("---")[1]


def test_a_replacement_that_died_before_clearing_up_is_cleared_up(
    base: Path, reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(stack(open_checkpoint(base), factor=3), tmp_path / "out")
    (tmp_path / "out.surgery-partial" / "old").mkdir(parents=True)
    (tmp_path / "out.surgery-partial" / "old" / "config.json").write_text("{}")
    monkeypatch.setattr(surgery.publish, "exchange", refuses(errno.ENOSYS))
    run(tiny.stacked(base), tmp_path / "out", force=True)
    assert tiny.tree(tmp_path / "out") == reference
