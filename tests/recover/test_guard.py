"""Which steps are taken, which are skipped, and when a run goes back."""

from __future__ import annotations

import json
import math

import pytest

from surgery.errors import RecipeError, TrainError
from surgery.recover.guard import Guard

NAN, INF = math.nan, math.inf


def judged(guard: Guard, losses: list[float], norm: float = 1.0) -> list[str]:
    return [guard.judge(loss, norm) for loss in losses]


@pytest.mark.parametrize(
    ("loss", "norm"), [(NAN, 1), (INF, 1), (-INF, 1), (1, NAN), (1, INF), (NAN, NAN)]
)
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss: float, norm: float) -> None:
    assert Guard().judge(loss, norm) == "skip"


@pytest.mark.parametrize(("loss", "verdict"), [(8.0, "take"), (8.01, "skip"), (0.0, "take")])
def test_a_loss_is_measured_by_the_mean_of_those_taken(loss: float, verdict: str) -> None:
    guard = Guard(4.0)
    judged(guard, [1.0, 3.0] * 4)
    assert guard.judge(loss, 1.0) == verdict


def test_a_large_finite_norm_is_left_to_clipping() -> None:
    guard = Guard()
    judged(guard, [1.0] * 8)
    assert guard.judge(1.0, 1e9) == "take"


def test_nothing_is_a_spike_before_eight_losses_are_known() -> None:
    assert judged(Guard(), [1.0] * 7 + [100.0]) == ["take"] * 8


def test_the_mean_is_of_the_window_alone() -> None:
    guard = Guard(2.0, window=8)
    judged(guard, [100.0] * 8)
    assert judged(guard, [1.0] * 8 + [3.0]) == ["take"] * 8 + ["skip"]


def test_a_skipped_loss_does_not_raise_the_mean() -> None:
    guard = Guard(4.0)
    judged(guard, [1.0] * 8)
    assert judged(guard, [50.0, 4.1]) == ["skip", "skip"]


def test_a_factor_of_zero_looks_at_finiteness_alone() -> None:
    guard = Guard(0)
    judged(guard, [1.0] * 8)
    assert judged(guard, [1e9, NAN]) == ["take", "skip"]


def test_losses_below_zero_are_never_spikes() -> None:
    guard = Guard(4.0)
    judged(guard, [-1.0] * 8)
    assert guard.judge(-0.5, 1.0) == "take"


def test_patience_counts_skips_in_a_row() -> None:
    guard = Guard(patience=3)
    assert judged(guard, [NAN, NAN, 1.0, NAN, NAN, NAN]) == [
        "skip", "skip", "take", "skip", "skip", "roll back",
    ]  # fmt: skip
    assert (guard.skipped, guard.rollbacks) == (5, 1)


def test_the_mean_starts_anew_after_going_back() -> None:
    guard = Guard(4.0, patience=1)
    judged(guard, [1.0] * 8)
    assert judged(guard, [9.0, 9.0]) == ["roll back", "take"]


def test_a_run_that_went_back_in_vain_ends_in_one_sentence() -> None:
    guard = Guard(patience=2)
    judged(guard, [NAN] * 3)
    with pytest.raises(TrainError, match=r"no step can be taken.*loss nan.*; lower --lr"):
        guard.judge(NAN, 1.0)


def test_a_step_taken_after_going_back_allows_going_back_again() -> None:
    guard = Guard(patience=1)
    assert judged(guard, [NAN, 1.0, NAN]) == ["roll back", "take", "roll back"]


@pytest.mark.parametrize("at", range(24))
def test_a_guard_restored_from_json_judges_on_alike(at: int) -> None:
    losses = [1.1, 0.9, NAN, 1.3, 0.7, 1.0, 1.2, 0.1, 1 / 3, 0.8, 9.0, 9.0, 9.0, 9.0]
    losses += [1.0, NAN, NAN, NAN, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    whole = judged(Guard(4.0, patience=3, window=8), losses)
    first, second = Guard(4.0, patience=3, window=8), Guard(4.0, patience=3, window=8)
    before = judged(first, losses[:at])
    second.restore(json.loads(json.dumps(first.state())))
    assert before + judged(second, losses[at:]) == whole
    assert second.skipped == sum(verdict != "take" for verdict in whole)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"spike_factor": 0.5}, "--spike 0.5"),
        ({"spike_factor": NAN}, "--spike nan"),
        ({"spike_factor": -1.0}, "--spike -1"),
        ({"patience": 0}, "patience 0"),
        ({"window": 0}, "window 0"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(options: dict[str, float], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Guard(**options)  # type: ignore[arg-type]
