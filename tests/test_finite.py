"""Numbers that are none are found in every dtype that can hold them."""

import json

import numpy as np
import pytest
import torch

from surgery.checkpoint import open_checkpoint
from surgery.finite import PATTERNS, count_nonfinite
from surgery.verify import read_values, verify

ELEMENTS = {  # infinity or NaN, then the largest finite value, as bits
    "F64": (0x7FF0000000000000, 0x7FEFFFFFFFFFFFFF),
    "F32": (0xFF800000, 0x7F7FFFFF),
    "F16": (0x7E00, 0x7BFF),
    "BF16": (0xFF81, 0x7F7F),
    "F8_E5M2": (0x7C, 0x7B),
    "F8_E4M3": (0xFF, 0x7E),
    "F8_E8M0": (0xFF, 0xFE),
    "F8_E5M2FNUZ": (0x80, 0x7F),
    "F8_E4M3FNUZ": (0x80, 0x7F),
    "C64": (0x7F800000_00000000, 0x7F7FFFFF_7F7FFFFF),
}


def nonfinite(path):
    return read_values(open_checkpoint(path), workers=2).nonfinite


def write_raw(path, name, dtype, shape, data):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    header = json.dumps({name: entry}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_every_dtype_that_can_hold_nan_is_tested():
    assert set(ELEMENTS) == set(PATTERNS)


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_a_number_that_is_none_is_counted_and_named(dtype, tmp_path):
    bad, good = ELEMENTS[dtype]
    size = {"C64": 8, "F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)
    count, at = 600_000, (0, 70_000, 524_288, 599_999)  # beyond one piece of the engine's
    values = [good.to_bytes(size, "little")] * count
    path = tmp_path / "some.safetensors"
    write_raw(path, "a.weight", dtype, [count], b"".join(values))
    assert nonfinite(path) == {}
    for place in at:
        values[place] = bad.to_bytes(size, "little")
    write_raw(path, "a.weight", dtype, [count], b"".join(values))
    assert nonfinite(path) == {"a.weight": 4}
    assert verify(open_checkpoint(path), load=False)[2].problems == (
        "a.weight: 4 of 600000 values are NaN or infinite",
    )


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ],
)
def test_every_pattern_of_bits_is_judged_as_torch_does(code, dtype):
    width = np.uint16 if PATTERNS[code][0] == "<u2" else np.uint8
    bits = np.arange(np.iinfo(width).max + 1, dtype=width)
    judged = torch.from_numpy(bits.view(np.int16 if width == np.uint16 else np.uint8)).view(dtype)
    finite = judged.to(torch.float32).isfinite().tolist()
    each = [memoryview(bits[i : i + 1]).cast("B") for i in range(len(bits))]
    ours = [count_nonfinite(view, code) == 0 for view in each]
    assert ours == finite
