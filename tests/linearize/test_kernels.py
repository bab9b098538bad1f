"""Kernels of flash-linear-attention: taken where they agree with the torch forms, else refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn.functional import logsigmoid

from linearize.kernel_stand_ins import B, drawn
from surgery.models import linear_fla, linear_kernels
from surgery.models.linear_core import State
from surgery.models.linear_core import linear_attention as torch_attention
from surgery.models.linear_kernels import delta_rule, linear_attention

H, R, K, V = 2, 3, 5, 4
KINDS = ("none", "scalar", "vector", "delta")


def inputs(kind, t, *, shared=True):
    """Arguments of `linear_attention`, or of `delta_rule`."""
    r = 1 if shared else R
    q, k, v = drawn(B, H, R, t, K), drawn(B, H, r, t, K) / K**0.5, drawn(B, H, 1, t, V)
    gate = {"none": None, "vector": drawn(B, H, r, t, K)}.get(kind, drawn(B, H, 1, t, 1))
    gate = None if gate is None else logsigmoid(gate)
    return (q, k, v, gate, drawn(B, H, 1, t, 1).sigmoid()) if kind == "delta" else (q, k, v, gate)


def run(given, kernels, **options):
    function = linear_attention if len(given) == 4 else delta_rule
    return function(*given, kernels=kernels, **options)


def same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].sums, wanted[1].sums, atol=1e-4, rtol=1e-4)
    assert found[1].doc.tolist() == wanted[1].doc.tolist()


# -- the same function -----------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kernel_goes_on_from_the_torch_form_and_back(package, kind, shared):
    for t, last in ((9, linear_fla.FLA[kind].chunk), (1, linear_fla.FLA[kind].step)):
        before = run(inputs(kind, 6, shared=shared), "torch")[1]
        given = inputs(kind, t, shared=shared)
        found = run(given, "fla", state=before)
        assert package.called[-1] == last
        same(found, run(given, "torch", state=before))
        same(run(given, "torch", state=found[1]), run(given, "fla", state=found[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_from_nothing(package, kind):
    given = inputs(kind, 7)
    same(run(given, "fla"), run(given, "torch"))
    assert package.called


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_torch_form(package, kind):
    grads = []
    for kernels in ("torch", "fla"):
        given = [None if x is None else x.clone().requires_grad_() for x in inputs(kind, 7)]
        out, state = run(tuple(given), kernels)
        (out.square().sum() + state.sums.sum()).backward()
        grads.append([x.grad for x in given if x is not None])
    assert package.called
    for wanted, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["none", "scalar", "vector"])
@pytest.mark.parametrize("before", [True, False])
def test_keys_that_are_padding_count_for_nothing(package, kind, before):
    given = list(inputs(kind, 7))
    docs = torch.tensor([[-1, -1, 0, 0, 0, 0, 0], [-1] * 7])
    given[1] = given[1].masked_fill((docs < 0)[:, None, None, :, None], torch.inf)
    state = torch_attention(*inputs(kind, 5))[1] if before else None
    options = {"state": state, "k_docs": docs}
    same(run(tuple(given), "fla", **options), run(tuple(given), "torch", **options))
    assert package.called


def test_a_state_shared_by_query_heads_is_stored_once(package):
    for t in (1, 9):
        _, state = run(inputs("vector", t), "fla")
        assert state.sums.shape == (B, H, 1, K, V)
        assert state.sums.untyped_storage().nbytes() == state.sums.nbytes


# -- when the torch form runs ----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["off", "packed", "float64", "elsewhere", "not installed"])
def test_the_torch_form_runs_where_kernels_do_not_apply(package, monkeypatch, kind, case):
    given, options = inputs(kind, 7), {}
    if case == "packed":
        docs = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * B)
        options = {"docs": docs} if kind == "delta" else {"q_docs": docs, "k_docs": docs}
    if case == "float64":
        given = tuple(None if x is None else x.double() for x in given)
    if case == "elsewhere":
        monkeypatch.setattr(linear_kernels, "DEVICES", ("cuda",))
    if case == "not installed":
        monkeypatch.setattr(linear_kernels, "installed", lambda: False)
    found = run(given, "torch" if case == "off" else "fla", **options)
    wanted = run(given, "torch", **options)
    assert not package.called
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].sums, wanted[1].sums)


# -- the check -------------------------------------------------------------------------------


def replace(monkeypatch, name, change):
    """Change what one kernel returns."""
    place = next(k.place for k in linear_fla.FLA.values() if name in {k.chunk, k.step})
    right = getattr(sys.modules[place], name)
    monkeypatch.setattr(sys.modules[place], name, change(right))


def scaled(right):
    return lambda **given: right(**{**given, "scale": given["q"].shape[-1] ** -0.5})


def turned(right):
    def wrong(**given):
        out, state = right(**given)
        return out, state.mT.contiguous().view(state.shape)

    return wrong


def ungated(right):
    return lambda **given: right(
        **{**given, **{n: given[n] * 0 for n in ("g", "gk") if n in given}}
    )


def stuck(right):
    def wrong(**given):
        out, state = right(**{**given, "k": given["k"].detach() + 0 * given["k"]})
        return out, state

    return wrong


def infinite(right):
    return lambda **given: tuple(x * torch.nan for x in right(**given))


@pytest.mark.parametrize(
    ("kind", "change", "what"),
    [
        ("none", scaled, "out"),
        ("scalar", ungated, "out"),
        ("vector", turned, "sums"),
        ("vector", stuck, "the gradient of k"),
        ("delta", infinite, "out"),
    ],
)
def test_a_kernel_that_computes_something_else_is_refused(package, monkeypatch, kind, change, what):
    name = linear_fla.FLA[kind].chunk
    replace(monkeypatch, name, change)
    given = tuple(None if x is None else x.requires_grad_() for x in inputs(kind, 9))
    for _ in range(2):  # not only the first time
        with pytest.raises(
            ValueError, match=rf"{name} differs .* in {what}, .*: take kernels torch"
        ):
            run(given, "fla")


def test_a_step_that_computes_something_else_is_refused(package, monkeypatch):
    replace(monkeypatch, "fused_recurrent_gla", ungated)
    with pytest.raises(ValueError, match="fused_recurrent_gla differs from the torch form"):
        run(inputs("vector", 1), "fla")


def test_a_kernel_of_other_shapes_is_refused(package, monkeypatch):
    replace(monkeypatch, "chunk_gla", lambda right: lambda **given: right(**given)[::-1])
    with pytest.raises(ValueError, match="chunk_gla does not run here"):
        run(inputs("vector", 9), "fla")


def test_a_package_that_lacks_a_kernel_is_refused(package, monkeypatch):
    monkeypatch.delattr(sys.modules["fla.ops.gla"], "chunk_gla")
    with pytest.raises(ValueError, match="lacks chunk_gla"):
        run(inputs("vector", 9), "fla")


def test_a_kernel_is_checked_once_for_a_shape(package):
    for _ in range(3):
        run(inputs("vector", 9), "fla")
    assert package.called == ["chunk_gla"] * 4  # the check, and three passes
    run(inputs("vector", 9, shared=False), "fla")
    assert len(package.called) == 6


def test_the_check_draws_nothing_from_the_global_source(package):
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    with torch.inference_mode():
        run(inputs("vector", 9), "fla")
    assert torch.equal(torch.rand(3), wanted)


# -- the package itself ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1, 300])
def test_the_real_kernels_compute_the_torch_form(kind, shared, t):
    pytest.importorskip("fla.ops.gla")
    given = tuple(None if x is None else x.cuda() for x in inputs(kind, t, shared=shared))
    states = max(x.shape[2] for x in given[1:] if x is not None)
    sums = drawn(B, H, states, K, V).cuda()
    state = State(sums, torch.zeros(B, dtype=torch.long, device="cuda"))
    found, wanted = (run(given, kernels, state=state) for kernels in ("fla", "torch"))
    for one, other in ((found[0], wanted[0]), (found[1].sums, wanted[1].sums)):
        assert float((one - other).norm() / other.norm()) < linear_fla.OUTPUTS
