"""A mixer is one function: in pieces, padded, packed, whatever follows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from linearize.mixer_inputs import (
    TIGHT,
    cuts,
    in_pieces,
    methods,
    mixer,
    part,
    seen,
)
from surgery.models.linear_seen import Past, Seen

T = 75  # longer than a chunk, and no multiple of anything


@methods
@pytest.mark.parametrize("pieces", [[1] * T, [T - 1, 1], [70, 5], *(cuts(T, n) for n in range(3))])
@torch.no_grad()
def test_pieces_are_the_whole(name, pieces):
    made = mixer(name)
    given = seen(made, T)
    torch.testing.assert_close(in_pieces(made, given, pieces), made(given, None), **TIGHT)


@methods
@pytest.mark.parametrize("gone", [(0, 3), (5, 20), (T - 1, 1)])
@pytest.mark.parametrize("pieces", [[T], [22] + [1] * (T - 22), *(cuts(T, n) for n in range(3))])
@torch.no_grad()
def test_padding_on_the_left_does_not_count(name, gone, pieces):
    made = mixer(name)
    given = seen(made, T)
    docs = torch.where(torch.arange(T) >= torch.tensor(gone)[:, None], 0, -1)
    found = in_pieces(made, given, pieces, docs)
    assert torch.isfinite(found).all()
    for row, n in enumerate(gone):
        alone = made(part(given, slice(n, T)), None)[row]
        torch.testing.assert_close(found[row, n:], alone, **TIGHT)


@methods
@torch.no_grad()
def test_after_a_padded_prompt_nobody_tells_documents(name):
    made, t = mixer(name), 30
    given = seen(made, t)
    docs = torch.where(torch.arange(t) >= torch.tensor([4, 0])[:, None], 0, -1)
    past = Past()
    made(part(given, slice(0, 6), docs[:, :6]), past)
    past.length += 6
    found = made(part(given, slice(6, t)), past)
    whole = made(part(given, slice(0, t), docs), None)
    torch.testing.assert_close(found, whole[:, 6:], **TIGHT)


PACKED = [(0, 2, 33, T), (0, 1, 2, 3, 40, 64, T), (0, 30, 31, T)]


@methods
@pytest.mark.parametrize("borders", PACKED)
@pytest.mark.parametrize("pieces", [None, *(cuts(T, n, longest=30) for n in range(3)), [1] * T])
@torch.no_grad()
def test_packed_documents_do_not_see_one_another(name, borders, pieces):
    made = mixer(name)
    given = seen(made, T)
    docs = torch.zeros(2, T, dtype=torch.int64)
    for border in borders[1:-1]:
        docs[:, border:] += 1
    docs[1, :1] = -1  # and padding before the first
    if pieces is None:
        found = made(part(given, slice(None), docs), None)
    else:
        found = in_pieces(made, given, pieces, docs)
    for start, end in pairwise(borders):
        for row in range(2):
            own = slice(max(start, row), end)
            if own.start < end:
                alone = made(part(given, own), None)[row]
                torch.testing.assert_close(found[row, own], alone, **TIGHT)


@methods
@torch.no_grad()
def test_what_follows_changes_nothing(name):
    made = mixer(name)
    given, other = seen(made, 90), seen(made, 90, seed=2)
    mixed = [
        torch.cat((getattr(given, n)[..., :41, :], getattr(other, n)[..., 41:, :]), -2)
        for n in ("x", "q", "k", "v", "q_rope", "k_rope")
    ]
    first = made(given, None)[:, :41]
    assert torch.equal(made(Seen(*mixed, None), None)[:, :41], first)
    torch.testing.assert_close(made(part(given, slice(0, 41)), None), first, **TIGHT)
