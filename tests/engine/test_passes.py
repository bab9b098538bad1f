"""Steps of several passes, of views, of many inputs: cut as they like, the bytes are the same."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import slices
from surgery.checkpoint import make_view, open_checkpoint, rows_of
from surgery.digest import LEAF, Leaves, checksums
from surgery.errors import PlanError, ResultError, StepError
from surgery.plan import Pass, Plan, Step, TensorSpec
from surgery.run import dry_digests, run

SHAPES = {"a": (700, 300), "b": (300_001,), "c": (2, 3, 50), "d": ()}


@pytest.fixture
def source(tmp_path):
    torch.manual_seed(0)
    held = {name: torch.randn(shape).bfloat16() for name, shape in SHAPES.items()}
    save_file(held, tmp_path / "in.safetensors")
    return open_checkpoint(tmp_path / "in.safetensors")


def plan(source, steps):
    return Plan(
        operation="test",
        parameters={},
        sources=(source,),
        steps=tuple(steps),
        order=tuple(SHAPES),
        config=None,
    )


def spec(shape):
    return TensorSpec("BF16", shape)


def normalised(tensor):
    def passes():
        found = yield Pass(fn=lambda part, x: float(x.double().square().sum()))
        length = sum(found) ** 0.5
        return lambda part, x: x / length

    return Step(
        outputs=((tensor.name, spec(tensor.shape)),), inputs=(tensor,), fn=passes, passes=True
    )


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_a_statistic_of_the_tensor_reaches_every_slice(tmp_path, source, workers):
    steps = [normalised(tensor) for tensor in source.tensors.values()]
    run(plan(source, steps), tmp_path / "out.safetensors", workers=workers)
    held, made = load_file(source.files[0]), load_file(tmp_path / "out.safetensors")
    for name, tensor in held.items():
        wanted = tensor.double() / tensor.double().norm()
        assert torch.allclose(made[name].double(), wanted, rtol=2**-8), name


def grouped(tensor):
    def passes():
        share, place = yield Pass(
            fn=lambda part, x: part.count,
            group="count",
            combine=lambda lists: [sum(one) for one in lists],
        )
        assert share[place] == tensor.numel
        return lambda part, x: x * 0 + (share[place] - sum(share)) / 1024

    return Step(
        outputs=((tensor.name, spec(tensor.shape)),),
        inputs=(tensor,),
        fn=passes,
        passes=True,
        groups=("count",),
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_a_statistic_of_the_model_reaches_every_tensor(tmp_path, source, workers):
    steps = [grouped(tensor) for tensor in source.tensors.values()]
    run(plan(source, steps), tmp_path / "out.safetensors", workers=workers)
    total = sum(tensor.numel for tensor in source.tensors.values())
    for name, made in load_file(tmp_path / "out.safetensors").items():
        wanted = torch.tensor((source.tensors[name].numel - total) / 1024).bfloat16()
        assert bool((made == wanted).all()), name


def rows_seen(tensor, seen):
    def passes():
        yield Pass(fn=lambda part, x: seen.append(tuple(x.shape)))
        return lambda part, x: x

    step = Step(
        outputs=((tensor.name, spec(tensor.shape)),), inputs=(tensor,), fn=passes, passes=True,
        rows=True,
    )  # fmt: skip
    assert slices.grid(step).item % slices.grid(step).part == 0
    return step


def test_slices_of_rows_are_whole_rows(tmp_path, source):
    seen = []
    steps = [rows_seen(tensor, seen) for tensor in source.tensors.values()]
    run(plan(source, steps), tmp_path / "out.safetensors", workers=1)
    assert {shape[1] for shape in seen} == {300, 300_001, 150, 1}
    assert sum(rows * width for rows, width in seen) == sum(
        tensor.numel for tensor in source.tensors.values()
    )
    assert (
        source.files[0].read_bytes()[-10:] == Path(tmp_path / "out.safetensors").read_bytes()[-10:]
    )


def flipped(tensor):
    rows = rows_of(tensor)

    def make(read, start, count):
        return read(tensor, rows - start - count, count).flip(0)

    return make_view(
        tensor.name, dtype="BF16", shape=tensor.shape, stored=[tensor], make=make, why="flipped"
    )


def upside_down(tensor):
    """Rows run along all axes but the last; a vector's along its only one."""
    rows = tensor.reshape(-1, *tensor.shape[-1:]) if tensor.dim() > 1 else tensor.reshape(-1)
    return rows.flip(0).reshape(tensor.shape)


