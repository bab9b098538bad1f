"""Models of a few tensors, merged through the engine by one method; what every law looks at."""

import zlib
from importlib import import_module

import torch
from safetensors.torch import load_file, save_file

from surgery.apply import resolve
from surgery.checkpoint import open_checkpoint
from surgery.method import Place
from surgery.passes import merge_step
from surgery.plan import Plan, TensorSpec
from surgery.run import run

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# One that fits a part, one of several parts whose rows divide none, a vector, a cube, one row.
SHAPES = {
    "model.layers.0.mlp.weight": (33, 48),
    "model.layers.1.mlp.weight": (300, 257),
    "model.layers.1.norm.weight": (129,),
    "model.layers.1.experts.weight": (3, 20, 16),
    "model.row.weight": (1, 40),
}
SEED = 7


def book(name):
    """The reference module of a method."""
    return import_module(f"reference.{name}")


def count(method):
    return method.most or 3


def tensors(dtype, *, seed, like=None, distance=0.02):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in SHAPES.items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        start = like[name].double() + distance * noise if like else noise
        found[name] = start.to(dtype)
    return found


class Family:
    """A base and models near it, as files."""

    def __init__(self, folder, method, dtype, *, same=False):
        self.method, self.dtype, self.folder = method, dtype, folder
        self.base = tensors(dtype, seed=0)
        self.models = [
            self.base if same else tensors(dtype, seed=n + 1, like=self.base)
            for n in range(count(method))
        ]
        folder.mkdir(parents=True, exist_ok=True)
        for name, held in (("base", self.base), *enumerate(self.models)):
            save_file(held, folder / f"{name}.safetensors")

    def place(self, name):
        depth = {"0": 0.0, "1": 1.0}.get(name.split(".")[2][0])
        return Place(name=name, depth=depth, seed=SEED)

    def plan(self, params, *, order=None):
        method = self.method
        base = open_checkpoint(self.folder / "base.safetensors")
        order = order or range(len(self.models))
        models = [open_checkpoint(self.folder / f"{n}.safetensors") for n in order]
        sources = (base, *models) if method.base != "none" else tuple(models)
        values = resolve(method, params, len(models))
        steps = tuple(
            merge_step(
                method,
                name=name,
                spec=TensorSpec(CODES[self.dtype], shape),
                base=base.tensors[name] if method.base != "none" else None,
                models=[model.tensors[name] for model in models],
                values=values,
                place=self.place(name),
            )
            for name, shape in SHAPES.items()
        )
        return Plan(
            operation="merge",
            parameters=params,
            sources=sources,
            steps=steps,
            order=tuple(SHAPES),
            config=None,
        )

    def merged(self, params, *, out="out", order=None, **limits):
        place = self.folder / f"{out}.safetensors"
        run(self.plan(params, order=order), place, force=True, **limits)
        return load_file(place)

    def expected(self, params):
        """What the reference says, in float64, by tensor."""
        module = book(self.method.name)
        base = {name: held.double() for name, held in self.base.items()}
        models = [{n: held.double() for n, held in model.items()} for model in self.models]
        if hasattr(module, "reference_model"):
            places = {name: self.place(name) for name in SHAPES}
            return module.reference_model(base, models, places=places, **params)
        return {name: self._one(module, base, models, name, params) for name in SHAPES}

    def _one(self, module, base, models, name, params):
        extra = {}
        if self.method.is_random:
            extra["bits"] = lambda model, *first: drawn(
                self.method, self.place(name), model, *first
            )
        if self.method.takes_place:
            extra["place"] = self.place(name)
        given = base[name] if self.method.base != "none" else None
        return module.reference(given, [model[name] for model in models], **extra, **params)


def drawn(method, place, model, first=None):
    """The random bits of a whole tensor, [elements], drawn part by part as the engine does.

    Told the first eight bits that do not decide, only where those are drawn 24 more follow.
    """
    import numpy as np

    from surgery.passes import Slices
    from surgery.plan import Part
    from surgery.slices import part_size

    shape = SHAPES[place.name]
    total = int(np.prod(shape))
    row = (total // shape[0] if len(shape) > 1 else total) if method.rows else 1
    size = part_size(row)
    starts = range(0, total, size)
    parts = [Part(n, at, min(size, total - at)) for n, at in enumerate(starts)]
    bits = [_bits(Slices(part, None, [], place), model, first) for part in parts]
    return torch.from_numpy(np.concatenate(bits).astype(np.int64)).view(shape)


def _bits(slices, model, first):
    if first is None:
        return slices.bits(model)
    found = slices.bits(model, kind="uint8").astype("uint32") << 24
    edge = (found >> 24) == first
    found[edge] += slices.bits(model, stream=1, count=edge.sum()) >> 8
    return found


def spacing(values, dtype):
    """The distance of neighbouring numbers of a dtype, around float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().clamp_min(info.tiny)))
    return torch.exp2(exponent) * info.eps


def fingerprint(tensors):
    """A short name for all bytes of some tensors."""
    return [
        zlib.crc32(tensors[n].contiguous().view(torch.uint8).numpy().tobytes())
        for n in sorted(tensors)
    ]
