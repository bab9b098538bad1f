"""Check that an output is the stack of its input, byte for byte: a wrong answer is not fast."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

BLOCK = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the bytes of a tensor are."""

    file: Path
    start: int
    length: int
    kind: tuple[str, tuple[int, ...]]


def places(model: Path) -> dict[str, Place]:
    """Return where every tensor of a checkpoint directory is, read from the headers."""
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            entries = json.loads(stream.read(size))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            kind = (entry["dtype"], tuple(entry["shape"]))
            found[name] = Place(file=file, start=8 + size + begin, length=end - begin, kind=kind)
    return found


def source_name(name: str, layers: int) -> str:
    """Return the input tensor that an output tensor must equal."""
    return re.sub(r"(?<=layers\.)\d+", lambda m: str(int(m[0]) % layers), name)


def same(a: Place, b: Place) -> bool:
    """Compare kind and bytes of two tensors."""
    if a.kind != b.kind or a.length != b.length:
        return False
    with a.file.open("rb") as left, b.file.open("rb") as right:
        left.seek(a.start)
        right.seek(b.start)
        lengths = [min(BLOCK, a.length - done) for done in range(0, a.length, BLOCK)]
        return all(left.read(n) == right.read(n) for n in lengths)


def check(base: Path, out: Path, *, layers: int, factor: int = 2) -> int:
    """Return the number of tensors compared.

    Raises:
        ValueError: if a tensor is missing, left over or different, or the config disagrees.
    """
    inputs, outputs = places(base), places(out)
    found = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    if found != layers * factor:
        raise ValueError(f"config.json: {found} layers instead of {layers * factor}")
    repeated = sum(".layers." in name for name in inputs)
    if len(outputs) != len(inputs) + repeated * (factor - 1):
        raise ValueError(f"{len(outputs)} tensors in the output")
    wrong = [n for n, p in outputs.items() if not same(p, inputs[source_name(n, layers)])]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors differ, the first is {wrong[0]}")
    return len(outputs)
