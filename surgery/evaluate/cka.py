"""How alike the layers of two models are: debiased linear CKA, added up batch by batch.

Axis letters: n tokens of a batch, d width, l layers and one more.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.anatomy import anatomy
from surgery.checkpoint import open_checkpoint
from surgery.errors import TrainError
from surgery.evaluate.load import Loaded
from surgery.evaluate.rows import Row, fill, plan_rows
from surgery.evaluate.tokens import Encoded

if TYPE_CHECKING:
    import torch

    Grams = list[torch.Tensor]

# Tokens behind one Gram matrix, and in all: noise falls with the second, memory grows with the
# square of the first.
BATCH = 512
TOKENS = 16384
# The estimator divides by n (n - 3).
_FEWEST = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """Debiased linear CKA between the residual streams of a child and a parent.

    Attributes:
        matrix: [child layers + 1][parent layers + 1]; place 0 is the input of the first layer,
            place i the output of layer i. None where a layer says the same of every token.
        tokens: Tokens that it rests on.
    """

    matrix: tuple[tuple[float | None, ...], ...]
    tokens: int

    @property
    def diagonal(self) -> tuple[float | None, ...]:
        """Return the figures of places of the same number."""
        size = min(len(self.matrix), len(self.matrix[0]))
        return tuple(self.matrix[i][i] for i in range(size))


def similarity(
    child: Loaded,
    parent: Loaded,
    encoded: Sequence[Encoded],
    *,
    context: int,
    seed: int = 0,
) -> Similarity:
    """Compare the residual stream of two models on the same tokens, layer by layer.

    HSIC of two layers is the mean over batches of tokens of its unbiased estimate, and CKA is
    HSIC(child, parent) / sqrt(HSIC(child, child) HSIC(parent, parent)). Batches are windows that
    do not overlap, drawn from all documents by the seed, at least `BATCH` tokens each where the
    text has them, until `TOKENS`. It may lie a little outside 0 to 1, as unbiased estimates do.

    Source: Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?", 2021,
    arXiv 2010.15327, equations 2 and 3; the unbiased HSIC is that of Song et al., "Feature
    Selection via Dependence Maximization", 2012, equation 5.

    Raises:
        TrainError: The layers of a model are not found, or the text is shorter than 4 tokens.
    """
    hooks = [_Stream(each) for each in (child, parent)]
    sums: list[torch.Tensor] = []
    tokens = 0
    for rows in _batches(encoded, context=context, seed=seed):
        mine, theirs = ([centred(x_nd) for x_nd in stream.run(rows, encoded)] for stream in hooks)
        count = len(mine[0])
        found = products(mine, theirs)
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        tokens += count
    if not sums:
        raise TrainError("--maps", "the text is shorter than 4 tokens", "give a longer text")
    return Similarity(matrix=_ratios(*sums), tokens=tokens)


def centred(x_nd: "torch.Tensor") -> "torch.Tensor":
    """Return the U-centred Gram matrix of n rows, [n, n] in float64, its diagonal zero.

    Source: Székely and Rizzo, "Partial distance correlation with methods for dissimilarities",
    2014, definition 2. The sum of products of two such matrices is n (n - 3) times the unbiased
    HSIC.
    """
    x_nd = x_nd.double()
    # A constant added to all rows changes nothing but the rounding.
    x_nd = x_nd - x_nd.mean(0)
    gram = (x_nd @ x_nd.T).fill_diagonal_(0)
    n = len(gram)
    rows = gram.sum(0) / (n - 2)
    gram = gram - rows - rows[:, None] + rows.sum() / (n - 1)
    return gram.fill_diagonal_(0)


def products(mine: "Grams", theirs: "Grams") -> "list[torch.Tensor]":
    """Return unbiased HSIC of child with parent [l, l], and of each layer with itself [l], [l]."""
    import torch

    n = len(mine[0])
    a, b = (torch.stack([g.flatten() for g in grams]) for grams in (mine, theirs))
    scale = 1 / (n * (n - 3))
    return [scale * (a @ b.T), scale * a.square().sum(1), scale * b.square().sum(1)]


def _ratios(
    cross: "torch.Tensor", mine: "torch.Tensor", theirs: "torch.Tensor"
) -> tuple[tuple[float | None, ...], ...]:
    scale = (mine[:, None] * theirs).sqrt()
    found = (cross / scale).tolist()
    sound = (scale > 0).tolist()
    return tuple(
        tuple(x if kept else None for x, kept in zip(*pair, strict=True))
        for pair in zip(found, sound, strict=True)
    )


def _batches(encoded: Sequence[Encoded], *, context: int, seed: int) -> Iterator[tuple[Row, ...]]:
    """Yield windows of about `BATCH` tokens together, drawn over all documents."""
    planned = plan_rows(encoded, context=context, stride=context, batch_tokens=1)
    rows = [row for group in planned for row in group]
    batch: list[Row] = []
    held = total = 0
    for place in np.random.default_rng(seed).permutation(len(rows)):
        batch.append(rows[place])
        held += rows[place].window.width
        if held >= BATCH:
            yield tuple(batch)
            total, batch, held = total + held, [], 0
        if total >= TOKENS:
            return
    if held >= (_FEWEST if total == 0 else BATCH // 2):
        yield tuple(batch)


def _layers(loaded: Loaded) -> list[Any]:
    """Return the decoder's layers: by their name on disk, or, where loading renames, by place.

    Raises:
        TrainError: There are none in either.
    """
    import torch

    prefix = anatomy(open_checkpoint(loaded.path)).stack.prefix
    with suppress(AttributeError):
        return list(loaded.model.get_submodule(prefix).children())
    with suppress(AttributeError):
        for module in loaded.model.get_decoder().modules():
            if isinstance(module, torch.nn.ModuleList):
                return list(module)
    fact = f"has no layers under {prefix} once it is loaded"
    raise TrainError(loaded.path, fact, "leave --maps out")


class _Stream:
    """Runs a model and returns the residual stream before, between and behind its layers."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded, self.layers = loaded, _layers(loaded)
        self.seen: list[torch.Tensor] = []

    def run(self, rows: tuple[Row, ...], encoded: Sequence[Encoded]) -> "Grams":
        """Return [n, d] at each place; a layer that runs several times has as many places."""
        import torch

        parts = []
        for row in rows:  # one at a time: no padding to tell from tokens
            ids = torch.from_numpy(fill((row,), encoded).ids_bt).to(self.loaded.device)
            parts.append(self._once(ids))
        return [torch.cat(place) for place in zip(*parts, strict=True)]

    def _once(self, ids: "torch.Tensor") -> "Grams":
        import torch

        self.seen = []
        handles = [self.layers[0].register_forward_pre_hook(self._before, with_kwargs=True)]
        handles += [layer.register_forward_hook(self._behind) for layer in self.layers]
        try:
            with torch.inference_mode():
                self.loaded.model(input_ids=ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return self.seen

    def _before(self, _: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ANN401
        if not self.seen:
            self.seen.append((given[0] if given else named["hidden_states"])[0])

    def _behind(self, _: Any, __: Any, out: Any) -> None:  # noqa: ANN401
        self.seen.append((out[0] if isinstance(out, tuple) else out)[0])
