"""What must hold of every registered merge method; a new one comes under these by itself."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laws.bench import SHAPES, Family, book, count, fingerprint, spacing
from surgery.apply import apply
from surgery.method import find_method, method_names

NAMES = [name for name in method_names() if importlib.util.find_spec(f"reference.{name}")]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Beyond half a unit of the last place: the error of what is computed with, per input magnitude.
SLACK = {torch.bfloat16: 2**-21, torch.float16: 2**-21, torch.float32: 2**-45}


def cases(*, only=lambda name, params: True):
    return [
        pytest.param(name, params, id=f"{name}-{number}")
        for name in NAMES
        for number, params in enumerate(book(name).CASES)
        if only(name, params)
    ]


def returns_itself(name, params):
    return getattr(book(name), "returns_itself", lambda _: True)(params)


@pytest.mark.parametrize("name", method_names())
def test_a_method_has_a_reference_with_cases(name):
    assert book(name).CASES


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "params"), cases())
def test_it_is_its_float64_reference_rounded_once(tmp_path, name, params, dtype):
    family = Family(tmp_path / "f", find_method(name), DTYPES[dtype])
    expected = family.expected(params)
    merged = family.merged(params)
    slack = getattr(book(name), "SLACK", 1.0) * SLACK[DTYPES[dtype]]
    for tensor in SHAPES:
        inputs = [family.base[tensor], *(model[tensor] for model in family.models)]
        scale = max(float(held.abs().max()) for held in inputs)
        error = (merged[tensor].double() - expected[tensor]).abs()
        allowed = 0.5001 * spacing(expected[tensor], DTYPES[dtype]) + slack * scale
        worst = float((error / allowed).max())
        assert worst <= 1, f"{tensor}: {worst:.2f} of what one rounding allows"


@pytest.mark.parametrize(("name", "params"), cases())
def test_threads_and_slicing_do_not_show(tmp_path, name, params):
    family = Family(tmp_path / "f", find_method(name), torch.bfloat16)
    one = family.merged(params, workers=1)
    for workers in (2, 4):
        assert fingerprint(family.merged(params, workers=workers)) == fingerprint(one)
    if find_method(name).groups(params):
        return  # a statistic of the whole model
    has_base = find_method(name).base != "none"
    for tensor in SHAPES:
        place = family.place(tensor)
        whole = apply(
            find_method(name),
            [model[tensor] for model in family.models],
            base=family.base[tensor] if has_base else None,
            name=tensor,
            depth=place.depth,
            seed=place.seed,
            **params,
        )
        assert torch.equal(whole.bfloat16(), one[tensor]), tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "params"), cases(only=returns_itself))
def test_merging_a_model_with_itself_returns_its_bytes(tmp_path, name, params, dtype):
    family = Family(tmp_path / "f", find_method(name), DTYPES[dtype], same=True)
    assert fingerprint(family.merged(params)) == fingerprint(family.base)


@pytest.mark.parametrize(
    ("name", "params"), cases(only=lambda n, _: not hasattr(book(n), "ORDERED"))
)
def test_the_order_of_the_models_does_not_matter(tmp_path, name, params):
    method = find_method(name)
    family = Family(tmp_path / "f", method, torch.float32)
    one = family.merged(params)
    for order in list(itertools.permutations(range(count(method))))[1:3]:
        per_model = [n for n, p in method.parameters.items() if p.per_model]
        moved = {
            n: [v[i] for i in order] if n in per_model and isinstance(v, list) else v
            for n, v in params.items()
        }
        other = family.merged(moved, order=order, out="other")
        for tensor in SHAPES:
            assert torch.allclose(other[tensor], one[tensor], rtol=1e-6, atol=1e-6), tensor


ENDS = [
    pytest.param(name, params, which, id=f"{name}-{number}")
    for name in NAMES
    for number, (params, which) in enumerate(getattr(book(name), "ENDPOINTS", ()))
]


@pytest.mark.parametrize(("name", "params", "which"), ENDS)
def test_an_end_of_the_range_is_an_input(tmp_path, name, params, which):
    family = Family(tmp_path / "f", find_method(name), torch.bfloat16)
    wanted = family.base if which == "base" else family.models[which]
    assert fingerprint(family.merged(params)) == fingerprint(wanted)


SCRIPT = """
import sys, pathlib, torch
sys.path.insert(0, sys.argv[1])
from laws.bench import Family, book, fingerprint
from surgery.method import find_method, method_names
for name in method_names():
    family = Family(pathlib.Path(sys.argv[2]) / name, find_method(name), torch.bfloat16)
    for params in book(name).CASES:
        print(name, fingerprint(family.merged(params)))
"""


def test_hash_seeds_do_not_show(tmp_path):
    told = []
    for seed in ("0", "3"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1]), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert told[0]
    assert told[0] == told[1]