@pytest.mark.parametrize("computed", [False, True], ids=["copied", "computed"])
def test_a_view_is_read_row_by_row(tmp_path, source, computed):
    steps = []
    for name, tensor in source.tensors.items():
        given = flipped(tensor) if tensor.shape else tensor
        step = normalised(given) if computed else Step(
            outputs=((name, spec(tensor.shape)),), inputs=(given,)
        )  # fmt: skip
        steps.append(step)
    run(plan(source, steps), tmp_path / "out.safetensors")
    held, made = load_file(source.files[0]), load_file(tmp_path / "out.safetensors")
    for name, tensor in held.items():
        wanted = upside_down(tensor)
        scale = wanted.double().norm() if computed else 1.0
        assert torch.allclose(made[name].double(), wanted.double() / scale, rtol=2**-8), name


def test_what_a_view_reads_is_identified_in_the_record(tmp_path, source):
    steps = [Step(outputs=((n, spec(t.shape)),), inputs=(flipped(t) if t.shape else t,))
             for n, t in source.tensors.items()]  # fmt: skip
    record = run(plan(source, steps), tmp_path / "out.safetensors").record
    assert record["inputs"][0]["files"]["in.safetensors"]["tensors_read"] == len(SHAPES)
    held = load_file(source.files[0])
    held["a"][0, 0] += 1
    save_file(held, source.files[0])
    again = open_checkpoint(source.files[0])
    steps = [Step(outputs=((n, spec(t.shape)),), inputs=(flipped(t) if t.shape else t,))
             for n, t in again.tensors.items()]  # fmt: skip
    other = run(plan(again, steps), tmp_path / "other.safetensors").record
    assert other["inputs"][0]["files"] != record["inputs"][0]["files"]


class TestChecksums:
    def test_pieces_do_not_matter(self):
        data = np.random.default_rng(0).bytes(3 * LEAF + 12345)
        whole = checksums(memoryview(data))
        fed = Leaves(checksums)
        for start in range(0, len(data), 100_003):
            fed.feed(memoryview(data)[start : start + 100_003])
        assert fed.end() == whole

    @pytest.mark.parametrize("changes", [1, 2, 7])
    def test_flipped_sign_bits_show(self, changes):
        generator = np.random.default_rng(changes)
        data = bytearray(generator.bytes(LEAF))
        before = checksums(memoryview(data))
        for word in generator.choice(LEAF // 8, changes, replace=False):
            data[8 * word + 7] ^= 0x80
        assert checksums(memoryview(data)) != before

    def test_length_and_tail_show(self):
        data = bytes(20)
        told = {checksums(memoryview(data)[:n])[0] for n in range(1, 21)}
        assert len(told) == 20


SCRIPT = """
import resource, sys
from surgery.checkpoint import open_checkpoint
from surgery.method import Place, find_method
from surgery.passes import merge_step
from surgery.plan import Plan, TensorSpec
from surgery.run import run
count = int(sys.argv[2])
sources = [open_checkpoint(sys.argv[1]) for _ in range(count)]
tensor = sources[0].tensors["w"]
step = merge_step(find_method("linear"), name="w", spec=TensorSpec("BF16", tensor.shape),
    base=None, models=[s.tensors["w"] for s in sources],
    values={"weight": (1.0,) * count, "normalize": True}, place=Place(name="w"))
plan = Plan(operation="merge", parameters={}, sources=tuple(sources), steps=(step,),
    order=("w",), config=None)
run(plan, sys.argv[3], workers=2)
assert "torch" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_an_average_of_many_models_takes_no_more_memory_than_one_of_few(tmp_path):
    save_file({"w": torch.randn(2000, 1000).bfloat16()}, tmp_path / "w.safetensors")
    peaks = []
    for count in (8, 100):
        words = [
            str(tmp_path / "w.safetensors"),
            str(count),
            str(tmp_path / f"{count}.safetensors"),
        ]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True, timeout=120,
            check=True,
        )  # fmt: skip
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + (24 << 10)


WITHOUT_TORCH = """
import pathlib, sys
from surgery.checkpoint import open_checkpoint
from surgery.method import Place, find_method
from surgery.passes import merge_step
from surgery.plan import Plan, TensorSpec
from surgery.apply import resolve
from surgery.run import run
file, out, method, count = *sys.argv[1:3], find_method(sys.argv[3]), int(sys.argv[4])
base, *models = sources = [open_checkpoint(file) for _ in range(count + 1)]
tensor = base.tensors["b"]
step = merge_step(method, name="b", spec=TensorSpec("BF16", tensor.shape), base=tensor,
    models=[m.tensors["b"] for m in models], place=Place(name="b"),
    values=resolve(method, {"t": 0.3} if count == 1 else {}, count))
plan = Plan(operation="merge", parameters={}, sources=tuple(sources), steps=(step,),
    order=("b",), config=None, dropped=dict.fromkeys("acd", "not wanted"))
run(plan, out)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(("method", "models"), [("slerp", 1), ("model_stock", 2)])
def test_passes_of_operators_and_dot_products_leave_torch_out(tmp_path, source, method, models):
    words = [str(source.files[0]), str(tmp_path / "out.safetensors"), method, str(models)]
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], timeout=120, check=True)


