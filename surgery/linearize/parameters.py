"""What mixers add to a layer and keep of a text: parameters, first values, bytes (no torch)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.linearize.initial import IDENTITY, LAST, ONE, ZERO, Start, constant, normal

Spec = Mapping[str, Any]
FLOAT = 4  # bytes of a number of the state
INT = 8  # bytes of the number of a document
RANK, TAPS, LITTLE, DT_BIAS = 16, 4, 0.1, -4.6  # as in surgery/models/linear_gated.py
LOGIT = math.log(0.1 / 0.9)  # sigmoid gives 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of an attention layer: width of its input, heads, heads of keys and values, their width."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class New:
    """A parameter that softmax attention does not have: its shape and how it begins."""

    shape: tuple[int, ...]
    start: Start


@dataclass(frozen=True, slots=True)
class Kept:
    """What a layer keeps of a text, however long, for a row.

    Attributes:
        sums: numbers in float32.
        tokens: keys and values of so many tokens, in the dtype of the model.
        numbers: further ones in that dtype.
        whole: int64 numbers: of documents, of places.
    """

    sums: int = 0
    tokens: int = 0
    numbers: int = 0
    whole: int = 0

    def nbytes(self, sizes: Sizes, width: int) -> int:
        """Bytes a row; `width` are those of a number of the model."""
        numbers = 2 * self.tokens * sizes.kv_heads * sizes.head_dim + self.numbers
        return FLOAT * self.sums + width * numbers + INT * self.whole


def maps(spec: Spec, sizes: Sizes) -> dict[str, New]:
    """A map of queries and one of keys, each of every query head."""
    shape = (sizes.heads, sizes.head_dim, spec["feature_dim"])
    return {name: New(shape, IDENTITY) for name in ("query_map", "key_map")}


def lolcats(spec: Spec, sizes: Sizes) -> dict[str, New]:
    """Maps, and how much the window weighs in each head."""
    return {**maps(spec, sizes), "window_factors": New((sizes.heads,), constant(LOGIT))}


def t2r(spec: Spec, sizes: Sizes) -> dict[str, New]:
    """Maps with biases."""
    bias = New((sizes.heads, 1, spec["feature_dim"]), ZERO)
    return {**maps(spec, sizes), "query_bias": bias, "key_bias": bias}


def nothing(spec: Spec, sizes: Sizes) -> dict[str, New]:  # noqa: ARG001
    """No parameters."""
    return {}


def lizard(spec: Spec, sizes: Sizes) -> dict[str, New]:
    """Maps, one gate for all heads, what the window adds, and logits of its sinks."""
    gate = {"gate.weight": New((1, sizes.hidden), ZERO), "gate.bias": New((1,), constant(3.0))}
    more = {
        "alpha": New((1,), constant(1.0)),
        "sink_logits": New((sizes.heads, spec["sinks"]), ZERO),
    }
    return {**maps(spec, sizes), **gate, **more}


def halves(count: int) -> Callable[[Spec], int]:
    """Features of a map with so many halves."""
    return lambda spec: count * int(spec["feature_dim"])


def products(spec: Spec) -> int:
    """Features of the second-order expansion: 1, entries, and pairs of entries."""
    f = int(spec["feature_dim"])
    return 1 + f + f * (f + 1) // 2


def sums_and_window(features: Callable[[Spec], int]) -> Callable[[Spec, Sizes], Kept]:
    """Sums of every query head, with a column for the normaliser, and tokens of a window."""

    def kept(spec: Spec, sizes: Sizes) -> Kept:
        sums = sizes.heads * features(spec) * (sizes.head_dim + 1)
        return Kept(sums=sums, tokens=spec["window"], whole=spec["window"] + 1)

    return kept


def square_and_window(spec: Spec, sizes: Sizes) -> Kept:
    """One matrix a KV head, and tokens of a window."""
    return replace(square(spec, sizes), tokens=spec["window"], whole=spec["window"] + 1)


def window_and_sinks(spec: Spec, _: Sizes) -> Kept:
    """Tokens of a window, sinks among them: documents of all, places of sinks."""
    return Kept(tokens=spec["window"], whole=spec["window"] + spec["sinks"])


def _gated(sizes: Sizes) -> dict[str, New]:
    gate = New((sizes.heads * sizes.head_dim, sizes.hidden), normal(LITTLE * sizes.hidden**-0.5))
    return {"gate.weight": gate, "norm": New((sizes.head_dim,), ONE)}


def gla(_: Spec, sizes: Sizes) -> dict[str, New]:
    """Gates of the state by two small factors, and a norm and gate of the output."""
    width = sizes.kv_heads * sizes.head_dim
    return {
        **_gated(sizes),
        "decay_in.weight": New((RANK, sizes.hidden), normal(sizes.hidden**-0.5)),
        "decay_out.weight": New((width, RANK), ZERO),
        "decay_out.bias": New((width,), ZERO),
    }


def gated_delta(_: Spec, sizes: Sizes) -> dict[str, New]:
    """Convolutions, rates of writing and forgetting, and a norm and gate of the output."""
    heads = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
    taps = {f"conv_{n}": New((count * sizes.head_dim, TAPS), LAST) for n, count in heads.items()}
    rates = New((sizes.kv_heads, sizes.hidden), ZERO)
    return {
        **_gated(sizes),
        **taps,
        "beta.weight": rates,
        "decay.weight": rates,
        "A_log": New((sizes.kv_heads,), ZERO),
        "dt_bias": New((sizes.kv_heads,), constant(DT_BIAS)),
    }


def square(_: Spec, sizes: Sizes) -> Kept:
    """One matrix a KV head, and the document that it is of."""
    return Kept(sums=sizes.kv_heads * sizes.head_dim**2, whole=1)


def square_and_taps(_: Spec, sizes: Sizes) -> Kept:
    """A matrix, and what convolutions still see."""
    channels = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    return replace(square(_, sizes), numbers=(TAPS - 1) * channels, whole=TAPS)
