"""Kernels of flash-linear-attention: taken where they agree with the torch forms, else refused."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.functional import logsigmoid

from surgery.linearize.methods import METHODS, full_spec
from surgery.linearize.parameters import Sizes
from surgery.models import linear_fla, linear_kernels
from surgery.models.linear_core import State
from surgery.models.linear_core import linear_attention as torch_attention
from surgery.models.linear_gated import GATED
from surgery.models.linear_kernels import delta_rule, linear_attention, use_kernels
from surgery.models.linear_mixers import MIXERS
from surgery.models.linear_seen import Past, Seen, Shape

B, H, R, K, V = 2, 2, 3, 5, 4
KINDS = ("none", "scalar", "vector", "delta")


def recurrence(q, k, v, *, decay, beta, scale, state):
    """A token at a time in the package's layout: [b, t, h, width], decay [b, t, h, k or 1]."""
    b, _, h, wide = q.shape
    state = q.new_zeros(b, h, wide, v.shape[-1]) if state is None else state
    outs = []
    for i in range(q.shape[1]):
        state = state * decay[:, i].exp()[..., None]
        new = v[:, i]
        if beta is not None:
            new = (new - torch.einsum("bhk,bhkv->bhv", k[:, i], state)) * beta[:, i][..., None]
        state = state + k[:, i][..., None] * new[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, i] * scale, state))
    return torch.stack(outs, 1), state


class Package:
    """Stands for the package: every kernel by the names and arguments that it has there."""

    def __init__(self):
        self.called = []

    def kernel(self, name):
        def run(*, q, k, v, scale, initial_state, output_final_state, beta=None, **more):
            self.called.append(name)
            assert all(x.is_contiguous() and x.dtype == torch.float32 for x in (q, k, v))
            assert output_final_state
            if "linear_attn" in name:
                assert more.pop("normalize") is False
            decay = more.pop("gk" if name == "fused_recurrent_gla" else "g", None)
            assert not more
            decay = torch.zeros_like(q[..., 0]) if decay is None else decay
            decay = decay if decay.dim() == 4 else decay[..., None]
            assert (decay.shape[-1] > 1) == name.endswith(("chunk_gla", "recurrent_gla"))
            return recurrence(q, k, v, decay=decay, beta=beta, scale=scale, state=initial_state)

        return run


@pytest.fixture
def package(monkeypatch):
    """The package as if it were installed, and its kernels as if they ran on a CPU."""
    made = Package()
    for kernel in linear_fla.FLA.values():
        module = ModuleType(kernel.place)
        for name in (kernel.chunk, kernel.step):
            setattr(module, name, made.kernel(name))
        monkeypatch.setitem(sys.modules, kernel.place, module)
    monkeypatch.setattr(linear_fla, "_READY", {})
    monkeypatch.setattr(linear_kernels, "DEVICES", ("cpu",))
    monkeypatch.setattr(linear_kernels, "installed", lambda: True)
    return made


def drawn(*shape):
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=made)


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


# -- the choice ------------------------------------------------------------------------------

SIZES = Sizes(hidden=12, heads=4, kv_heads=2, head_dim=6)
SHAPE = Shape(hidden=12, heads=4, kv_heads=2, head_dim=6, scale=6**-0.5)


def mixer(method, **more):
    torch.manual_seed(0)
    window = {"window": 4} if "window" in METHODS[method].options else {}
    spec = full_spec(METHODS[method], window, SIZES) | more
    made = {**MIXERS, **GATED}[method](spec, SHAPE)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made


def seen(t, docs=None):
    q, k, v = drawn(B, 2, 2, t, 6), drawn(B, 2, 1, t, 6), drawn(B, 2, 1, t, 6)
    return Seen(drawn(B, t, 12), q, k, v, q, k, docs)


SUMMING = {
    "lolcats": "none",
    "hedgehog": "none",
    "t2r": "none",
    "based": "none",
    "lizard": "scalar",
    "liger": "vector",
    "gla": "vector",
    "gated-delta": "delta",
}


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("method", SUMMING)
def test_a_mixer_takes_the_kernels_of_its_spec_in_every_mode(package, method, padded):
    own, other = mixer(method), mixer(method, kernels="fla")
    docs = torch.tensor([[0] * 9, [-1] * 3 + [0] * 6]) if padded else None
    with torch.no_grad():
        pasts = Past(), Past()
        for t in (9, 1, 5):
            given = seen(t, docs if t == 9 else None)
            wanted, found = own(given, pasts[0]), other(given, pasts[1])
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            assert bool(package.called) == (t != 9 or not padded)
    kernel = linear_fla.FLA[SUMMING[method]]
    assert {kernel.chunk, kernel.step} == set(package.called)


def test_every_method_that_sums_has_its_kernel():
    assert {*SUMMING, "swa-sink"} == set(METHODS)


def test_a_call_chooses_for_all_layers_and_back(package):
    model = torch.nn.ModuleList([mixer("gla"), mixer("gla")])
    use_kernels(model, "fla")
    assert [module.kernels for module in model] == ["fla", "fla"]
    use_kernels(model, "torch")
    assert [module.kernels for module in model] == ["torch", "torch"]


def test_an_unknown_choice_in_the_spec_is_refused():
    with pytest.raises(ValueError, match="kernels cuda is none of torch, fla"):
        mixer("gla", kernels="cuda")


@pytest.mark.parametrize(
    ("name", "devices", "there", "match"),
    [
        ("cuda", ("cpu",), True, "cuda is none of torch, fla"),
        ("fla", ("cuda",), True, "fla runs on CUDA, and the model is on cpu"),
        ("fla", ("cpu",), False, "flash-linear-attention is not installed"),
    ],
)
def test_a_call_that_cannot_be_met_is_refused(monkeypatch, name, devices, there, match):
    monkeypatch.setattr(linear_kernels, "DEVICES", devices)
    monkeypatch.setattr(linear_kernels, "installed", lambda: there)
    with pytest.raises(ValueError, match=match):
        use_kernels(mixer("gla"), name)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="the model has no linear layer"):
        use_kernels(torch.nn.Linear(2, 2), "torch")


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
