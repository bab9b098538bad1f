"""Linear expressions of models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import RecipeError
from surgery.expression import parse_expression


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", {"a": 1.0}),
        ("new + 0.8*(tuned - old)", {"new": 1.0, "tuned": 0.8, "old": -0.8}),
        ("c + (b - a)", {"c": 1.0, "b": 1.0, "a": -1.0}),
        ("(a + b + c) / 3", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("-a + 2*-b", {"a": -1.0, "b": -2.0}),
        ("a*.5 + a*5e-1", {"a": 1.0}),
        ("0.1*a + 0.2*a", {"a": 0.3}),
        ("a - a + b", {"a": 0.0, "b": 1.0}),
        ("2 * (3 - 1) * a / 4", {"a": 1.0}),
        ("a + 1 - 1", {"a": 1.0}),
        (" tuned_v2\n+ old ", {"tuned_v2": 1.0, "old": 1.0}),
        ("+a", {"a": 1.0}),
    ],
)
def test_each_model_gets_its_coefficient(text: str, expected: dict[str, float]) -> None:
    assert parse_expression(text) == expected
    assert list(parse_expression(text)) == list(expected)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "ends where a name, a number or a parenthesis should be"),
        ("a +", "ends where a name"),
        ("a b", "'b' at character 3 stands where an operator"),
        ("(a + b", "ends where a closing parenthesis should be"),
        ("a + b)", "')' at character 6 stands where an operator"),
        ("2a", "'2a' at character 1 stands where a name, a number or an operator"),
        ("a ** 2", "'*' at character 4 stands where"),
        ("a * b", "multiplies models with each other (a and b)"),
        ("1 / a", "divides by zero or by a model at character 5"),
        ("a / 0", "divides by zero"),
        ("a / (1 - 1)", "divides by zero"),
        ("a + 0.5", "adds the number 0.5 to models"),
        ("3 - 2", "names no model"),
        ("a + org/model", "divides by zero or by a model"),
        ("a @ b", "'@' at character 3"),
        ("a[0]", "'[0]' at character 2"),
        ("1e999 * a", "'1e999' at character 1"),
        ("(" * 60 + "a" + ")" * 60, "nested more than 50 deep"),
        ("-" * 60 + "a", "nested more than 50 deep"),
        ("a" * 3000, "2000 are read"),
        ("*".join(["1e99"] * 4) + "*a", "too large"),
    ],
)
def test_what_is_no_sum_of_models_is_refused_where_it_stops(text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_expression(text)
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.text(alphabet="ab12.e+-*/() _", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_expression(text)
    except RecipeError:
        return
    assert found
    assert all(isinstance(value, float) for value in found.values())


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(-9, 9), min_size=1))
def test_a_written_sum_reads_back(terms: dict[str, float]) -> None:
    text = " + ".join(f"({value:.6f}) * {name}" for name, value in terms.items())
    assert parse_expression(text) == {n: float(f"{v:.6f}") for n, v in terms.items()}
