"""The order of steps is checked, and what is wrong with it is said."""

import pytest

from surgery.errors import RecipeError
from surgery.pipeline.graph import check_order, users


def test_steps_in_order_pass():
    check_order({"a": (), "b": ("a",), "c": ("a", "b")})


@pytest.mark.parametrize(
    ("uses", "told"),
    [
        ({"a": ("a",)}, "a: uses its own output"),
        ({"a": ("b",), "b": ("a",)}, "a: uses 'b', which uses 'a'; no order"),
        ({"x": (), "a": ("b",), "b": ("c",), "c": ("a", "x")}, "uses 'b', which uses 'c', which"),
        ({"a": ("b",), "b": ()}, "a: uses 'b', which is defined only after it; move 'b' above 'a'"),
        ({"z": ("a",), "a": ("b",), "b": ("a",)}, "a: uses 'b', which uses 'a'"),
    ],
)
def test_what_cannot_be_ordered_is_refused(uses, told):
    with pytest.raises(RecipeError) as error:
        check_order(uses)
    assert told in str(error.value)


def test_a_long_chain_is_no_circle():
    names = [str(n) for n in range(5000)]
    check_order({name: tuple(names[n - 1 : n]) for n, name in enumerate(names)})


def test_users_are_those_who_name_it():
    assert users({"a": (), "b": ("a",), "c": ("b", "a")}, "a") == ("b", "c")
