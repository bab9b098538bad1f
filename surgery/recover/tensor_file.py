"""A safetensors file, written one tensor after the other."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.plan import TensorSpec
from surgery.shards import make_header

if TYPE_CHECKING:
    import torch

CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def code_of(*tensors: "torch.Tensor") -> str:
    """Return the code of the dtype that holds all of them, as a conversion may join them."""
    import torch

    found = tensors[0].dtype
    for tensor in tensors[1:]:
        found = torch.promote_types(found, tensor.dtype)
    return CODES[str(found).removeprefix("torch.")]


def specs_of(tensors: "Mapping[str, torch.Tensor]") -> dict[str, TensorSpec]:
    """Return dtype and shape of tensors by name."""
    return {name: TensorSpec(code_of(t), tuple(t.shape)) for name, t in tensors.items()}


def write_tensors(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: "Iterable[tuple[str, torch.Tensor]]",
) -> None:
    """Write a safetensors file, one tensor after the other, never all in memory.

    Args:
        specs: of all tensors, in the order of the file; what is not given stays zero.
        tensors: in any order, cast to what `specs` says.
    """
    header, places = make_header(specs, {})
    size = len(header) + sum(spec.nbytes for spec in specs.values())
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        file.write(header)
        file.truncate(size)
        for name, tensor in tensors:
            file.seek(places[name])
            _put(file.write, tensor, specs[name])
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _put(write: Callable[[Any], object], tensor: "torch.Tensor", spec: TensorSpec) -> None:
    import torch

    dtype = getattr(torch, next(name for name, code in CODES.items() if code == spec.dtype))
    plain = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    if plain.numel():
        write(plain.view(torch.uint8).numpy().data)
