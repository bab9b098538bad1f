"""How near two merged models are, tensor by tensor, in units of the last place."""

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Places = dict[str, tuple[Path, int, int]]


def places(model: Path) -> Places:
    """Return file, offset and bytes of every tensor."""
    found: Places = {}
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        for name, told in header.items():
            if name != "__metadata__":
                begin, end = told["data_offsets"]
                found[name] = (path, 8 + length + begin, end - begin)
    return found


def words(place: tuple[Path, int, int]) -> NDArray[np.uint16]:
    """Map the bf16 words of a tensor."""
    path, offset, size = place
    return np.memmap(path, np.uint16, "r", offset, (size // 2,))


def floats(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Widen bf16 words."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def steps(bits: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Number bf16 values in their order, so that neighbours differ by one."""
    signed = bits.astype(np.int32)
    return np.where(signed & 0x8000, 0x8000 - signed, signed)


def compare(mine: Path, other: Path, base: Path) -> dict[str, Any]:
    """Return the share of equal elements, those within one step, and the relative distance.

    The distance is ||mine - other|| / ||other - base||: in units of what the merge did.
    """
    a, b, start = places(mine), places(other), places(base)
    if set(a) != set(b):
        raise ValueError(f"the tools wrote different tensors: {sorted(set(a) ^ set(b))[:3]}")
    count = equal = near = 0
    apart = moved = 0.0
    for name in sorted(a):
        x, y = np.array(words(a[name])), np.array(words(b[name]))
        gap = np.abs(steps(x) - steps(y))
        count, equal = count + gap.size, equal + int((gap == 0).sum())
        near += int((gap <= 1).sum())
        apart += float(np.square(floats(x) - floats(y)).sum())
        moved += float(np.square(floats(y) - floats(np.array(words(start[name])))).sum())
    distance = (apart / moved) ** 0.5 if moved else 0.0
    return {"equal": equal / count, "within_one": near / count, "distance": distance}


if __name__ == "__main__":
    print(json.dumps(compare(*(Path(word) for word in sys.argv[1:4])), indent=2))
