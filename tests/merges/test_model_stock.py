"""Model stock's ratio: told, clamped, and kept from exploding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.apply import apply, resolve
from surgery.checkpoint import open_checkpoint
from surgery.method import Place, find_method
from surgery.passes import merge_step
from surgery.plan import Plan, TensorSpec
from surgery.run import run

METHOD = find_method("model_stock")
SHAPE = (40, 30)


def some(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def at_angle(cosine):
    """Two changes of length 1 with that cosine."""
    a, b = (v / v.norm() for v in some(2))
    b = b - (a * b).sum() * a
    b = b / b.norm()
    return a, cosine * a + (1 - cosine**2) ** 0.5 * b


@pytest.mark.parametrize("cosine", [0.9, 0.3, -0.5, -0.999])
@pytest.mark.parametrize("clamp_t", [False, True])
def test_two_models_give_the_ratio_of_the_paper(cosine, clamp_t):
    (base,) = some(1, seed=1)
    models = [base + change for change in at_angle(cosine)]
    t = 2 * cosine / (1 + cosine)
    if clamp_t:
        t = min(max(t, 0.0), 1.0)
    expected = t * sum(models) / 2 + (1 - t) * base
    assert torch.allclose(apply(METHOD, models, base=base, clamp_t=clamp_t), expected)


def test_opposed_models_give_the_base():
    base, change = some(2)
    assert torch.equal(apply(METHOD, [base + change, base - change], base=base), base)


def test_averages_of_cosines_and_of_angles_differ_from_three_models_on():
    base, a, b, c = some(4)
    models = [base + a, base + a + 0.1 * b, base + c]
    both = [apply(METHOD, models, base=base, average=word) for word in ("cosine", "angle")]
    assert not torch.allclose(*both)
    both = [apply(METHOD, models[:2], base=base, average=word) for word in ("cosine", "angle")]
    assert torch.allclose(*both)


@pytest.mark.parametrize("filter_wise", [False, True])
def test_the_record_tells_the_ratio_that_was_used(tmp_path: Path, filter_wise):
    base, *changes = some(4)
    held = [base, *(base + 0.1 * base.sign() + 0.2 * change for change in changes)]
    for n, tensor in enumerate(held):
        save_file({"w": tensor}, tmp_path / f"{n}.safetensors")
    sources = tuple(open_checkpoint(tmp_path / f"{n}.safetensors") for n in range(4))
    step = merge_step(
        METHOD,
        name="w",
        spec=TensorSpec("F64", SHAPE),
        base=sources[0].tensors["w"],
        models=[source.tensors["w"] for source in sources[1:]],
        values=resolve(METHOD, {"filter_wise": filter_wise}, 3),
        place=Place(name="w"),
    )
    plan = Plan(
        operation="merge", parameters={}, sources=sources, steps=(step,), order=("w",), config=None
    )
    told = run(plan, tmp_path / "out.safetensors").record["told"]["w"]
    merged = load_file(tmp_path / "out.safetensors")["w"]
    average = sum(held[1:]) / 3
    used = ((merged - base) / (average - base)).median(dim=1).values
    if filter_wise:
        wanted = {"t": used.mean(), "t_min": used.min(), "t_max": used.max()}
    else:
        wanted = {"t": used.mean()}
    assert told == {name: pytest.approx(float(value)) for name, value in wanted.items()}
