"""Read quantised weights as floats: each one a view that applies its scales when it is read."""

from surgery.checkpoint import Checkpoint
from surgery.quantised.pairing import replace_quantised
from surgery.quantised.scheme import find_scheme, refuse_undeclared

__all__ = ["dequantised"]


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its quantised weights as views of floats, scales applied.

    What is not quantised comes back as it is. Scales and zero points are no tensors of the
    result, but stored parts of its views; `quantization_config` is gone from its config. A value
    is the float32 product of the stored number and its scale; whoever writes it rounds it once.

    Read are fp8 (one scale per block, row or tensor), MXFP4 as GPT-OSS stores it, and of
    compressed-tensors fp8, int8, packed 2, 4 and 8-bit integers, MXFP8, MXFP4 and NVFP4.

    Raises:
        CheckpointError: a format that is not read, a scale that is missing or does not fit, or
            quantised weights in a checkpoint whose config does not say that it has any.
    """
    scheme = find_scheme(checkpoint)
    if scheme is None:
        refuse_undeclared(checkpoint)
        return checkpoint
    return replace_quantised(checkpoint, scheme)
