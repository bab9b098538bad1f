"""Losses in chunks equal the plain forms that hold all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.errors import RecipeError
from surgery.recover.fused import TeacherHidden, TeacherTopK
from surgery.recover.heads import Head
from surgery.recover.hidden import layer_map, make_projector
from surgery.recover.losses import Objective

TOKENS, WIDTH, WORDS, TOP = 23, 12, 41, 7


def naive_divergence(name: str, logq: Tensor, logp: Tensor) -> Tensor:
    """The textbook sums, with gradients left to autograd."""
    q, p = logq.exp(), logp.exp()
    if name == "kl":
        return (p * (p.log() - logq)).sum()
    if name == "rkl":
        return (q * (logq - p.log())).sum()
    if name == "tvd":
        return (p - q).abs().sum() / 2
    mean = (p + q) / 2
    return ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()) / 2


def naive(  # noqa: PLR0917 - as an objective, and the temperature
    weights: dict[str, float],
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher: TeacherHidden | TeacherTopK | None,
    temperature: float = 1.0,
) -> Tensor:
    """All logits at once."""
    keep = targets >= 0
    logits = head.logits(hidden[keep])
    total = logits.new_zeros(())
    logq = (logits / temperature).log_softmax(-1)
    if isinstance(teacher, TeacherTopK):
        ids = teacher.ids[keep]
        rest = torch.ones_like(logq).scatter(1, ids, 0.0)
        tail = (logq.exp() * rest).sum(-1, keepdim=True).log()
        logq = torch.cat([logq.gather(1, ids), tail], -1)
        logp = torch.cat([teacher.logits, teacher.tail[:, None]], -1)[keep].log_softmax(-1)
    elif teacher is not None:
        logp = (teacher.head.logits(teacher.hidden[keep]) / temperature).log_softmax(-1)
    for name, weight in weights.items():
        if name == "ce":
            value = nn.functional.cross_entropy(logits, targets[keep], reduction="sum")
        else:
            value = naive_divergence(name, logq, logp) * temperature**2
        total = total + weight * value
    return total


def make_head(seed: int, *, width: int = WIDTH, dtype: Any = torch.float64, **kind: Any) -> Head:
    """A random head; `bias` asks for one."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(WORDS, width, generator=draw, dtype=torch.float64).to(dtype)
    bias = torch.randn(WORDS, generator=draw, dtype=torch.float64).to(dtype)
    own = bias.requires_grad_() if kind.pop("bias", False) else None
    return Head(weight.requires_grad_(), own, **kind)


def make_batch(dtype: Any = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw, dtype=torch.float64).to(dtype)
    targets = torch.randint(WORDS, (TOKENS,), generator=draw)
    targets[[0, 5, 6, 22]] = -100
    return hidden.requires_grad_(), targets


def make_teacher(kind: str) -> TeacherHidden | TeacherTopK:
    draw = torch.Generator().manual_seed(9)
    hidden = torch.randn(TOKENS, WIDTH + 3, generator=draw, dtype=torch.float64)
    full = TeacherHidden(hidden, make_head(3, width=WIDTH + 3, bias=True, softcap=4.0).detached())
    if kind == "hidden":
        return full
    logp = full.head.logits(full.hidden).log_softmax(-1)
    top, ids = logp.topk(TOP)
    return TeacherTopK(ids, top, torch.log1p(-top.exp().sum(-1)))


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": 0.25},
    "all": {"bias": True, "softcap": 2.5, "scale": 1.75},
}
WEIGHTS: dict[str, dict[str, float]] = {
    "ce": {"ce": 1.0},
    "kl": {"kl": 1.0},
    "rkl": {"rkl": 1.0},
    "jsd": {"jsd": 1.0},
    "tvd": {"tvd": 1.0},
    "sum": {"tvd": 0.3, "ce": 0.7, "kl": 1.1, "jsd": 2.0, "rkl": 0.2},
}
CASES = [
    (head, weights, teacher, temperature)
    for head in HEADS
    for weights in WEIGHTS
    for teacher in ("hidden", "top-k")
    for temperature in (1.0, 2.0)
    if not (teacher == "top-k" and temperature != 1.0)
]


