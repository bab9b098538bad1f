"""The window plan: every token once, with the most context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import RecipeError
from surgery.evaluate.windows import Window, plan_windows


@st.composite
def plans(draw: Callable[..., Any]) -> dict[str, Any]:
    context = draw(st.integers(1, 40))
    return {
        "tokens": draw(st.integers(0, 200)),
        "context": context,
        "stride": draw(st.integers(1, context)),
        "given": draw(st.integers(1, 60)),
        "sink": draw(st.booleans()),
    }


def windows_of(plan: dict[str, Any]) -> list[Window]:
    asked = dict(plan)
    return list(plan_windows(asked.pop("tokens"), **asked))


def fed(window: Window) -> list[int]:
    """The numbers of the tokens that a window feeds, written out."""
    return [0] * window.sink + list(range(window.begin, window.end - 1))


@settings(deadline=None)
@given(plans())
def test_every_token_but_the_given_ones_is_scored_once(plan: dict[str, Any]) -> None:
    scored = [t for w in windows_of(plan) for t in range(w.score_from, w.end)]
    assert scored == list(range(plan["given"], plan["tokens"]))


@settings(deadline=None)
@given(plans())
def test_a_token_is_predicted_from_the_one_before_it(plan: dict[str, Any]) -> None:
    for window in windows_of(plan):
        for token in range(window.score_from, window.end):
            before = fed(window)[: window.position(token) + 1]
            # Right behind a repeated mark stands the first token of the window.
            expected = 0 if window.sink and token == window.begin else token - 1
            assert before[-1] == expected


@settings(deadline=None)
@given(plans())
def test_no_window_feeds_more_than_the_context(plan: dict[str, Any]) -> None:
    for window in windows_of(plan):
        assert window.width == len(fed(window)) <= plan["context"]


@settings(deadline=None)
@given(plans())
def test_every_window_reaches_back_as_far_as_the_context_allows(plan: dict[str, Any]) -> None:
    for window in windows_of(plan):
        assert window.begin == 0 or window.width == plan["context"]


@settings(deadline=None)
@given(plans())
def test_a_token_has_all_before_it_or_what_the_stride_leaves(plan: dict[str, Any]) -> None:
    for window in windows_of(plan):
        for token in range(window.score_from, window.end):
            context = window.position(token) + 1
            assert context >= min(token, plan["context"] - plan["stride"] + 1)


@settings(deadline=None)
@given(plans())
def test_the_mark_leads_every_window_that_asks_for_it(plan: dict[str, Any]) -> None:
    for window in windows_of(plan):
        assert (fed(window)[0] == 0) or not plan["sink"]


def test_a_stride_of_one_gives_every_token_the_full_context() -> None:
    for window in plan_windows(50, context=8, stride=1):
        for token in range(window.score_from, window.end):
            assert window.position(token) + 1 == min(token, 8)


@pytest.mark.parametrize(
    ("context", "stride", "fact"),
    [(0, 1, "0 tokens is no context"), (4, 0, "0 is outside"), (4, 5, "5 is outside 1 to 4")],
)
def test_windows_that_leave_tokens_out_are_refused(context: int, stride: int, fact: str) -> None:
    with pytest.raises(RecipeError, match=fact):
        list(plan_windows(10, context=context, stride=stride))