def test_a_sample_has_the_same_elements_for_arrays_as_for_tensors(tmp_path, source):
    seen = {}

    def step(plain):
        def passes():
            (seen[plain],) = yield Pass(fn=lambda part, x: x.tolist(), sample=True)
            return lambda part, x: x * 1.0

        return one_step(source, passes, passes=True, plain=plain)

    for plain in (True, False):
        run(step(plain), tmp_path / f"{plain}.safetensors")
    assert len(seen[True]) == slices.SAMPLE * slices.BLOCK
    assert seen[True] == seen[False]


@pytest.mark.parametrize("plain", [True, False])
def test_inputs_of_two_widths_come_as_floats_of_one(tmp_path, source, plain):
    held = {name: torch.randn(shape).double() for name, shape in SHAPES.items()}
    save_file(held, tmp_path / "wide.safetensors")
    wide = open_checkpoint(tmp_path / "wide.safetensors")
    seen = set()

    def fn(a, b):
        seen.add((str(a.dtype)[-7:], str(b.dtype)[-7:]))
        return a + b

    steps = [
        Step(
            outputs=((name, spec(shape)),),
            inputs=(source.tensors[name], wide.tensors[name]),
            fn=fn,
            elementwise=True,
            plain=plain,
        )
        for name, shape in SHAPES.items()
    ]
    both = Plan(
        operation="test",
        parameters={},
        sources=(source, wide),
        steps=tuple(steps),
        order=tuple(SHAPES),
        config=None,
    )
    run(both, tmp_path / "out.safetensors")
    assert seen == {("float64", "float64")}


def one_step(source, fn, **kind):
    """A plan of one step over the first tensor."""
    tensor = source.tensors["a"]
    return Plan(
        operation="test",
        parameters={},
        sources=(source,),
        steps=(Step(outputs=(("a", spec(tensor.shape)),), inputs=(tensor,), fn=fn, **kind),),
        order=("a",),
        config=None,
        dropped=dict.fromkeys("bcd", "not wanted"),
    )


@pytest.mark.parametrize("plain", [True, False])
def test_one_element_is_not_spread_over_a_slice(tmp_path, source, plain):
    spread = one_step(source, lambda x: x[:1], elementwise=True, plain=plain)
    with pytest.raises(ResultError, match="a: came out with 1 elements, planned were"):
        run(spread, tmp_path / "out.safetensors")


def test_what_is_not_finite_is_told_once_and_not_by_numpy_too(tmp_path, source):
    alone = one_step(source, lambda x: (x - x) / (x - x), elementwise=True, plain=True)
    with pytest.raises(ResultError, match="NaN or infinity"):
        run(alone, tmp_path / "out.safetensors")


def test_digests_alone_are_refused_where_a_tensor_exceeds_the_budget(source):
    alone = one_step(source, lambda x: x)
    with pytest.raises(PlanError, match="allow it with --memory"):
        dry_digests(alone, memory=1 << 20)


def failing(tensor, phase):
    def passes():
        if phase == "open":
            raise ValueError("no sense")
        yield Pass(fn=lambda part, x: 1 / (0 if phase == "pass" else 1))
        return lambda part, x: x.no_such_thing if phase == "map" else x

    return Step(
        outputs=((tensor.name, spec(tensor.shape)),), inputs=(tensor,), fn=passes, passes=True,
        why="odd",
    )  # fmt: skip


@pytest.mark.parametrize("phase", ["open", "pass", "map"])
def test_a_method_that_fails_is_told_with_its_tensor(tmp_path, source, phase):
    steps = [failing(tensor, phase) for tensor in source.tensors.values()]
    with pytest.raises(StepError, match=r"^[abcd]: odd failed \("):
        run(plan(source, steps), tmp_path / "out.safetensors", workers=2)
    assert not (tmp_path / "out.safetensors").exists()
