"""Lay out output shards before any data exists: headers first, every tensor's place known."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.checkpoint import BITS
from surgery.plan import TensorSpec

BLOCK = 4096  # direct IO needs file offsets, lengths and memory on this boundary
SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes go: shard number and absolute offset in that file."""

    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, tensors in the order of their data, header and full size."""

    name: str
    tensors: tuple[str, ...]
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All shards of an output and the place of every tensor."""

    shards: tuple[Shard, ...]
    places: Mapping[str, Place]
    shard_size: int

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    def index(self, outputs: Mapping[str, TensorSpec]) -> dict[str, object] | None:
        """Return the index document, or None for a single shard."""
        if len(self.shards) == 1:
            return None
        total = sum(spec.nbytes for spec in outputs.values())
        parameters = sum(spec.numel for spec in outputs.values())
        names = {name: self.shards[place.shard].name for name, place in self.places.items()}
        metadata = {"total_parameters": parameters, "total_size": total}
        return {"metadata": metadata, "weight_map": dict(sorted(names.items()))}


def lay_out(
    outputs: Mapping[str, TensorSpec],
    *,
    shard_size: int = SHARD_SIZE,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
) -> Layout:
    """Assign tensors to shards of at most `shard_size` bytes of data, in the order given.

    Within a shard, tensors of whole blocks come first so that each starts on a block; the rest
    follow by falling alignment of their dtype. A tensor larger than a shard gets its own.
    """
    groups = _groups(outputs, shard_size)
    shards, places = [], {}
    for number, group in enumerate(groups):
        ordered = sorted(group, key=lambda name: _block_order(outputs[name]))
        header, offsets = make_header({n: outputs[n] for n in ordered}, metadata or {})
        end = len(header) + sum(outputs[n].nbytes for n in ordered)
        shards.append(Shard(_shard_name(stem, number, len(groups)), tuple(ordered), header, end))
        places.update({n: Place(number, at) for n, at in offsets.items()})
    return Layout(tuple(shards), {name: places[name] for name in outputs}, shard_size)


def _groups(outputs: Mapping[str, TensorSpec], shard_size: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, spec in outputs.items():
        if groups[-1] and filled + spec.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    return groups


def _block_order(spec: TensorSpec) -> tuple[bool, int]:
    return spec.nbytes % BLOCK != 0, -BITS[spec.dtype]


def _shard_name(stem: str, number: int, count: int) -> str:
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def make_header(
    tensors: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the header's bytes, padded so that data starts on a block, and absolute offsets."""
    document: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    relative: dict[str, int] = {}
    end = 0
    for name, spec in tensors.items():
        relative[name] = end
        end += spec.nbytes
        document[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [relative[name], end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(len(text) + 8) // BLOCK) * BLOCK - 8
    header = length.to_bytes(8, "little") + text.ljust(length)
    return header, {name: at + length + 8 for name, at in relative.items()}
