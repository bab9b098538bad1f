"""Small models of one base as files, what a store of them gives back, and what it should."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from merges.multitask import build_store, restore_task
from reference import emr, tall
from surgery.checkpoint import open_checkpoint
from surgery.run import run

# More than a block whose rows divide none, a cube, vectors off a byte, a scalar, nothing.
SHAPES = {
    "model.layers.0.mlp.weight": (300, 257),
    "model.layers.0.experts.weight": (3, 20, 13),
    "model.layers.0.norm.weight": (129,),
    "model.row.weight": (1, 70_000),
    "model.scale": (),
    "model.empty": (0, 5),
}
TASKS = ("first", "second", "third")


def tensors(seed: int, dtype: torch.dtype, like: dict | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator)
        found[name] = (like[name].float() + 0.02 * noise if like else noise).to(dtype)
    return found


class Bench:
    """A base and three models near it, as bare files in a folder."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder = folder
        self.base = tensors(0, dtype)
        self.models = [tensors(n + 1, dtype, self.base) for n in range(len(TASKS))]
        self.save()

    def save(self) -> None:
        for name, held in zip(("base", *TASKS), (self.base, *self.models), strict=True):
            save_file(held, self.folder / f"{name}.safetensors")

    def open(self, name: str):
        return open_checkpoint(self.folder / f"{name}.safetensors")

    def build(self, kind: str = "emr", *, out: str = "store", limits: dict | None = None, **rule):
        """Write the store and return where it is."""
        if kind == "tall":
            rule.setdefault("bounds", (0.2, 0.4, 0.6))
        models = [self.open(name) for name in TASKS]
        run(build_store(self.open("base"), *models, kind=kind, **rule), self.folder / out,
            **(limits or {}))  # fmt: skip
        return self.folder / out

    def restore(self, task: str, *, store: str = "store", base: str = "base", **limits):
        """Return a task's tensors."""
        place = self.folder / f"{task}-restored.safetensors"
        plan = restore_task(self.open(base), open_checkpoint(self.folder / store), task=task)
        run(plan, place, force=True, **limits)
        return load_file(place)

    def expected(self, kind: str, **rule) -> list[dict[str, torch.Tensor]]:
        """What the paper's formulas give, in float64."""
        base = {n: t.double() for n, t in self.base.items()}
        models = [{n: t.double() for n, t in model.items()} for model in self.models]
        if kind == "emr":
            return emr.reference_model(base, models, **rule)
        dtype = self.base["model.scale"].dtype
        rule.setdefault("bounds", (0.2, 0.4, 0.6))
        return tall.reference_model(base, models, vector_dtype=dtype, **rule)
