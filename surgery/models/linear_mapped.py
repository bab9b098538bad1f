"""Normalised linear attention over learned features.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, d head width, f features.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .linear_core import State
from .linear_features import MAPS, project
from .linear_kernels import linear_attention
from .linear_near import Near
from .linear_seen import Mixer, Past, Shape

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up


def kept_state(past: Past | None) -> State | None:
    """The sums over tokens before; None at the first."""
    kept = {} if past is None else past.tensors
    return State(kept["sums"], kept["doc"]) if "sums" in kept else None


def keep_state(state: State, past: Past | None) -> None:
    """Keep the sums over all tokens so far."""
    if past is not None:
        past.tensors |= {name: _own(kept) for name, kept in state._asdict().items()}


def _own(x: Tensor) -> Tensor:
    """A copy of what would hold more than itself."""
    # A compiler has no storages to ask; it leaves out copies that nobody needs.
    alone = not torch.compiler.is_compiling() and x.untyped_storage().nbytes() == x.nbytes
    return x if alone else x.clone()


def ratio(num: Tensor, den: Tensor) -> Tensor:
    """A quotient; 0 where a padded query sees nothing."""
    return num / den.masked_fill(den == 0, 1)


class Mapped(Mixer):
    """Keys and queries pass learned maps, of every query head its own."""

    def __init__(self, spec: Mapping[str, Any], shape: Shape) -> None:
        super().__init__(spec, shape)
        size = (shape.heads, shape.head_dim, spec["feature_dim"])
        self.query_map, self.key_map = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    def reset(self) -> None:
        """Begin with the identity, cut to the number of features."""
        with torch.no_grad():
            for weight in (self.query_map, self.key_map):
                weight.copy_(torch.eye(*weight.shape[1:]).expand_as(weight))

    def query_features(self, q: Tensor) -> Tensor:
        """Shapes: [b, h, r, t, d] to [b, h, r, t, f]."""
        return MAPS[self.spec["feature_map"]](project(q, self.query_map))

    def key_features(self, k: Tensor) -> Tensor:
        """Shapes: [b, h, 1, t, d] to [b, h, r, t, f]."""
        return MAPS[self.spec["feature_map"]](project(k, self.key_map))

    def sums(
        self, q: Tensor, keys: Near, q_docs: Tensor | None, past: Past | None, gate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Numerator [b, h, r, t, d] and denominator [b, h, r, t, 1] of linear attention.

        Where there are fewer keys than queries, the last key stands at the last query.
        """
        q, k = self.query_features(q), self.key_features(keys.k)
        wait = q.shape[3] - k.shape[3]
        v = pad(keys.v.to(k.dtype), (0, 1, wait, 0), value=1.0)  # a column of ones
        k = pad(k, (0, 0, wait, 0))
        docs = None if keys.docs is None else pad(keys.docs, (wait, 0), value=-1)
        state = kept_state(past)
        out, state = linear_attention(
            q, k, v, gate, kernels=self.kernels, state=state, q_docs=q_docs, k_docs=docs
        )
        keep_state(state, past)
        return out[..., :-1], out[..., -1:]
