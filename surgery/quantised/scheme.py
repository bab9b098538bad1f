"""What a config says about quantisation, and the formats that are refused."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError

KEYS = ("quantization_config", "compression_config")
FP8 = ("fp8", "fbgemm_fp8")
MXFP4 = "mxfp4"
COMPRESSED = "compressed-tensors"
# Formats of compressed-tensors; "dense" holds plain weights.
FORMATS = {
    "dense", "naive-quantized", "int-quantized", "float-quantized", "pack-quantized",
    "mixed-precision", "mxfp8-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized",
}  # fmt: skip
# Why other methods are refused.
REASONS = {
    "gptq": "reorders and packs its weights in ways that differ between versions",
    "awq": "packs its weights in an order of its own kernels",
    "bitsandbytes": "keeps codebooks and statistics that only its own kernels apply",
}
TELLTALE = re.compile(
    r"\.(qweight|qzeros|weight_packed|SCB|CB)$|\.(absmax|nested_absmax|quant_map)$"
    r"|\.quant_state\.|_blocks$|\.weight_scale(_inv)?$"
)
PLAIN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
REMEDY = "name the original checkpoint in bfloat16, or dequantise it with the program that made it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a checkpoint is quantised.

    Attributes:
        method: `quant_method` of the config.
        settings: the rest of what the config says.
        config: the config without it.
        dtype: what dequantised weights count as.
    """

    method: str
    settings: Mapping[str, Any]
    config: dict[str, Any]
    dtype: str

    @property
    def block(self) -> tuple[int | None, int | None]:
        """Rows and columns that share a scale, where the config says one size for all."""
        rows, columns = self._block_sizes()
        return _positive(rows), _positive(columns)

    def _block_sizes(self) -> tuple[object, object]:
        told = [self.settings.get("weight_block_size")]
        told += [group.get("block_structure") for group in self.groups]
        pairs = [size for size in told if isinstance(size, list) and len(size) == 2]  # noqa: PLR2004
        if pairs:
            return (pairs[0][0], pairs[0][1]) if pairs.count(pairs[0]) == len(pairs) else (0, 0)
        sizes = {str(group.get("group_size")): group.get("group_size") for group in self.groups}
        return None, next(iter(sizes.values())) if len(sizes) == 1 else None

    @property
    def groups(self) -> tuple[Mapping[str, Any], ...]:
        """What compressed-tensors says of weights, per group of modules."""
        groups = self.settings.get("config_groups")
        found = [g.get("weights") for g in groups.values()] if isinstance(groups, dict) else []
        return tuple(weights for weights in found if isinstance(weights, dict))


def _positive(size: object) -> int | None:
    return size if type(size) is int and size > 0 else None


def find_scheme(checkpoint: Checkpoint) -> Scheme | None:
    """Return how the config says that the checkpoint is quantised; None where it does not.

    Raises:
        CheckpointError: a method or format that is not read.
    """
    config = checkpoint.config or {}
    settings = next(_sections(config), None)
    if settings is None:
        return None
    method = str(settings.get("quant_method") or _older(settings))
    _check_method(checkpoint, method)
    if method == COMPRESSED:
        _check_formats(checkpoint, settings)
    return Scheme(method=method, settings=settings, config=_without(config), dtype=_dtype(config))


def _sections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what is told of quantisation, at the top and in the sections below it."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from (value,) if key in KEYS else _sections(value)


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in KEYS
    }


def _older(settings: Mapping[str, Any]) -> str:
    """Name the method of a config that was written before `quant_method` was."""
    older = {"load_in_4bit", "load_in_8bit"}
    return "bitsandbytes" if older & settings.keys() else "unnamed"


def _check_method(checkpoint: Checkpoint, method: str) -> None:
    if method not in {*FP8, MXFP4, COMPRESSED}:
        why = REASONS.get(method, "is a format that is not read")
        raise CheckpointError(checkpoint.ref, f"is quantised with {method}, which {why}", REMEDY)


def _check_formats(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
    groups = settings.get("config_groups")
    tables = [settings, *(groups.values() if isinstance(groups, dict) else ())]
    told = [str(t["format"]) for t in tables if isinstance(t, dict) and t.get("format")]
    strange = next((name for name in told if name not in FORMATS), None)
    if strange is not None:
        fact = f"is quantised with {COMPRESSED} as {strange}, a format that is not read"
        raise CheckpointError(checkpoint.ref, fact, REMEDY)


def _dtype(config: Mapping[str, Any]) -> str:
    tables = [config, *(value for value in config.values() if isinstance(value, dict))]
    told = [str(t.get(k)).removeprefix("torch.") for t in tables for k in ("dtype", "torch_dtype")]
    return next((PLAIN[name] for name in told if name in PLAIN), "BF16")


def refuse_undeclared(checkpoint: Checkpoint) -> None:
    """Refuse quantised weights of which no config tells.

    Raises:
        CheckpointError: a tensor's dtype or name shows that it is one.
    """
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype.startswith(("F8_", "F6_", "F4")) or TELLTALE.search(name):
            fact = (
                f"holds {name!r} in {tensor.dtype}, but no quantization_config says how to read it"
            )
            remedy = "restore the config of this checkpoint, or name the original in bfloat16"
            raise CheckpointError(checkpoint.ref, fact, remedy)
