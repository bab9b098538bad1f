"""What a linearization changes: state and cache in bytes, what is to train, and what to know."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from surgery.checkpoint import BITS
from surgery.linearize.attention import MIXER, Attention
from surgery.linearize.methods import Method
from surgery.linearize.parameters import Spec

BYTE = 8  # bits
NOT_TRAINED = "nothing of it is trained: its outputs are not yet those of the model"


def facts(
    method: Method, spec: Spec, attention: Attention, linear: Sequence[int]
) -> dict[str, Any]:
    """Return what is recorded for later commands.

    `state_bytes` is what all linear layers keep of a row, however long it is, and
    `kv_bytes_per_token` what they kept of each token with softmax attention, both in the dtype of
    the model (sums are float32); `break_even` is the length at which the one is as large as the
    other.
    """
    sizes, width = attention.sizes, BITS[attention.dtype] // BYTE
    state = len(linear) * method.kept(spec, sizes).nbytes(sizes, width)
    token = len(linear) * 2 * sizes.kv_heads * sizes.head_dim * width
    new = method.new(spec, sizes)
    return {
        "trainable_parameters": _patterns(method, attention, linear, new),
        "linear_layers": list(linear),
        "new_parameters": len(linear) * sum(math.prod(entry.shape) for entry in new.values()),
        "state_bytes": state,
        "kv_bytes_per_token": token,
        "break_even": -(-state // token),
    }


def _patterns(
    method: Method, attention: Attention, linear: Sequence[int], new: Mapping[str, Any]
) -> list[str]:
    """Return patterns of the names that train: of mixers, and the projections of their layers."""
    found = [attention.parts.stack.name(n, f"{MIXER}*") for n in linear if new]
    return found + [attention.name(n, f"{p}.*") for n in linear for p in method.projections]


def notes(
    method: Method,
    spec: Spec,
    attention: Attention,
    told: Mapping[str, Any],
    *,
    sliding: Sequence[int],
) -> Iterator[str]:
    """Yield what a user should know before it runs.

    Args:
        told: the facts.
        sliding: layers that are left as they are because they slide.
    """
    linear, layers = told["linear_layers"], attention.parts.layers
    yield (
        f"{len(linear)} of {layers} layers become linear ({method.name}), with "
        f"{told['new_parameters']} new parameters"
    )
    yield (
        f"they keep {told['state_bytes']} bytes a row, however long it is, where softmax attention "
        f"keeps {told['kv_bytes_per_token']} a token: fewer from {told['break_even']} tokens on"
    )
    if sliding:
        yield (
            f"{len(sliding)} layers see {attention.window} tokens alone and stay as they are; "
            "--sliding convert converts them"
        )
    converted = [n for n in linear if attention.slides[n]]
    if converted:
        told_window = f", with a window of {spec['window']}" if spec["window"] else ""
        saw = f"{len(converted)} layers that saw {attention.window} tokens alone"
        yield f"{saw} are converted{told_window}"
    if told["trainable_parameters"]:
        yield NOT_TRAINED
