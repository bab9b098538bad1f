"""Gates: what they may say, what they decide, and what is no gate."""

from __future__ import annotations

import pytest

from surgery.errors import RecipeError
from surgery.evaluate.gates import decide, parse_gate


@pytest.mark.parametrize(
    ("text", "value", "parent", "holds"),
    [
        ("bpb<parent*1.02", 1.01, 1.0, True),
        ("bpb<parent*1.02", 1.02, 1.0, False),
        ("bpb <= parent * 102%", 1.02, 1.0, True),
        ("kl<0.05", 0.04, None, True),
        ("top1>90%", 0.9, None, False),
        ("top1>=90%", 0.9, None, True),
        ("ppl<(parent+1)*2-1/2", 3.4, 1.0, True),
        ("ppl<-(1-parent)", 0.5, 2.0, True),
        ("acc:quiz>=parent-1e-2", 0.5, 0.505, True),
        ("acc:'a-b/c'>0", 0.5, None, True),
    ],
)
def test_a_gate_is_decided(text: str, value: float, parent: float | None, holds: bool) -> None:
    gate = parse_gate(text)
    figures, parents = {gate.metric: value}, {gate.metric: parent}
    (found,) = decide([gate], "child", figures, parent="base", parents=parents)
    assert found.holds is holds
    assert ("holds" if holds else "fails") in found.sentence
    assert "child beside base" in found.sentence


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("", "is no limit for a figure"),
        ("bpb", "is no limit for a figure"),
        ("bpb=1", "is no limit for a figure"),
        ("loss<1", "loss is not a figure"),
        ("bpb<", "ends too early"),
        ("bpb<parent*", "ends too early"),
        ("bpb<(parent", "ends too early"),
        ("bpb<1 2", "stops making sense at '2'"),
        ("bpb<parents", "stops making sense"),
        ("bpb<__import__('os')", "stops making sense"),
        ("bpb<1.2.3", "stops making sense"),
        ("bpb<1/0", "divides by zero"),
        ("bpb<" + "(" * 40 + "1" + ")" * 40, "nested too deep"),
        ("bpb<" + "1+" * 400 + "1", "is no limit"),
    ],
)
def test_what_is_no_gate_is_refused_in_one_sentence(text: str, fact: str) -> None:
    with pytest.raises(RecipeError, match="--gate") as error:
        parse_gate(text)
    assert fact in str(error.value)
    assert "\n" not in str(error.value)


def test_a_figure_that_is_not_there_cannot_hold() -> None:
    (found,) = decide([parse_gate("kl<1")], "child", {})
    assert not found.holds
    assert "cannot be decided" in found.sentence
