"""Which block each depth runs, and which layers a block starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from surgery.errors import RecipeError

Scheme = Literal["cycle", "sequence", "middle-cycle"]
Init = Literal["stepwise", "average", "lower"]
SCHEMES: tuple[Scheme, ...] = ("cycle", "sequence", "middle-cycle")
INITS: tuple[Init, ...] = ("stepwise", "average", "lower")
FEWEST = 2  # loops: one would tie nothing
ENDS = 2  # layers that middle-cycle leaves alone


@dataclass(frozen=True, slots=True)
class Loops:
    """How L layers become K blocks.

    Attributes:
        layer_map: for each of the L depths its block, in [0, K).
        sources: for each block the layers whose mean it starts as.
    """

    layer_map: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]

    @property
    def blocks(self) -> int:
        """K."""
        return len(self.sources)

    def depths(self, block: int) -> tuple[int, ...]:
        """Return the depths that run a block."""
        return tuple(depth for depth, own in enumerate(self.layer_map) if own == block)

    def is_first(self, depth: int) -> bool:
        """Whether no earlier depth runs the same block: there its tensors are stored."""
        return self.layer_map.index(self.layer_map[depth]) == depth

    def is_alone(self, depth: int) -> bool:
        """Whether no other depth runs the same block."""
        return self.layer_map.count(self.layer_map[depth]) == 1


def lay_loops(layers: int, *, blocks: int, scheme: Scheme, init: Init) -> Loops:
    """Lay L layers into B loops of K blocks.

    `cycle` runs all K = L / B blocks one after the other, B times: depth d runs block d mod K.
    `sequence` runs each block B times in a row. `middle-cycle` keeps the first and the last layer
    as blocks of their own and cycles through (L - 2) / B others between them.

    A block starts as the mean of all layers it stands for (`average`), as one of the K layers
    that lie evenly from the first to the last (`stepwise`; the nearest, of two the lower), or as
    one of the first K (`lower`).

    Raises:
        RecipeError: a word that is none of these, or loops that the layers do not fit into.

    Source: arXiv 2410.20672, section 2 (cycle, the three starts; 6 layers in 2 loops start from
    layers 1, 3, 6); arXiv 2104.06022 (sequence); arXiv 2507.10524 (middle-cycle).
    """
    _check_word("--scheme", scheme, SCHEMES)
    _check_word("--init", init, INITS)
    ends = ENDS if scheme == "middle-cycle" else 0
    tied = layers - ends
    _check_loops(layers, tied, blocks)
    count = tied // blocks
    own = [d // blocks if scheme == "sequence" else d % count for d in range(tied)]
    first, last = (1, layers - 2) if ends else (0, layers - 1)
    start = _starts(own, count, first, last, init)
    if not ends:
        return Loops(tuple(own), tuple(start))
    layer_map = (0, *(block + 1 for block in own), count + 1)
    return Loops(layer_map, ((0,), *start, (layers - 1,)))


def _starts(
    own: Sequence[int], count: int, first: int, last: int, init: Init
) -> list[tuple[int, ...]]:
    if init == "average":
        return [
            tuple(first + depth for depth, block in enumerate(own) if block == b)
            for b in range(count)
        ]
    if init == "lower":
        return [(first + b,) for b in range(count)]
    return [(layer,) for layer in evenly(first, last, count)]


def evenly(first: int, last: int, count: int) -> tuple[int, ...]:
    """Return `count` whole numbers evenly from first to last: the nearest, of two the lower."""
    if count == 1:
        return (first,)
    gaps = 2 * (count - 1)
    return tuple(first + (2 * i * (last - first) + count - 2) // gaps for i in range(count))


def _check_word(option: str, word: str, words: Sequence[str]) -> None:
    if word not in words:
        raise RecipeError(f"{option} {word}", f"is none of {', '.join(words)}")


def _check_loops(layers: int, tied: int, blocks: int) -> None:
    if blocks < FEWEST:
        fact = "ties nothing: it is how often the tied layers are run through"
        raise RecipeError(f"--blocks {blocks}", fact, "2 halves the layers")
    if tied < blocks or tied % blocks:
        what = f"{layers} layers" if tied == layers else f"{tied} layers between first and last"
        fits = [str(n) for n in range(FEWEST, tied + 1) if tied % n == 0]
        remedy = f"it may be {', '.join(fits)}" if fits else "choose another scheme"
        raise RecipeError(f"--blocks {blocks}", f"does not divide the model's {what}", remedy)
