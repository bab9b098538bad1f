"""Count the numbers that are none: NaN and infinity, from their bits, in any stored dtype."""

import numpy as np

# Per dtype: an integer type of its width, and the bits (mask, value) of all that is not finite.
# E4M3 has no infinity, FNUZ has a single NaN where -0 would be; F4 and F6 have finite values only.
PATTERNS: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "C64": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "F32": ("<u4", 0x7F80_0000, 0x7F80_0000),
    "F16": ("<u2", 0x7C00, 0x7C00),
    "BF16": ("<u2", 0x7F80, 0x7F80),
    "F8_E5M2": ("u1", 0x7C, 0x7C),
    "F8_E4M3": ("u1", 0x7F, 0x7F),
    "F8_E8M0": ("u1", 0xFF, 0xFF),
    "F8_E5M2FNUZ": ("u1", 0xFF, 0x80),
    "F8_E4M3FNUZ": ("u1", 0xFF, 0x80),
}
PART = 64 << 10  # elements at a time, so that what is computed stays in the cache


def count_nonfinite(view: memoryview, dtype: str) -> int:
    """Count the elements of `view` that are NaN or infinite; 0 for dtypes that have neither.

    Args:
        view: whole elements of a tensor.
        dtype: safetensors code.
    """
    if dtype not in PATTERNS:
        return 0
    code, mask, value = PATTERNS[dtype]
    bits = np.frombuffer(view, dtype=code)
    parts = 2 if dtype == "C64" else 1
    total = 0
    for start in range(0, len(bits), PART):
        hit = (bits[start : start + PART] & mask) == value
        total += int(np.count_nonzero(hit.reshape(-1, parts).any(axis=1) if parts > 1 else hit))
    return total