@pytest.mark.parametrize(("head", "weights", "teacher", "temperature"), CASES)
@pytest.mark.parametrize("chunk", [1, 5, None])
def test_chunks_give_the_loss_and_gradients_of_whole_logits(
    head: str, weights: str, teacher: str, temperature: float, chunk: int | None
) -> None:
    hidden, targets = make_batch()
    made, asked = make_head(1, **HEADS[head]), WEIGHTS[weights]
    answers = None if weights == "ce" else make_teacher(teacher)
    leaves = [t for t in (hidden, made.weight, made.bias) if t is not None]
    wanted = naive(asked, hidden, made, targets, answers, temperature)
    slopes = torch.autograd.grad(wanted * 0.37, leaves)
    objective = Objective(asked, temperature=temperature, chunk_tokens=chunk)
    found = objective(hidden, made, targets, answers)
    torch.testing.assert_close(found.total, wanted, rtol=1e-11, atol=1e-11)
    for one, other in zip(torch.autograd.grad(found.total * 0.37, leaves), slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
    parts = sum(asked[name] * value for name, value in found.parts.items())
    torch.testing.assert_close(parts, wanted.detach(), rtol=1e-11, atol=1e-11)
    assert found.tokens == int((targets >= 0).sum())


def test_a_tied_head_collects_the_gradients_of_both_its_uses() -> None:
    table = make_head(1).weight
    ids = torch.arange(TOKENS) % WORDS
    _, targets = make_batch()

    def slope(*, whole: bool) -> Tensor:
        hidden, head = table[ids].tanh(), Head(table, softcap=5.0)
        if whole:
            total = naive({"ce": 1.0}, hidden, head, targets, None)
        else:
            total = Objective({"ce": 1.0}, chunk_tokens=4)(hidden, head, targets).total
        return torch.autograd.grad(total, table)[0]

    torch.testing.assert_close(slope(whole=False), slope(whole=True), rtol=1e-11, atol=1e-11)


def test_a_frozen_head_gets_no_gradient_and_none_is_kept() -> None:
    hidden, targets = make_batch()
    total = Objective({"ce": 1.0})(hidden, make_head(1).detached(), targets).total
    node: Any = total.grad_fn
    assert [g is not None for g in node.gradients] == [True, False, False]


def test_nothing_is_kept_where_no_gradient_is_asked() -> None:
    hidden, targets = make_batch()
    with torch.no_grad():
        found = Objective({"ce": 1.0})(hidden, make_head(1), targets)
    assert not found.total.requires_grad
    wanted = naive({"ce": 1.0}, hidden, make_head(1), targets, None)
    torch.testing.assert_close(found.total, wanted.detach())


def test_a_batch_without_scored_tokens_costs_nothing() -> None:
    hidden, targets = make_batch()
    found = Objective({"ce": 1.0, "kl": 1.0})(
        hidden, make_head(1), targets.fill_(-100), make_teacher("hidden")
    )
    found.total.backward()
    assert (float(found.total.detach()), found.tokens) == (0.0, 0)
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_a_second_backward_pass_is_refused_instead_of_wrong() -> None:
    hidden, targets = make_batch()
    total = Objective({"ce": 1.0})(hidden, make_head(1), targets).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


@pytest.mark.parametrize("mixed", ["all bfloat16", "float32 head", "bfloat16 head", "autocast"])
def test_bfloat16_is_summed_in_float32(mixed: str) -> None:
    low, high = torch.bfloat16, torch.float32
    hidden, targets = make_batch(high if mixed in {"autocast", "bfloat16 head"} else low)
    head = make_head(1, dtype=high if mixed in {"autocast", "float32 head"} else low)
    rounded = [t.detach().to(torch.bfloat16).double() for t in (hidden, head.weight)]
    exact = [t.requires_grad_() for t in rounded]
    wanted = naive({"ce": 1.0}, exact[0], Head(exact[1]), targets, None)
    slopes = torch.autograd.grad(wanted, exact)
    with torch.autocast("cpu", enabled=mixed == "autocast"):
        total = Objective({"ce": 1.0}, chunk_tokens=3, chunk_bytes=999)(hidden, head, targets).total
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), wanted, rtol=1e-6, atol=1e-5)
    leaves = (hidden, head.weight)
    for leaf, one, other in zip(leaves, torch.autograd.grad(total, leaves), slopes, strict=True):
        assert one.dtype == leaf.dtype
        bound = 2**-8 if leaf.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "rkl", "jsd", "tvd"])
def test_the_kept_tokens_and_one_tail_bound_a_divergence_from_below(name: str) -> None:
    hidden, targets = make_batch()
    head = make_head(1)
    low, high = (
        float(Objective({name: 1.0})(hidden, head, targets, make_teacher(kind)).total.detach())
        for kind in ("top-k", "hidden")
    )
    assert 0 < low < high


def test_a_student_that_is_the_teacher_has_no_divergence_and_no_slope() -> None:
    hidden, targets = make_batch()
    head = make_head(1)
    teacher = TeacherHidden(hidden.detach(), head.detached())
    asked = {"kl": 1.0, "rkl": 1.0, "jsd": 1.0, "tvd": 1.0}
    total = Objective(asked)(hidden, head, targets, teacher).total
    total.backward()
    assert abs(float(total.detach())) < 1e-12
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-13


