"""`surgery merge expr`: expressions of models on the trained fixtures, and wrong ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli.main import main

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = ("base", "uni", "arith", "v2")


def words(expression, *names):
    return ["merge", "expr", expression, *(f"--model={n}={FIXTURES / n}" for n in names)]


@pytest.mark.parametrize(
    ("expression", "factors"),
    [
        ("v2 + 0.8 * (uni - base)", {"v2": 1, "uni": 0.8, "base": -0.8}),
        ("arith + (uni - base)", {"arith": 1, "uni": 1, "base": -1}),
        ("(uni + arith) / 2", {"uni": 0.5, "arith": 0.5}),
        ("2 * uni - base", {"uni": 2, "base": -1}),
    ],
)
def test_it_is_what_the_expression_says(tmp_path, expression, factors):
    assert main([*words(expression, *factors), "-o", str(tmp_path / "out")]) == 0
    held = {n: load_file(FIXTURES / n / "model.safetensors") for n in factors}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        wanted = sum(f * held[n][name].double() for n, f in factors.items()).bfloat16()
        assert torch.allclose(tensor.double(), wanted.double(), rtol=2**-7, atol=1e-6), name


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (words("uni - bass", "uni", "base"), "say what it is: --model bass=PATH"),
        (words("uni", "uni", "base"), "--model base: is not in the expression"),
        (words("uni * base", "uni", "base"), "EXPRESSION"),
        ([*words("uni", "uni"), "--model", "uni=x"], "says a second time what uni is"),
        ([*words("uni", "uni"), "--model", "x"], "is not of the form NAME=MODEL"),
    ],
)
def test_a_wrong_expression_is_told_in_a_sentence(tmp_path, capsys, given, told):
    assert main([*given, "-o", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
