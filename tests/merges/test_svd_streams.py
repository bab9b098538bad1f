"""How matrices are read and written by the methods on singular values, and what that holds."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merges.iso_c import iso_c
from merges.iso_cts import iso_cts
from merges.knots_ties import knots_ties
from merges.stages import matrices
from merges.svc import svc
from merges.tsv_m import tsv_m
from merges.wudi import wudi
from surgery.apply import apply, resolve
from surgery.checkpoint import TensorInfo, make_view, open_checkpoint, read_rows
from surgery.errors import RecipeError, ResultError
from surgery.method import Place
from surgery.passes import merge_step
from surgery.plan import Plan, TensorSpec
from surgery.run import run

FAMILY = [iso_c, iso_cts, knots_ties, svc, tsv_m, wudi]
NAMES = [method.name for method in FAMILY]
LIMIT = 1 << 30  # the default memory of a run


def given(shape, *, models=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    found = [base + 0.02 * torch.randn(shape, generator=generator) for _ in range(models)]
    return base.to(dtype), [model.to(dtype) for model in found]


def run_one(method, folder, base, models, *, view=False, out="F32", **params):
    for name, held in (("base", base), *enumerate(models)):
        save_file({"w": held}, folder / f"{name}.safetensors")
    opened = [open_checkpoint(folder / f"{n}.safetensors") for n in ("base", *range(len(models)))]
    tensors = [checkpoint.tensors["w"] for checkpoint in opened]
    step = merge_step(
        method,
        name="w",
        spec=TensorSpec(out, tuple(base.shape)),
        base=copied(tensors[0]) if view else tensors[0],
        models=[copied(t) for t in tensors[1:]] if view else tensors[1:],
        values=resolve(method, params, len(models)),
        place=Place(name="w"),
    )
    plan = Plan(
        operation="merge",
        parameters={},
        sources=tuple(opened),
        steps=(step,),
        order=("w",),
        config=None,
    )
    run(plan, folder / "out.safetensors", force=True)
    return load_file(folder / "out.safetensors")["w"]


def copied(tensor):
    """A view that gives a tensor as it is."""
    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        stored=(tensor,),
        make=lambda read, start, count: read_rows(read, tensor, start, count).float(),
        why="copied",
    )


@pytest.mark.parametrize("method", FAMILY, ids=NAMES)
@pytest.mark.parametrize("shape", [(90, 16), (16, 90), (30, 30)])
def test_blocks_do_not_show(tmp_path, monkeypatch, method, shape):
    base, models = given(shape)
    whole = apply(method, models, base=base)
    monkeypatch.setattr(matrices, "BLOCK", 100)
    blocks = apply(method, models, base=base)
    assert torch.allclose(blocks, whole, rtol=0, atol=2e-7)
    stored = run_one(method, tmp_path, base, models)
    assert torch.allclose(stored, whole, rtol=0, atol=2e-7)
    assert torch.equal(run_one(method, tmp_path, base, models, view=True), stored)


@pytest.mark.parametrize("method", FAMILY, ids=NAMES)
def test_experts_are_merged_one_by_one(tmp_path, method):
    base, models = given((4, 20, 12))
    whole = run_one(method, tmp_path, base, models)
    for n in range(4):
        alone = run_one(method, tmp_path, base[n].clone(), [m[n].clone() for m in models])
        assert torch.equal(whole[n], alone)


@pytest.mark.parametrize("method", FAMILY, ids=NAMES)
@pytest.mark.parametrize("shape", [(), (7,), (40, 1, 4), (6, 3, 5, 5)])
def test_what_is_no_matrix_goes_by_its_own_rule(tmp_path, monkeypatch, method, shape):
    monkeypatch.setattr(matrices, "BLOCK", 30)
    base, models = given(shape)
    deltas = [model.double() - base.double() for model in models]
    shares = {"mean": 1 / 3, "sum": 1.0, "base": 0.0}
    for rule, share in shares.items():
        found = run_one(method, tmp_path, base, models, others=rule, **{"lambda": 0.5})
        assert torch.allclose(found.double(), base + 0.5 * share * sum(deltas), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", FAMILY, ids=NAMES)
def test_embeddings_are_matrices_only_where_asked(method):
    base, models = given((60, 12))
    deltas = [model - base for model in models]
    mean = apply(method, models, base=base, vocabulary=True, **{"lambda": 1.0})
    wanted = base + sum(deltas) / (1 if method is svc else 3)
    assert torch.allclose(mean, wanted, rtol=0, atol=1e-6)
    svd = apply(method, models, base=base, vocabulary=True, embeddings="svd")
    assert torch.equal(svd, apply(method, models, base=base))


@pytest.mark.parametrize("method", FAMILY, ids=NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_what_is_not_finite_is_named(tmp_path, method, bad, shape):
    base, models = given(shape)
    models[1][3, 5] = bad
    with pytest.raises(ResultError, match="w: the result holds NaN or infinity"):
        run_one(method, tmp_path, base, models)


@pytest.mark.parametrize("method", [tsv_m, knots_ties], ids=["tsv_m", "knots_ties"])
def test_a_sketch_of_what_is_not_finite_is_named(tmp_path, method):
    base, models = given((60, 50))
    models[1][3, 5] = float("nan")
    params = {"svd": "randomized"} if method is tsv_m else {"rank": 4}
    with pytest.raises(ResultError, match="w: the result holds NaN or infinity"):
        run_one(method, tmp_path, base, models, **params)


@pytest.mark.parametrize("method", FAMILY, ids=NAMES)
def test_a_slope_over_layers_needs_a_start(method):
    with pytest.raises(RecipeError, match="lines_beta: needs lines_alpha beside it"):
        resolve(method, {"lines_beta": 0.5}, 2)


def planned(method, shape, *, models=2, **params):
    info = TensorInfo("w", "BF16", shape, None, 0, 2 * shape[0] * shape[1])
    step = merge_step(
        method,
        name="w",
        spec=TensorSpec("BF16", shape),
        base=info,
        models=[info] * models,
        values=resolve(method, params, models),
        place=Place(name="w"),
    )
    return step.whole_bytes


@pytest.mark.parametrize(
    "method", [iso_c, iso_cts, svc, tsv_m], ids=["iso_c", "iso_cts", "svc", "tsv_m"]
)
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (11008, 4096)])
def test_a_layer_of_a_7b_model_fits_the_default_memory(method, shape):
    assert planned(method, shape) <= LIMIT


def test_what_fits_the_default_memory_of_the_rest():
    assert planned(wudi, (11008, 4096)) <= LIMIT
    assert planned(knots_ties, (4096, 11008)) <= LIMIT
    assert planned(knots_ties, (11008, 4096), rank=64) <= LIMIT
    assert planned(wudi, (4096, 11008)) > LIMIT  # the rows of both models, 8192


def test_a_vocabulary_that_is_averaged_holds_blocks_only():
    info = TensorInfo("w", "BF16", (152064, 4096), None, 0, 0)
    step = merge_step(
        tsv_m,
        name="w",
        spec=TensorSpec("BF16", info.shape),
        base=info,
        models=[info] * 2,
        values=resolve(tsv_m, {}, 2),
        place=Place(name="w", vocabulary=True),
    )
    assert step.whole_bytes < 100 << 20


def low(shape, rank, *, models=3):
    generator = torch.Generator().manual_seed(1)

    def some(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    base = some(*shape)
    return base, [base + 0.01 * some(shape[0], rank) @ some(rank, shape[1]) for _ in range(models)]


@pytest.mark.parametrize("shape", [(90, 48), (48, 90)])
def test_a_sketch_finds_low_ranks_exactly(shape):
    base, models = low(shape, 3)
    exact = apply(tsv_m, models, base=base)
    sketched = apply(tsv_m, models, base=base, svd="randomized")
    assert torch.allclose(sketched, exact, rtol=0, atol=1e-9)
    aligned = apply(knots_ties, models, base=base)
    capped = apply(knots_ties, models, base=base, rank=9)
    assert torch.allclose(capped, aligned, rtol=0, atol=1e-9)


def test_a_sketch_is_drawn_by_seed_and_name():
    base, models = given((200, 160))

    def made(**told):
        return apply(tsv_m, models, base=base, svd="randomized", **told)

    assert torch.equal(made(), made())
    assert not torch.equal(made(), made(seed=1))
    assert not torch.equal(made(), made(name="other"))


def test_a_sketch_is_near_where_singular_values_fall(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 200, generator=generator, dtype=torch.float64)
    fall = 0.9 ** torch.arange(200).double()
    models = []
    for _ in range(4):
        u = torch.linalg.qr(torch.randn(300, 200, generator=generator, dtype=torch.float64)).Q
        v = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
        models.append(base + u @ torch.diag(fall) @ v.T)
    exact = apply(tsv_m, models, base=base)
    sketched = apply(tsv_m, models, base=base, svd="randomized")
    assert float((sketched - exact).norm()) < 1e-3 * float((exact - base).norm())
