"""Stores of task masks: as the papers say, exact, refused where they do not fit, small."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from laws.bench import spacing
from merges.multitask import build_store, read_store, restore_task
from merges.multitask.store import factors
from multitask.models import SHAPES, TASKS, Bench
from reference import emr, tall
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError, RecipeError, ResultError, StepError
from surgery.run import run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RULES = [("emr", {}), ("emr", {"rescaler": "tensors"}), ("tall", {})]


def prints(tensors):
    return {n: zlib.crc32(t.contiguous().reshape(-1).view(torch.uint8).numpy()) for n, t in
            tensors.items()}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "rule"), RULES)
def test_a_restored_task_is_the_papers_in_float64_rounded_once(tmp_path, kind, rule, dtype):
    bench = Bench(tmp_path, DTYPES[dtype])
    bench.build(kind, **rule)
    slack = 2**-45 if dtype == "fp32" else 2**-21
    for task, wanted in zip(TASKS, bench.expected(kind, **rule), strict=True):
        found = bench.restore(task)
        assert found.keys() == wanted.keys()
        for name in SHAPES:
            assert found[name].dtype == DTYPES[dtype]
            allowed = 0.5001 * spacing(wanted[name], DTYPES[dtype]) + slack * 5
            assert bool(((found[name].double() - wanted[name]).abs() <= allowed).all()), name


@pytest.mark.parametrize("kind", ["emr", "tall"])
def test_masks_are_the_papers_eight_a_byte(tmp_path, kind):
    bench = Bench(tmp_path, torch.float32)
    stored = load_file(bench.build(kind) / "model.safetensors")
    for name, shape in SHAPES.items():
        vectors = [model[name].double() - bench.base[name].double() for model in bench.models]
        wanted = emr.masks(vectors) if kind == "emr" else tall.masks(vectors, (0.2, 0.4, 0.6))
        bits = np.stack([mask.numpy().reshape(-1) for mask in wanted], axis=1)
        rows = -(-bits.shape[0] // 8)
        assert stored[f"masks.{name}"].shape == (rows, 3), shape
        found = np.unpackbits(stored[f"masks.{name}"].numpy(), axis=0, bitorder="little")
        assert np.array_equal(found[: len(bits)].astype(bool), bits), name
        assert not found[len(bits) :].any()


def test_every_weight_that_emr_shares_is_one_of_the_models(tmp_path):
    bench = Bench(tmp_path)
    stored = load_file(bench.build() / "model.safetensors")
    for name in SHAPES:
        every = torch.stack([bench.base[name], *(model[name] for model in bench.models)])
        assert bool((stored[f"shared.{name}"] == every).any(0).all()), name


@pytest.mark.parametrize("kind", ["emr", "tall"])
def test_threads_do_not_show(tmp_path, kind):
    bench = Bench(tmp_path)
    one = prints(
        load_file(bench.build(kind, out="one", limits={"workers": 1}) / "model.safetensors")
    )
    for workers in (2, 4):
        out = bench.build(kind, out=f"of {workers}", limits={"workers": workers})
        assert prints(load_file(out / "model.safetensors")) == one
    assert prints(bench.restore("second", store="one", workers=1)) == prints(
        bench.restore("second", store="of 4", workers=4)
    )


@pytest.mark.parametrize("kind", ["emr", "tall"])
def test_models_that_are_the_base_come_back_as_it_is(tmp_path, kind):
    bench = Bench(tmp_path)
    bench.base["model.row.weight"][0, :9] = -0.0
    bench.models = [bench.base] * 3
    bench.save()
    bench.build(kind)
    assert prints(bench.restore("first")) == prints(bench.base)


def test_equal_models_come_back_as_they_are(tmp_path):
    bench = Bench(tmp_path)
    bench.models = [bench.models[0]] * 3
    bench.save()
    store = open_checkpoint(bench.build())
    assert factors(read_store(store)) == [1.0] * 3
    assert prints(bench.restore("third")) == prints(bench.models[0])


@pytest.mark.parametrize("kind", ["emr", "tall"])
def test_the_base_may_lie_in_another_dtype(tmp_path, kind):
    bench = Bench(tmp_path)
    bench.build(kind)
    wanted = prints(bench.restore("first"))
    save_file({n: t.float() for n, t in bench.base.items()}, tmp_path / "wide.safetensors")
    assert prints(bench.restore("first", base="wide")) == wanted


@pytest.mark.parametrize("kind", ["emr", "tall"])
@pytest.mark.parametrize("at", [0, -1])
def test_another_base_is_refused_and_nothing_is_left(tmp_path, kind, at):
    bench = Bench(tmp_path)
    bench.build(kind)
    other = {n: t.clone() for n, t in bench.base.items()}
    other["model.layers.0.mlp.weight"].view(-1)[at] *= 1.01
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ResultError, match=r"mlp\.weight: is not what it was in the base"):
        bench.restore("first", base="other")
    assert not (tmp_path / "first-restored.safetensors").exists()
    assert not list(tmp_path.glob("*partial*"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop("model.scale"), "model.scale: has no such tensor"),
        (lambda t: t.update({"model.scale": torch.zeros(2)}), r"model.scale: has it as \[2\]"),
    ],
)
def test_a_base_of_other_shape_is_refused_before_anything_is_read(tmp_path, change, told):
    bench = Bench(tmp_path)
    bench.build()
    other = dict(bench.base)
    change(other)
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=told):
        restore_task(bench.open("other"), open_checkpoint(tmp_path / "store"), task="first")


def sums_of(bench, name, task, how):
    """What a tensor adds to the two sums of a task's rescaler."""
    vectors = [model[name].double() - bench.base[name].double() for model in bench.models]
    shared = emr.unified(vectors)
    size = max(shared.numel(), 1) if how == "tensors" else 1
    kept = (vectors[task] * shared > 0) * shared
    return float(vectors[task].abs().sum()) / size, float(kept.abs().sum()) / size


