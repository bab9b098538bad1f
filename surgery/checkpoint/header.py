"""Read the header of one safetensors file, at least as strictly as the format's own crate."""

import json
import math
import os
import re
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from surgery.errors import CheckpointError

# Bits per element. Everything is carried as bytes, so a dtype needs no more than its size.
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
MAX_HEADER = 100_000_000
MAX_U64 = 2**64 - 1
SNIFF = 512
SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # C0, DEL and C1
MAX_SHOWN = 200  # characters of a name in a message

# First bytes of what people mistake for safetensors: (bytes, what it is, what to do).
LOOKALIKES = (
    ((b"version https://git-lfs",), "a Git LFS pointer, not the weights", "run `git lfs pull`"),
    ((b"gguf",), "a GGUF file", "use the original Hugging Face checkpoint"),
    ((b"pk\x03\x04",), "a PyTorch zip (pickle) file", "convert it with `surgery convert`"),
    (
        (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        "a pickle file",
        "convert it with `surgery convert`",
    ),
    ((b"\x89hdf",), "an HDF5 file", "convert it to safetensors first"),
    (
        (b"<!doctype", b"<html"),
        "an HTML page saved in place of the weights",
        "download the file again",
    ),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one stored tensor lies: `nbytes` bytes at the absolute `offset` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Stamp = tuple[int, int, int, int]  # device, inode, bytes, modification time in ns


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: tensors in the order of their data, and the file's own metadata.

    `stamp` tells the file as it was when the header was read.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_start: int
    size: int
    stamp: Stamp = (0, 0, 0, 0)


def read_header(path: Path) -> Header:
    """Read and validate the header of the safetensors file at `path`; no data is read.

    Raises:
        CheckpointError: the file is missing, no regular file, no safetensors, or breaks a rule
            of the format (safetensors 0.8, `Metadata::validate`); duplicate names and control
            characters in names, which the crate lets pass, are refused too.

    Source: https://github.com/huggingface/safetensors (README, "Format").
    """
    fd = open_regular(path)
    try:
        found = os.fstat(fd)
        size = found.st_size
        first = os.pread(fd, SNIFF, 0)
        length = _header_length(path, first, size)
        raw = os.pread(fd, length, 8)
    finally:
        os.close(fd)
    if len(raw) != length:
        raise CheckpointError(path, "the file shrank while it was read", "copy it again")
    header = parse_header(raw, file=path, file_size=size)
    return replace(header, stamp=(found.st_dev, found.st_ino, size, found.st_mtime_ns))


def open_regular(path: Path) -> int:
    """Open `path` for reading and return its descriptor; refuse all but regular files.

    O_NONBLOCK keeps a FIFO from holding the program for ever.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(path, "is not a regular file", "name a .safetensors file")
    return fd


def _header_length(path: Path, first: bytes, size: int) -> int:
    if size < 8:  # noqa: PLR2004 - the length field
        raise CheckpointError(path, f"is {size} bytes, too small for a header", "copy it again")
    length = int.from_bytes(first[:8], "little")
    if length <= min(MAX_HEADER, size - 8):
        return length
    # Only now: a sound header of 640 bytes begins like a pickle.
    _refuse_lookalike(path, first.lstrip().lower())
    if length > MAX_HEADER:
        fact = f"claims a header of {length} bytes, over the format's limit of {MAX_HEADER}"
        raise CheckpointError(path, fact, "it is not a safetensors file, or is damaged")
    fact = f"its header of {length} bytes ends past the file's {size} bytes"
    raise CheckpointError(path, fact, "the file is truncated: copy it again")


def _refuse_lookalike(path: Path, first: bytes) -> None:
    for magics, what, remedy in LOOKALIKES:
        if first.startswith(magics):
            raise CheckpointError(path, f"is {what}", remedy)


def repeated(items: list[tuple[str, Any]]) -> str:
    """Return the first key that stands twice, in quotes; linear in a hostile number of keys."""
    seen: set[str] = set()
    for name, _ in items:
        if name in seen:
            return quoted(name)
        seen.add(name)
    return ""


def quoted(name: str) -> str:
    """Return a name in quotes, for a message: cut in the middle where it would fill a screen."""
    return repr(name if len(name) <= MAX_SHOWN else f"{name[:120]}...{name[-60:]}")


def parse_header(raw: bytes, *, file: Path, file_size: int) -> Header:
    """Validate the JSON bytes of a header against the file they came from.

    Raises:
        CheckpointError: any rule of the format is broken; the message names file and tensor.
    """
    document = _load_json(raw, file)
    metadata = _metadata(document.pop("__metadata__", {}), file)
    start = len(raw) + 8
    found = [_entry(name, value, file, start) for name, value in document.items()]
    tensors = tuple(sorted(found, key=lambda t: (t.offset, t.offset + t.nbytes)))
    _check_coverage(tensors, file, start, file_size)
    return Header(tensors=tensors, metadata=metadata, data_start=start, size=file_size)


def _load_json(raw: bytes, file: Path) -> dict[str, Any]:
    def bad(fact: str) -> NoReturn:
        raise CheckpointError(file, f"its header {fact}", "the file is damaged: copy it again")

    def integer(text: str) -> int:
        if text.startswith("-") or len(text) > len(str(MAX_U64)):
            bad(f"holds the number {text[:24]}, which is no unsigned 64-bit integer")
        return int(text)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            bad(f"names {repeated(items)} twice")
        return out

    try:
        document = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_int=integer,
            parse_float=lambda text: bad(f"holds {text[:24]}, which is no integer"),
            parse_constant=lambda text: bad(f"holds {text}, which is not JSON"),
        )
    except UnicodeDecodeError as error:
        bad(f"is not UTF-8 (byte {error.start})")
    except RecursionError:
        bad("is nested too deeply")
    except json.JSONDecodeError as error:
        bad(f"is not JSON ({error.msg}, line {error.lineno} column {error.colno})")
    if not isinstance(document, dict):
        bad("is not a JSON object")
    return document


def _metadata(value: object, file: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(file, "its __metadata__ is not a table of strings")
    for text in (*value, *value.values()):
        _check_text(text, file, "__metadata__")
    return value


def _check_text(text: str, file: Path, where: str) -> None:
    if SURROGATE.search(text):
        raise CheckpointError(file, f"{where} holds a lone surrogate, which is not Unicode text")


def _entry(name: str, value: object, file: Path, start: int) -> TensorInfo:
    _check_text(name, file, "a tensor name")
    if CONTROL.search(name):
        fact = f"the tensor name {quoted(name)} holds control characters"
        raise CheckpointError(file, fact, "rename the tensor where the file was made")

    def bad(fact: str) -> NoReturn:
        raise CheckpointError(
            file, f"tensor {quoted(name)} {fact}", "the file is damaged or forged"
        )

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        bad("does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        bad(f"has the unknown dtype {dtype!r}"[:80])
    if not _are_u64(shape):
        bad("has a shape that is not a list of unsigned integers")
    if not _are_u64(offsets) or len(offsets) != 2:  # noqa: PLR2004 - begin and end
        bad("has data_offsets that are not two unsigned integers")
    begin, end = offsets
    nbits = _product(shape) * BITS[dtype]
    if _product(shape) > MAX_U64 or nbits > MAX_U64:
        bad(f"has the shape {shape}, whose size overflows"[:120])
    if nbits % 8:
        bad(f"has {nbits} bits, which is no whole number of bytes")
    if end - begin != nbits // 8:
        bad(f"spans {end - begin} bytes, but its shape and dtype need {nbits // 8}")
    return TensorInfo(name, dtype, tuple(shape), file, start + begin, nbits // 8)


def _are_u64(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MAX_U64 for v in value)


def _product(shape: list[int]) -> int:
    """Multiply from the left as the crate does: an overflow is not undone by a later zero."""
    total = 1
    for size in shape:
        total *= size
        if total > MAX_U64:
            return total
    return total


def _check_coverage(
    tensors: tuple[TensorInfo, ...], file: Path, start: int, file_size: int
) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "leaves a hole" if tensor.offset > end else "overlaps another tensor"
            fact = f"tensor {quoted(tensor.name)} {what} at byte {min(tensor.offset, end)}"
            raise CheckpointError(file, fact, "the file is damaged or forged")
        end += tensor.nbytes
    if end != file_size:
        fact = f"its tensors end at byte {end}, but the file has {file_size}"
        kind = "truncated" if end > file_size else "followed by foreign bytes"
        raise CheckpointError(file, fact, f"the data is {kind}: copy the file again")
