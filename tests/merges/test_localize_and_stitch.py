"""Dataless localize-and-stitch at its edges: by hand, ties, and masks over the whole model."""

import math

import pytest
import torch
from safetensors.torch import save_file

from laws.bench import SHAPES, Family
from merges.localize_and_stitch import localize_and_stitch
from surgery.errors import RecipeError

TOTAL = sum(math.prod(shape) for shape in SHAPES.values())
NAMES = ("model.layers.0.mlp.weight", "model.layers.1.norm.weight")


def merged(tmp_path, first, second, **params):
    """Merge two models with a third that is the base, every tensor zero but for what is given."""
    family = Family(tmp_path / "f", localize_and_stitch, torch.float32)
    family.base = {n: torch.zeros_like(t) for n, t in family.base.items()}
    family.models = [{n: t.clone() for n, t in family.base.items()} for _ in range(3)]
    for model, changes in zip(family.models, (first, second), strict=False):
        for name, place, value in changes:
            model[name].view(-1)[place] = value
    for name, held in (("base", family.base), *enumerate(family.models)):
        save_file(held, family.folder / f"{name}.safetensors")
    return family.merged(params)


def test_the_largest_of_the_whole_model_are_kept_and_averaged_where_they_meet(tmp_path):
    wide, norm = NAMES
    found = merged(
        tmp_path,
        [(wide, 3, 5.0), (wide, 9, 1.0), (norm, 0, -4.0)],
        [(wide, 3, 1.0), (norm, 1, 2.0), (norm, 2, 0.5)],
        density=2.5 / TOTAL,
    )
    assert float(found[wide].view(-1)[3]) == 3.0
    assert float(found[wide].view(-1)[9]) == 0.0
    assert found[norm].view(-1)[:3].tolist() == [-4.0, 2.0, 0.0]


def test_of_equal_changes_the_first_in_the_order_of_the_plan_are_kept(tmp_path):
    wide, norm = NAMES
    changes = [(wide, 7, 1.0), (wide, 40, -1.0), (norm, 5, 1.0)]
    found = merged(tmp_path, changes, [], density=2.5 / TOTAL)
    assert (float(found[wide].view(-1)[7]), float(found[wide].view(-1)[40])) == (1.0, -1.0)
    assert float(found[norm].view(-1)[5]) == 0.0


def test_a_model_without_changes_dilutes_nothing(tmp_path):
    found = merged(tmp_path, [(NAMES[0], 7, 1.0)], [], density=1.0)
    assert float(found[NAMES[0]].view(-1)[7]) == 1.0


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_density_has_a_range(tmp_path, density):
    with pytest.raises(RecipeError, match=r"is outside \(0, 1\]"):
        merged(tmp_path, [], [], density=density)