def test_the_paper_s_rescaler_and_the_code_s_differ_and_are_named(tmp_path):
    bench = Bench(tmp_path)
    found = {
        how: factors(read_store(open_checkpoint(bench.build(rescaler=how, out=how))))
        for how in ("elements", "tensors")
    }
    for how, got in found.items():
        sums = np.array([[sums_of(bench, name, task, how) for name in SHAPES] for task in range(3)])
        own, kept = sums.sum(axis=1).T
        assert got == pytest.approx(list(own / kept), rel=1e-6)
    assert found["elements"] != pytest.approx(found["tensors"], rel=1e-4)


def test_whole_numbers_are_kept_where_equal_and_refused_where_not(tmp_path):
    bench = Bench(tmp_path)
    for n, held in enumerate((bench.base, *bench.models)):
        held["model.ids"] = torch.tensor([1, 2, 3 if n < 9 else 4])
    bench.save()
    bench.build()
    assert bench.restore("first")["model.ids"].tolist() == [1, 2, 3]
    bench.models[1]["model.ids"] = torch.tensor([1, 2, 4])
    bench.save()
    with pytest.raises(StepError, match="whole numbers that differ"):
        bench.build(out="other")


def test_a_store_is_small_and_its_steps_hold_little(tmp_path):
    header = {"w": {"dtype": "BF16", "shape": [1 << 15, 1 << 14], "data_offsets": [0, 1 << 30]}}
    text = json.dumps(header).encode()
    for name in ("base", "one", "two"):
        with (tmp_path / f"{name}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + (1 << 30))
    opened = [open_checkpoint(tmp_path / f"{n}.safetensors") for n in ("base", "one", "two")]
    plan = build_store(*opened, kind="emr")
    assert plan.bytes_out == (1 << 30) + 2 * (1 << 26)
    assert max(step.whole_bytes for step in plan.steps) < 16 << 20
    assert "2 models of 2147.48 MB in all are 1207.96 MB, 134.22 MB of it masks" in plan.notes[-1]


@pytest.mark.parametrize(
    ("models", "rule", "told"),
    [
        (("first",), {"kind": "emr"}, "needs two or more models"),
        (("first", "second"), {"kind": "emr", "tasks": ["a", "a"]}, "name of its own"),
        (("first", "second"), {"kind": "emr", "tasks": ["a"]}, "has the names a for 2 models"),
        (("first", "second"), {"kind": "tall", "bounds": [0.4]}, "has 1 values for 2 models"),
        (("first", "second"), {"kind": "tall", "bounds": [0.4, -1]}, "-1 is below 0"),
        (("first", "second"), {"kind": "tall", "bounds": [0.4, float("nan")]}, "not a number"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, models, rule, told):
    bench = Bench(tmp_path)
    with pytest.raises(RecipeError, match=told):
        build_store(bench.open("base"), *(bench.open(name) for name in models), **rule)


def test_models_of_another_shape_are_refused(tmp_path):
    bench = Bench(tmp_path)
    bench.models[2]["model.scale"] = torch.zeros(2, dtype=torch.bfloat16)
    bench.save()
    with pytest.raises(PlanError, match=r"model\.scale"):
        bench.build()


def test_an_unknown_task_is_refused_with_the_nearest(tmp_path):
    bench = Bench(tmp_path)
    bench.build()
    with pytest.raises(RecipeError, match=r"holds no task 'secnd'; did you mean second\?"):
        bench.restore("secnd")
    with pytest.raises(RecipeError, match="there are first, second, third"):
        bench.restore("x")


def damaged(bench: Bench, **changes) -> None:
    path = bench.folder / "store" / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"surgery_store": "absent"}, "is no store of task masks"),
        ({"surgery_store": 2}, "is a store of format 2, this version reads 1"),
        ({"tasks": "absent"}, "has a broken config"),
        ({"tensors": ["a"]}, "has a broken config"),
        ({"copied": [3]}, "has a broken config"),
        ({"kind": "other"}, "has a broken config"),
        ({"tensors": {"w": "w"}}, "lacks the tensor 'shared.w'"),
        ({"copied": ["w"]}, "lacks the tensor 'w'"),
    ],
)
def test_a_damaged_store_is_refused(tmp_path, changes, told):
    bench = Bench(tmp_path)
    bench.build()
    damaged(bench, **changes)
    with pytest.raises(CheckpointError, match=told):
        bench.restore("first")


def test_a_store_without_its_record_is_refused(tmp_path):
    bench = Bench(tmp_path)
    record = bench.build() / "surgery.json"
    record.unlink()
    with pytest.raises(CheckpointError, match=r"no record of the sums.*restore surgery\.json"):
        bench.restore("first")


def test_a_model_that_is_not_finite_stops_the_run(tmp_path):
    bench = Bench(tmp_path)
    bench.models[1]["model.layers.0.norm.weight"][3] = float("nan")
    bench.save()
    with pytest.raises(ResultError, match="NaN or infinity"):
        bench.build()
    assert not (tmp_path / "store").exists()


def test_two_models_of_one_name_get_numbers(tmp_path):
    bench = Bench(tmp_path)
    (tmp_path / "more").mkdir()
    save_file(bench.models[1], tmp_path / "more" / "first.safetensors")
    more = open_checkpoint(tmp_path / "more" / "first.safetensors")
    plan = build_store(bench.open("base"), bench.open("first"), more, kind="emr")
    run(plan, tmp_path / "store")
    assert read_store(open_checkpoint(tmp_path / "store")).tasks == ("first", "first-2")
