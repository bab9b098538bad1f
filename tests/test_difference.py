"""The figures of a comparison: those of naive float64, exact where they can be."""

from __future__ import annotations

import json
import os

import pytest
import torch

from cli.main import main
from pairs import FIGURES, assert_close, differ, layered, naive, parent_and_child, write
from surgery import comparing, measure
from surgery.checkpoint import open_checkpoint
from surgery.comparing import WORKER_BYTES
from surgery.errors import PlanError, StepError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def pair(tmp_path, a, b, **options):
    """The comparison of two single tensors."""
    one, two = (
        write(tmp_path / "a.safetensors", {"t": a}),
        write(tmp_path / "b.safetensors", {"t": b}),
    )
    (found,) = differ(one, two, **options).tensors
    return found


def noisy(count, dtype, *, seed=0, scale=0.1):
    """Two tensors that share some elements, some signs and some zeros."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(count, generator=rng)
    b = a + scale * torch.randn(count, generator=rng)
    b[::7] = a[::7]
    a[::11] = 0
    b[::13] = 0
    return a.to(dtype), b.to(dtype)


@pytest.fixture
def small_pieces(monkeypatch):
    """Slices of 512 bytes and parts of 32 elements, so that small tensors have many."""
    monkeypatch.setattr(comparing, "CHUNK", 512)
    monkeypatch.setattr(measure, "PART", 32)


@pytest.mark.parametrize("b_dtype", DTYPES)
@pytest.mark.parametrize("a_dtype", DTYPES)
def test_figures_are_those_of_naive_float64(a_dtype, b_dtype, tmp_path, small_pieces):
    a, b = noisy(1000, torch.float64)
    a, b = a.to(DTYPES[a_dtype]), b.to(DTYPES[b_dtype])
    found = pair(tmp_path, a, b)
    assert (found.state, found.dtype_a, found.dtype_b) == ("compared", a_dtype, b_dtype)
    assert_close(found.figures, naive(a, b))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 127, 128, 129, 255, 256, 257])
def test_figures_do_not_depend_on_where_slices_end(count, tmp_path, small_pieces):
    a, b = noisy(count, torch.float32, seed=count)
    a[0], b[0] = 1.0, 0.5
    assert_close(pair(tmp_path, a, b).figures, naive(a, b))


def test_slices_and_parts_of_the_real_size_agree_with_naive_float64(tmp_path):
    a, b = noisy((comparing.CHUNK // 4) + measure.PART + 5, torch.float32)
    assert_close(pair(tmp_path, a, b).figures, naive(a, b))


def test_a_matrix_is_one_long_vector(tmp_path):
    a, b = noisy(600, torch.float32)
    found = pair(tmp_path, a.view(20, 30), b.view(20, 30))
    assert found.shape == (20, 30)
    assert_close(found.figures, naive(a, b))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_identical_tensors_have_exact_figures(dtype, tmp_path, small_pieces):
    a, _ = noisy(1000, dtype)
    found = pair(tmp_path, a, a.clone())
    assert found.state == "identical"
    assert [getattr(found.figures, name) for name in FIGURES] == [0, 1, 1, 1, 0, 1]


def test_equal_values_in_another_dtype_have_exact_figures(tmp_path, small_pieces):
    a, _ = noisy(1000, torch.bfloat16)
    found = pair(tmp_path, a, a.float())
    assert found.state == "compared"
    assert [getattr(found.figures, name) for name in FIGURES] == [0, 1, 1, 1, 0, 1]


def test_minus_zero_equals_zero_though_the_bytes_differ(tmp_path):
    found = pair(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found.state == "compared"
    assert (found.figures.relative_l2, found.figures.sign_agreement) == (0, 1)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.0, 0.0], [1.0, 0.0], {"relative_l2": None, "cosine": None, "norm_ratio": None}),
        ([1.0, 0.0], [0.0, 0.0], {"relative_l2": 1.0, "cosine": None, "norm_ratio": 0.0}),
        ([3.0, 4.0], [-3.0, -4.0], {"relative_l2": 2.0, "cosine": -1.0, "norm_ratio": 1.0}),
        ([3.0, 4.0], [6.0, 8.0], {"relative_l2": 1.0, "cosine": 1.0, "norm_ratio": 2.0}),
    ],
    ids=["from zero", "to zero", "negated", "doubled"],
)
def test_figures_without_a_value_are_none(a, b, expected, tmp_path):
    found = pair(tmp_path, torch.tensor(a), torch.tensor(b)).figures
    assert {name: getattr(found, name) for name in expected} == expected


UNMEASURED = {
    "integers": (torch.tensor([1, 2]), torch.tensor([1, 3]), "I64 is compared by bytes only"),
    "flags": (torch.tensor([True]), torch.tensor([False]), "BOOL is compared by bytes only"),
    "8-bit floats": (
        torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        torch.tensor([1.0, 3.0]).to(torch.float8_e4m3fn),
        "F8_E4M3 is compared by bytes only",
    ),
    "integers and floats": (
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([1.0, 2.0]),
        "I32 and F32 are not compared",
    ),
    "NaN": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), "NaN, infinity"),
    "infinity": (torch.tensor([float("inf"), 2.0]), torch.tensor([1.0, 2.0]), "NaN, infinity"),
    "float64 too large to square": (
        torch.tensor([1e200], dtype=torch.float64),
        torch.tensor([2e200], dtype=torch.float64),
        "too large to square",
    ),
}


@pytest.mark.parametrize(("a", "b", "note"), UNMEASURED.values(), ids=UNMEASURED)
def test_what_cannot_be_measured_is_told_to_differ(a, b, note, tmp_path):
    found = pair(tmp_path, a, b)
    assert (found.state, found.figures) == ("differs", None)
    assert note in found.note


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1, 2]),
        torch.tensor([float("nan")]),
        torch.zeros(3, dtype=torch.float8_e5m2),
        torch.zeros(0),
        torch.zeros(2, 2),
    ],
    ids=["integers", "NaN", "8-bit floats", "empty", "zeros"],
)
def test_the_same_bytes_are_identical_whatever_they_mean(tensor, tmp_path):
    found = pair(tmp_path, tensor, tensor.clone())
    assert found.state == "identical"
    assert (found.figures.relative_l2, found.figures.cosine) == (0, 1)


@pytest.fixture
def models(tmp_path):
    return parent_and_child(tmp_path)


def joined(made, words):
    return torch.cat([t.flatten() for name, t in made.items() if words in name])


def test_a_layer_is_compared_as_one_vector(models):
    found = differ(*models)
    assert list(found.layers) == [0, 1, 2]
    expected = naive(joined(layered(), "layers.1."), joined(layered(noise=0.1), "layers.1."))
    assert_close(found.layers[1].figures, expected)
    assert found.layers[0].figures.relative_l2 == 0
    assert (found.layers[0].identical, found.layers[1].identical) == (3, 0)


def test_identical_tensors_weigh_in_the_figures_of_the_whole(models):
    a, b = layered(), layered(noise=0.1)
    assert_close(differ(*models).total.figures, naive(joined(a, ""), joined(b, "")))


def test_experts_of_all_numbers_are_one_module(models):
    found = differ(*models)
    assert found.modules == ("self_attn.q_proj", "mlp.experts.*.up")
    expected = naive(joined(layered(), "layers.1.mlp"), joined(layered(noise=0.1), "layers.1.mlp"))
    assert_close(found.cells[1, "mlp.experts.*.up"].figures, expected)


def test_the_most_changed_come_first(tmp_path):
    a = layered()
    b = {name: t + i * 0.01 for i, (name, t) in enumerate(sorted(a.items()))}
    one, two = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    changes = [t.figures.relative_l2 for t in differ(one, two).most_changed(5)]
    assert len(changes) == 5
    assert changes == sorted(changes, reverse=True)


def test_what_only_one_side_has_is_listed(tmp_path):
    a, b = layered(), layered(layers=4)
    b["model.norm.weight"] = torch.ones(5)
    del b["model.embed_tokens.weight"]
    one, two = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    found = differ(one, two)
    assert found.only_in_a == ("model.embed_tokens.weight",)
    assert len(found.only_in_b) == 3
    assert all(".3." in name for name in found.only_in_b)
    (mismatch,) = found.mismatched
    assert (mismatch.shape_a, mismatch.shape_b) == ((4,), (5,))
    assert not found.is_identical


def test_without_layers_tensors_are_compared_all_the_same(tmp_path):
    found = pair(tmp_path, torch.ones(3), torch.zeros(3))
    assert (found.layer, found.module, found.figures.relative_l2) == (None, None, 1)


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, small_pieces):
    a = write(tmp_path / "a.safetensors", layered(dtype=torch.bfloat16))
    b = write(tmp_path / "b.safetensors", layered(noise=0.3, dtype=torch.float16))
    results = {json.dumps(differ(a, b, workers=n).as_dict()) for n in (1, 2, 3, 8)}
    assert len(results) == 1


def test_memory_bounds_the_workers(models, monkeypatch):
    taken = []
    real = comparing.ThreadPoolExecutor
    monkeypatch.setattr(comparing, "ThreadPoolExecutor", lambda n: taken.append(n) or real(n))
    differ(*models, workers=8, memory=2 * WORKER_BYTES + 1)
    assert taken == [2]


def test_too_little_memory_is_refused(models):
    with pytest.raises(PlanError, match="less than one thread needs"):
        differ(*models, memory=WORKER_BYTES - 1)


def test_progress_ends_within_the_bytes_of_both(models, monkeypatch):
    monkeypatch.setattr(comparing, "TICK", 0.0)
    seen = []
    differ(*models, progress=lambda done, total: seen.append((done, total)))
    total = sum(open_checkpoint(path).nbytes for path in models)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_file_that_changes_meanwhile_is_noticed(models, monkeypatch):
    monkeypatch.setattr(comparing, "TICK", 0.0)
    with pytest.raises(StepError, match="changed while it was read"):
        differ(*models, progress=lambda *_: os.utime(models[1], ns=(1, 1)))


def test_an_interrupt_ends_the_comparison(models, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "TICK", 0.0)
    with pytest.raises(KeyboardInterrupt):
        differ(*models, progress=stop)


def test_a_finetuned_model_is_nearer_to_its_parent_than_a_stranger(structure, fixtures_dir):
    places = [fixtures_dir / name for name in ("base", "v2")]
    if not all((place / "model.safetensors").exists() for place in places):
        pytest.skip("the trained models are not here")
    found = differ(*places).total.figures
    stranger = differ(structure("llama"), structure("mistral")).total.figures
    assert found.relative_l2 < 0.5 < stranger.relative_l2
    assert found.cosine > 0.9 > stranger.cosine


def test_an_expanded_model_keeps_every_tensor_of_its_base(fixtures_dir, tmp_path):
    base, grown = fixtures_dir / "base", tmp_path / "grown"
    if not (base / "model.safetensors").exists():
        pytest.skip("the trained models are not here")
    assert main(["stack", str(base), "--factor", "2", "-o", str(grown)]) == 0
    found = differ(base, grown)
    outside = [t for t in found.tensors if t.layer is None]
    assert outside
    assert {t.state for t in outside} == {"identical"}
    assert found.only_in_a == ()
    assert len(found.only_in_b) == 4 * 9