def test_far_logits_stay_finite() -> None:
    hidden, targets = make_batch(torch.float32)
    head = Head((make_head(1, dtype=torch.float32).weight * 200).detach().requires_grad_())
    asked = {"ce": 1.0, "kl": 1.0, "rkl": 1.0, "jsd": 1.0, "tvd": 1.0}
    for kind in ("hidden", "top-k"):
        found = Objective(asked)(hidden, head, targets, make_teacher(kind))
        slopes = torch.autograd.grad(found.total, (hidden, head.weight))
        assert all(s.isfinite().all() for s in (found.total, *slopes))


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cos"])
def test_hidden_losses_equal_their_definitions(name: str) -> None:
    hidden, targets = make_batch()
    theirs = make_batch()[0].detach().flip(0)
    teacher = TeacherHidden(theirs, make_head(2))
    keep = targets >= 0
    if name == "hidden_mse":
        wanted = ((hidden - theirs) ** 2)[keep].mean(1).sum()
    else:
        unit = [x / x.norm(dim=1, keepdim=True) for x in (hidden, theirs)]
        wanted = (1 - (unit[0] * unit[1]).sum(1))[keep].sum()
    found = Objective({name: 2.0})(hidden, make_head(1), targets, teacher)
    torch.testing.assert_close(found.total, 2 * wanted)
    one, other = (torch.autograd.grad(t, hidden)[0] for t in (found.total, 2 * wanted))
    torch.testing.assert_close(one, other)


def test_mapped_layers_are_averaged() -> None:
    hidden, targets = make_batch()
    states = [torch.full((TOKENS, WIDTH), float(i), dtype=torch.float64) for i in range(4)]
    teacher = TeacherHidden(states[0], make_head(2), layers=tuple(states))
    mine = [torch.zeros_like(states[0])] * 2  # compared with layers 1 and 3
    found = Objective({"hidden_mse": 1.0})(hidden, make_head(1), targets, teacher, layers=mine)
    assert float(found.total) == pytest.approx(found.tokens * (1 + 9) / 2)


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        (4, 4, [0, 1, 2, 3]),
        (2, 4, [1, 3]),
        (3, 12, [3, 7, 11]),
        (4, 6, [1, 2, 4, 5]),
        (6, 3, [0, 0, 1, 1, 2, 2]),
        (1, 5, [4]),
        (5, 1, [0, 0, 0, 0, 0]),
    ],
)
def test_layers_are_mapped_evenly_and_the_last_on_the_last(
    student: int, teacher: int, wanted: list[int]
) -> None:
    assert layer_map(student, teacher) == wanted


def test_a_projector_stands_between_two_widths() -> None:
    hidden, targets = make_batch()
    teacher = make_teacher("hidden")
    assert isinstance(teacher, TeacherHidden)
    projector = make_projector(WIDTH, WIDTH + 3).double()
    objective = Objective({"hidden_mse": 1.0}, projector=projector)
    objective(hidden, make_head(1), targets, teacher).total.backward()
    assert projector.weight.grad is not None
    assert projector.weight.grad.abs().sum() > 0


def test_early_exits_learn_the_text_and_the_last_loop() -> None:
    hidden, targets = make_batch()
    head = make_head(1)
    early = (hidden.detach() * 0.5).requires_grad_()
    found = Objective({"ce": 1.0, "early_exit": 0.1})(hidden, head, targets, loops=[early])
    last = TeacherHidden(hidden.detach(), head.detached())
    exits = naive({"ce": 1.0, "kl": 1.0}, early, head, targets, last)
    wanted = naive({"ce": 1.0}, hidden, head, targets, None) + 0.1 * exits
    torch.testing.assert_close(found.total, wanted)
    leaves = (hidden, early, head.weight)
    pairs = zip(*(torch.autograd.grad(t, leaves) for t in (found.total, wanted)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def wrong(case: str) -> None:
    hidden, targets = make_batch()
    head, full, few = make_head(1), make_teacher("hidden"), make_teacher("top-k")
    if case == "no teacher":
        Objective({"kl": 1.0})(hidden, head, targets)
    elif case == "other words":
        Objective({"kl": 1.0})(hidden, Head(head.weight[:-1]), targets, full)
    elif case == "cache of states":
        Objective({"hidden_mse": 1.0})(hidden, head, targets, few)
    elif case == "cache at a temperature":
        Objective({"kl": 1.0}, temperature=2.0)(hidden, head, targets, few)
    elif case == "no loops":
        Objective({"early_exit": 0.1})(hidden, head, targets)
    elif case == "widths":
        Objective({"hidden_mse": 1.0})(hidden, head, targets, full)
    elif case == "needless projector":
        make_projector(8, 8)
    elif case == "unknown":
        Objective({"hinge": 1.0})
    else:
        Objective({"ce": 0.0})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no teacher", "--loss kl: compares with a teacher, and there is none"),
        ("other words", "the teacher: has logits for 41 tokens, the student for 40"),
        ("cache of states", "--loss hidden: compares hidden states, and a cache holds logits"),
        ("cache at a temperature", "--temperature 2: is not 1"),
        ("no loops", "--loss early_exit: the student has no loops"),
        ("widths", "--loss hidden: compares states of width 12 with the teacher's of 15"),
        ("needless projector", "a projector: is of no use: student and teacher are both 8 wide"),
        ("unknown", "--loss hinge: is no loss"),
        ("nothing", "--loss: names no loss"),
    ],
)
def test_wrong_asks_are_one_sentence(case: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        wrong(case)
    assert str(caught.value).startswith(message)
