"""What is kept of the last tokens, and of the first ones of a document.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, d head width, n anchors.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .linear_core import Anchors, Windowed, window_attention
from .linear_seen import Past, Seen

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
SINKS = ("sink_keys", "sink_values", "sink_docs", "sink_slots")


class Near(NamedTuple):
    """Keys and values of a pass, behind those kept from before.

    Attributes:
        k, v: [b, h, 1, lead + t, d].
        docs: int64 [b, lead + t], -1 where there is no token; None: all are of document 0.
        lead: how many came before.
    """

    k: Tensor
    v: Tensor
    docs: Tensor | None
    lead: int

    @property
    def q_docs(self) -> Tensor | None:
        """Documents of the tokens of this pass."""
        return None if self.docs is None else self.docs[:, self.lead :]

    def attend(
        self, q: Tensor, *, window: int, scale: float, anchors: Anchors | None = None
    ) -> Windowed:
        """Softmax attention of [b, h, r, t, d] over the window."""
        return window_attention(
            q,
            self.k,
            self.v,
            window=window,
            scale=scale,
            lead=self.lead,
            q_docs=self.q_docs,
            k_docs=self.docs,
            anchors=anchors,
        )

    def gone(self, window: int) -> "Near":
        """The keys that leave the window of a query of this pass; the last query's is the last."""
        count = max(self.k.shape[3] - window, 0)
        docs = None if self.docs is None else self.docs[:, :count]
        return Near(self.k[:, :, :, :count], self.v[:, :, :, :count], docs, 0)


def near(k: Tensor, seen: Seen, past: Past | None, *, keep: int) -> Near:
    """Put what was kept before the keys of this pass, and keep the last `keep` of all.

    There is room for `keep` tokens from the first on: the size of what is kept never changes.

    Args:
        k: [b, h, 1, t, d], rotated or not.
    """
    if past is None:
        return Near(k, seen.v, seen.docs, 0)
    kept, lead, v, docs = past.tensors, 0, seen.v, documents(seen)
    if "keys" in kept:
        k, v = torch.cat((kept["keys"], k), 3), torch.cat((kept["values"], v), 3)
        docs, lead = torch.cat((kept["docs"], docs), 1), keep
    short = max(keep - k.shape[3], 0)
    rest = slice(k.shape[3] + short - keep, None)
    # Copies: a view would hold the whole text.
    kept["keys"], kept["values"] = (pad(x, (0, 0, short, 0))[:, :, :, rest].clone() for x in (k, v))
    kept["docs"] = pad(docs, (short, 0), value=-1)[:, rest].clone()
    return Near(k, v, docs if lead or seen.docs is not None else None, lead)


def documents(seen: Seen) -> Tensor:
    """The number of each token's document, [b, t]."""
    if seen.docs is not None:
        return seen.docs
    return torch.zeros(seen.v.shape[0], seen.v.shape[3], dtype=torch.long, device=seen.v.device)


def first_tokens(seen: Seen, past: Past | None, *, count: int, lead: int) -> Anchors:
    """The first `count` tokens of every document of this pass; those of the last one are kept.

    Args:
        lead: how many keys stand before those of this pass.
    """
    kept = past.tensors if past is not None else {}
    docs = documents(seen)
    earlier = kept.get("sink_docs", docs.new_full((docs.shape[0], 1), -1))
    first = (docs >= 0) & (_rank(docs, earlier) < count)
    # One number read from the device a pass of packed or padded rows, none otherwise.
    most = count if seen.docs is None else max(int(first.sum(1).max()), 1)
    slots = torch.arange(docs.shape[1], device=docs.device).expand_as(docs)
    found = _picked(Anchors(seen.k_rope, seen.v, docs, slots), first, most)
    if SINKS[0] in kept:
        found = _joined(Anchors(*(kept[name] for name in SINKS)), found)
    if past is not None:
        own = (found.docs >= 0) & (found.docs == found.docs.amax(1, keepdim=True))
        last = _padded(_picked(found, own, count), count)
        last = last._replace(slots=last.slots - docs.shape[1])  # from the next token on
        kept |= dict(zip(SINKS, last, strict=True))
    return found._replace(slots=found.slots + lead)


def _rank(docs: Tensor, earlier: Tensor) -> Tensor:
    """How many tokens of its document come before each; at least those that are kept."""
    real = docs >= 0
    at = real.long().cumsum(1) - 1
    held = earlier.amax(1, keepdim=True)
    before = torch.cat((held, docs), 1).cummax(1).values[:, :-1]
    begun = torch.where(docs > before, at, 0).cummax(1).values
    return at - begun + (docs == held) * (earlier >= 0).sum(1, keepdim=True)


def _picked(given: Anchors, which: Tensor, most: int) -> Anchors:
    """Those of `which`, in order, at most so many."""
    places = (~which).long().argsort(dim=1, stable=True)[:, :most]
    index = places[:, None, None, :, None].expand(-1, given.k.shape[1], 1, -1, given.k.shape[-1])
    docs = given.docs.masked_fill(~which, -1).gather(1, places)
    slots = given.slots.gather(1, places)
    return Anchors(given.k.gather(3, index), given.v.gather(3, index), docs, slots)


def _joined(one: Anchors, other: Anchors) -> Anchors:
    k, v = torch.cat((one.k, other.k), 3), torch.cat((one.v, other.v), 3)
    return Anchors(
        k, v, torch.cat((one.docs, other.docs), 1), torch.cat((one.slots, other.slots), 1)
    )


def _padded(given: Anchors, count: int) -> Anchors:
    short = count - given.docs.shape[1]
    k, v = (pad(x, (0, 0, 0, short)) for x in (given.k, given.v))
    return Anchors(k, v, pad(given.docs, (0, short), value=-1), pad(given.slots, (0, short)))
