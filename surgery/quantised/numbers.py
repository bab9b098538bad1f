"""Stored codes as float32: fp8, fp4 and integers packed into bytes, by table."""

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    Table = np.ndarray[Any, np.dtype[np.float32]]

TORCH_FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
# E2M1: the sign, then these by the lower three bits. Source: OCP Microscaling Formats 1.0, 5.3.3.
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# All numbers of a byte are taken as one wide word: half the time of one by one.
WIDE = {1: "f4", 2: "u8", 4: "c16"}
EXPONENTS = {"U8", "F8_E8M0"}  # scales that are powers of two, stored as exponents
EXPONENT_BIAS = 127


@cache
def table(code: str) -> "Table":
    """Return the numbers that each byte stands for, [256, numbers], lowest bits first.

    Args:
        code: a dtype of fp8, `fp4`, `signed` for bytes with a sign, `exponent` for powers
            of two (E8M0), or `intN` for integers of N bits, stored with 2**(N-1) added.
    """
    import numpy as np
    import torch

    byte = np.arange(256)
    if code in TORCH_FP8:
        floats = torch.arange(256, dtype=torch.uint8).view(getattr(torch, TORCH_FP8[code]))
        return floats.float().numpy()[:, None]
    if code == "fp4":
        signed = np.array([*FP4, *(-value for value in FP4)])
        return signed[np.stack([byte & 15, byte >> 4], axis=1)].astype(np.float32)
    if code == "exponent":
        powers = np.ldexp(1.0, byte - EXPONENT_BIAS)
        powers[-1] = np.nan
        return powers.astype(np.float32)[:, None]
    if code == "signed":
        return byte.astype(np.int8).astype(np.float32)[:, None]
    bits = int(code.removeprefix("int"))
    shifts = np.arange(0, 8, bits)
    return (((byte[:, None] >> shifts) & ((1 << bits) - 1)) - (1 << (bits - 1))).astype(np.float32)


def unpack(codes: "torch.Tensor", code: str, columns: int) -> "torch.Tensor":
    """Return rows of codes as float32, [rows, columns].

    Args:
        codes: [rows, ...] of whatever dtype they are stored in.
        columns: numbers of a row; what fills up its last word is left out.
    """
    import numpy as np
    import torch

    known = table(code)
    data = codes.reshape(codes.shape[0], -1).view(torch.uint8).numpy()
    wide = known.view(WIDE[known.shape[1]]).reshape(-1)
    found = np.take(wide, data).view(np.float32)
    return torch.from_numpy(found)[:, :columns]


def scale_floats(stored: "torch.Tensor", dtype: str) -> "torch.Tensor":
    """Return scales as float32; bytes among them are exponents of two (E8M0)."""
    if dtype not in EXPONENTS:
        return stored.float()
    return unpack(stored, "exponent", stored.shape[-1]).reshape(stored.shape)
