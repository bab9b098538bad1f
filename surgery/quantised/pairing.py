"""Find the tensors that make up each quantised weight, by their names and dtypes."""

import re
from collections.abc import Mapping
from dataclasses import replace

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.header import quoted
from surgery.errors import CheckpointError
from surgery.pieces import Recent
from surgery.quantised.compressed import packed
from surgery.quantised.grid import lay
from surgery.quantised.mxfp4 import Blocks
from surgery.quantised.numbers import TORCH_FP8
from surgery.quantised.packed import Quantised
from surgery.quantised.scheme import COMPRESSED, MXFP4, REMEDY, TELLTALE, Scheme

Weight = Quantised | Blocks

# What quantised activations and caches need; of no use to weights.
ACTIVATIONS = re.compile(
    r"\.((input|output|activation|[qkv])_(scale|zero_point|global_scale|scale_ub)|qscale_act)$"
    r"|_activation_scale$"
)
SCALES = ("_scale_inv", "_scale")
OTHER_SCALES = (".scale", ".qscale_weight")  # of DeepSeek-V4 and Mistral, for `.weight`
# The most that one rounding moves a number.
ROUNDING = {"BF16": "0.2 %", "F16": "0.05 %", "F32": "0.00001 %"}


def replace_quantised(checkpoint: Checkpoint, scheme: Scheme) -> Checkpoint:
    """Return the checkpoint with views for what is quantised; see `surgery.quantised`."""
    recent = Recent()
    made: dict[str, Weight] = {}
    for name, tensor in checkpoint.tensors.items():
        weight = _weight(checkpoint, scheme, tensor, recent)
        if weight is not None:
            made[name] = weight
    used = {part.name for weight in made.values() for part in weight.stored}
    left = [name for name in checkpoint.tensors if name in made or name not in used]
    idle = {name for name in left if name not in made and ACTIVATIONS.search(name)}
    tensors: dict[str, TensorInfo] = {}
    for name in left:
        if name not in idle:
            tensor = made[name].view(scheme.dtype) if name in made else checkpoint.tensors[name]
            _check(checkpoint, tensors, tensor, is_made=name in made)
            tensors[tensor.name] = tensor
    notes = (*checkpoint.notes, *_notes(scheme, made, len(idle)))
    return replace(checkpoint, tensors=tensors, config=scheme.config, notes=notes)


def _check(
    checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], tensor: TensorInfo, *, is_made: bool
) -> None:
    if tensor.name in tensors:
        fact = f"holds {quoted(tensor.name)} both quantised and plain"
        raise CheckpointError(checkpoint.ref, fact, "remove the one that does not belong")
    if not is_made and (tensor.dtype.startswith(("F8_", "F6_", "F4")) or _tells(tensor.name)):
        fact = f"holds {quoted(tensor.name)} in {tensor.dtype}, without what it takes to read it"
        raise CheckpointError(checkpoint.ref, fact, f"its scale is missing: {REMEDY}")


def _tells(name: str) -> bool:
    return TELLTALE.search(name) is not None


def _weight(
    checkpoint: Checkpoint, scheme: Scheme, tensor: TensorInfo, recent: Recent
) -> Weight | None:
    """Return the weight that a tensor holds the numbers of, if it does."""
    if scheme.method == MXFP4:
        return _blocks(checkpoint, tensor, recent)
    if scheme.method == COMPRESSED and tensor.name.endswith(".weight_packed"):
        return packed(checkpoint, scheme, tensor)
    return _scaled(checkpoint, scheme, tensor)


def _blocks(checkpoint: Checkpoint, tensor: TensorInfo, recent: Recent) -> Blocks | None:
    name = tensor.name.removesuffix("_blocks")
    scales = checkpoint.tensors.get(f"{name}_scales")
    if name == tensor.name or scales is None:
        return None
    return Blocks(name=name, codes=tensor, scales=scales, recent=recent)


def _scaled(checkpoint: Checkpoint, scheme: Scheme, tensor: TensorInfo) -> Quantised | None:
    """Return a weight of bytes with a scale beside it."""
    code = tensor.dtype if tensor.dtype in TORCH_FP8 else ""
    if tensor.dtype == "I8":
        code = "signed" if scheme.method == COMPRESSED else "fp4"
    scale = _scale(checkpoint, tensor.name) if code else None
    if scale is None or len(tensor.shape) < 2:  # noqa: PLR2004 - a matrix
        return None
    shape = tensor.shape
    if code == "fp4":
        shape = (*shape[:-1], shape[-1] * 2)
    if scheme.method == "fbgemm_fp8" and scale.shape == (shape[0], shape[-1], 1):
        scale = replace(scale, shape=(shape[0], 1, shape[-1]))  # experts stored inputs first
    zero = checkpoint.tensors.get(f"{tensor.name}_zero_point")
    return Quantised(
        name=tensor.name,
        shape=shape,
        codes=tensor,
        code=code,
        scale=lay(scale, shape, scheme.block),
        zero=lay(zero, shape, scheme.block) if zero else None,
    )


def _scale(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    stem = name.removesuffix(".weight")
    names = [name + ending for ending in SCALES]
    names += [stem + ending for ending in OTHER_SCALES] if stem != name else []
    return next((checkpoint.tensors[n] for n in names if n in checkpoint.tensors), None)


def _notes(scheme: Scheme, made: Mapping[str, Weight], idle: int) -> list[str]:
    exact = all(isinstance(weight, Blocks) for weight in made.values())
    loss = (
        "which is exact"
        if exact and scheme.dtype != "F16"
        else f"one rounding moves a number by {ROUNDING[scheme.dtype]} at most"
    )
    told = f"{len(made)} weights are dequantised ({scheme.method}) to {scheme.dtype}"
    notes = [f"{told}, {loss}"]
    if idle:
        notes.append(f"{idle} scales of quantised activations are left out")
    return notes
