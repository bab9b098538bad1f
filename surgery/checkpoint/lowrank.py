"""Rows of a weight with a low-rank change added, made when they are read.

Tensors are torch's, by their own methods: nothing here imports it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint.adapters import Factors
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.view import MakeRows, ReadRows, View, read_rows, rows_of

TILE = 16  # rows multiplied at once, always as many: a row's bits must not depend on its company
KEPT = 32 << 20  # bytes of factors that are kept for the next rows, of all modules together
WIDE = ("F32", "F64")  # what is computed in float64, and everything else in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Which part of a module's factors changes a stored tensor.

    Attributes:
        swapped: the tensor is stored [in, out], so it changes by the product's transpose.
        experts: matrices that the factors hold.
        expert: the one that the tensor is; None where it holds all of them.
        first, rows: the output rows that the tensor is, of a matrix that is stored in parts.
    """

    factors: Factors
    swapped: bool = False
    experts: int = 1
    expert: int | None = None
    first: int = 0
    rows: int | None = None

    def told(self) -> str:
        """Tell it apart from any other, for a plan's fingerprint."""
        place = (self.swapped, self.experts, self.expert, self.first, self.rows)
        return repr((self.factors.a.name, self.factors.scale, place))


class Kept:
    """Factors as they were last used, the oldest let go; one for all views of a checkpoint.

    A run refuses files that changed since they were opened, so what is kept cannot be stale.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[Any, Any]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: str) -> tuple[Any, Any] | None:
        """Return the pair kept under a key, if it still is."""
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
            return found

    def put(self, key: str, pair: tuple[Any, Any]) -> None:
        """Keep a pair, and let go of what was not used for longest."""
        with self._lock:
            if key in self._held:
                return
            self._held[key] = pair
            self._bytes += _bytes(pair)
            while self._bytes > KEPT and len(self._held) > 1:
                self._bytes -= _bytes(self._held.popitem(last=False)[1])


def _own(read: ReadRows, weight: TensorInfo, start: int, count: int) -> Any:  # noqa: ANN401
    """Return rows of floats that may be changed in place."""
    found = read_rows(read, weight, start, count)
    rows = floats(found, weight.dtype)
    return rows.clone() if rows is found and isinstance(weight, View) else rows


def _bytes(pair: tuple[Any, Any]) -> int:
    return sum(int(t.numel()) * int(t.element_size()) for t in pair)


def floats(tensor: Any, dtype: str) -> Any:  # noqa: ANN401 - torch's, which is not imported here
    """Return a tensor in what a weight of that dtype is computed in."""
    return tensor.double() if dtype in WIDE else tensor.float()


def added(weight: TensorInfo, change: Change, kept: Kept) -> MakeRows:
    """Return what makes rows of `weight + scale * b @ a`; with DoRA, set to their length."""

    def make(read: ReadRows, start: int, count: int) -> Any:  # noqa: ANN401
        rows = _own(read, weight, start, count)
        pair = kept.get(key)
        if pair is None:
            pair = _factors(read, change, weight.dtype)
            kept.put(key, pair)
        _add(rows, *pair, start=start, period=period)
        return _lengthened(read, rows, change.factors.magnitude, start)

    key = f"{change.factors.a.file} {weight.name} {weight.dtype} {change.told()}"
    period = rows_of(weight) // (change.experts if change.expert is None else 1)
    return make


def held_bytes(change: Change, dtype: str) -> int:
    """Return the bytes of a module's factors in what they are computed in."""
    width = 8 if dtype in WIDE else 4
    stored = change.factors.a.nbytes + change.factors.b.nbytes
    numbers = change.factors.a.numel + change.factors.b.numel
    return stored + 2 * width * numbers


def _factors(read: ReadRows, change: Change, dtype: str) -> tuple[Any, Any]:
    """Return (left [experts, rows, rank], right [experts, rank, columns]), the scale in the right.

    Rows are padded to whole tiles. The layout of several experts is peft's: the rank runs inside
    the expert in `a` and outside of it in `b` (peft 0.21, tuners/lora/layer.py, ParamWrapper).
    """
    factors = change.factors
    a = floats(read(factors.a, 0, factors.a.shape[0]), dtype)
    b = floats(read(factors.b, 0, factors.b.shape[0]), dtype)
    a = a.reshape(change.experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, change.experts).permute(2, 0, 1)
    if change.expert is not None:
        a, b = a[change.expert :][:1], b[change.expert :][:1]
    if change.rows is not None:
        b = b[:, change.first : change.first + change.rows]
    left, right = (a.transpose(1, 2), b.transpose(1, 2)) if change.swapped else (b, a)
    whole = -(-left.shape[1] // TILE) * TILE
    padded = left.new_zeros((left.shape[0], whole, left.shape[2]))
    padded[:, : left.shape[1]] = left
    return padded, right.contiguous() * factors.scale


def _add(rows: Any, left: Any, right: Any, *, start: int, period: int) -> None:  # noqa: ANN401
    for expert, first, count, at in _tiles(start, rows.shape[0], period):
        tile = first // TILE * TILE
        product = left[expert, tile : tile + TILE] @ right[expert]
        rows[at : at + count] += product[first - tile : first - tile + count]


def _tiles(start: int, count: int, period: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (expert, row of it, rows, place in the run), cut at tiles and experts."""
    at = 0
    while at < count:
        expert, first = divmod(start + at, period)
        size = min(TILE - first % TILE, period - first, count - at)
        yield expert, first, size, at
        at += size


def _lengthened(
    read: ReadRows,
    rows: Any,  # noqa: ANN401
    magnitude: TensorInfo | None,
    start: int,
) -> Any:  # noqa: ANN401
    """Set each row to DoRA's magnitude.

    Source: "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equation 5.
    """
    if magnitude is None:
        return rows
    wide = rows.double()
    wanted = _numbers(read, magnitude)[start : start + rows.shape[0]].double()
    return (wide * (wanted / wide.square().sum(1).sqrt())[:, None]).to(rows.dtype)


def _numbers(read: ReadRows, tensor: TensorInfo) -> Any:  # noqa: ANN401
    return read(tensor, 0, rows_of(tensor)).reshape(-1)


def raised(bias: TensorInfo, factors: Factors) -> MakeRows:
    """Return what makes numbers of `bias + scale * the bias of b`."""

    def make(read: ReadRows, start: int, count: int) -> Any:  # noqa: ANN401
        assert factors.bias is not None  # noqa: S101 - told by the caller
        own = floats(read_rows(read, bias, start, count), bias.dtype)
        return own + floats(read(factors.bias, start, count), bias.dtype) * factors.scale

    return make


def replaced(tensor: TensorInfo) -> MakeRows:
    """Return what gives another tensor's rows."""
    return lambda read, start, count: read_rows(read, tensor, start, count)


def with_rows(weight: TensorInfo, tokens: tuple[int, ...], rows: TensorInfo) -> MakeRows:
    """Return what makes rows of `weight`, those of some tokens replaced."""

    def make(read: ReadRows, start: int, count: int) -> Any:  # noqa: ANN401
        found = _own(read, weight, start, count)
        for token in range(start, start + count):
            if token in places:
                found[token - start] = floats(read(rows, places[token], 1), weight.dtype)[0]
        return found

    places = {token: place for place, token in enumerate(tokens)}
    return make
