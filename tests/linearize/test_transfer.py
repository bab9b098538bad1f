"""The transfer stage: what it brings down, what it leaves alone, and that it goes on."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from recovering import BASE
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError
from surgery.linearize.comparing import Pair, attention_entropy, pass_through, relative_error
from surgery.linearize.transfer import TransferAsk, transfer
from surgery.models.linear_layer import converted as linear_layers
from surgery.recover import loop
from surgery.recover.sources import Source
from transferring import ask_of, converted, furthest, lines, transferred, weights


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An untrained model by method, made once; read it, never write to it."""
    made = {}

    def get(method="lolcats", **options):
        key = (method, *sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("untrained") / method
            made[key] = converted(out, method, **options)
        return made[key]

    return get


@pytest.fixture(scope="module")
def whole(student, tmp_path_factory):
    """A transfer that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return out, transferred(student(), out)


def load(path):
    from surgery.models.modeling_linearized import LinearizedForCausalLM

    return LinearizedForCausalLM.from_pretrained(path, dtype=torch.float32)


# -- what it learns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        "lolcats",
        "hedgehog",
        pytest.param("t2r", marks=pytest.mark.slow),
        pytest.param("lizard", marks=pytest.mark.slow),
        pytest.param("based", marks=pytest.mark.slow),
        "gla",
        pytest.param("gated-delta", marks=pytest.mark.slow),
    ],
)
def test_every_layer_comes_nearer_to_its_teacher(method, student, tmp_path):
    found = transferred(student(method), tmp_path / "out", tokens=20 * 128)
    assert set(found.told["layers"]) == {"0", "1", "2", "3"}
    assert all(error["after"] < error["before"] for error in found.told["layers"].values())
    assert found.told["errors"]["after"] == pytest.approx(
        sum(error["after"] for error in found.told["layers"].values()) / 4
    )


def test_nothing_but_what_the_record_names_is_changed(student, whole):
    before, after = weights(student()), weights(whole[0])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".self_attn.mixer." in name for name in changed)


def test_projections_train_where_the_method_trains_them(student, tmp_path):
    transferred(student("gla"), tmp_path / "out")
    before, after = weights(student("gla")), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj" in name for name in changed)
    assert not any("mlp" in name or "embed" in name for name in changed)


def test_the_figures_of_a_step_have_every_layer(whole):
    told = lines(whole[0].parent / "out.surgery-run")[0]
    errors = [told[f"layer.{n}"] for n in range(4)]
    assert told["loss"] == pytest.approx(sum(errors) / 4)


# -- what is compared ------------------------------------------------------------------------


def test_the_teacher_feeds_the_next_layer(student):
    """States before a layer are those of the model with softmax attention."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model, ids = load(student()), torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted = base(ids, output_hidden_states=True).hidden_states
        found = pass_through(model, {"input_ids": ids}, each=lambda *_: None, end=3)
    assert torch.allclose(found, wanted[3], atol=1e-5)


def test_a_graph_holds_one_layer_alone(student):
    """What a layer's error gives is gradients of that layer."""
    model, seen = load(student()), {}

    def each(layer, pair):
        model.zero_grad()
        relative_error(pair).backward()
        seen[layer] = {n for n, p in model.named_parameters() if p.grad is not None}

    pass_through(model, {"input_ids": torch.arange(30).view(1, 30)}, each=each, end=4)
    assert set(seen) == {0, 1, 2, 3}
    for layer, names in seen.items():
        assert all(f"layers.{layer}.self_attn." in name for name in names)
        assert any(".mixer." in name for name in names)
    assert not any(module.compared for module in linear_layers(model).values())


def test_the_error_is_one_where_the_mean_is_given():
    torch.manual_seed(0)
    teacher = torch.randn(2, 50, 6) * 7 + 3
    keep = torch.rand(2, 50) < 0.8
    mean = teacher[keep].mean(0).expand_as(teacher)
    pair = Pair(mean, teacher, keep, None, None)  # type: ignore[arg-type]
    assert float(relative_error(pair)) == pytest.approx(1.0, abs=1e-5)


def test_padding_is_not_compared(student, tmp_path):
    """Rows that hold one short text each have the errors of that text alone."""
    from surgery.linearize.objective import TransferGoal
    from surgery.linearize.transfer_ask import check_transfer
    from surgery.recover.batch import Batch
    from surgery.recover.distributed import World
    from surgery.recover.session import opened

    text = tmp_path / "short.jsonl"
    text.write_text('{"text": "def f(x): return x"}\n')
    found = []
    for context in (32, 64):
        asked = ask_of(
            student(), tmp_path / "out", data=(Source(text),), context=context, tokens=128
        )
        world = World(0, 1, torch.device("cpu"))
        with opened(check_transfer(asked), world) as session:
            goal = TransferGoal(session)
            batch = Batch.of(session.rows, [0], world.device)
            found.append(goal.backward(batch, batch.tokens))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("method", ["lolcats", "hedgehog", "t2r"])
def test_weights_of_attention_make_its_output(method, student):
    """The entropy of the teacher's weights under themselves is the least that a student has."""
    model, found = load(student(method)), {}

    def each(layer, pair):
        found[layer] = float(attention_entropy(pair)), pair

    ids = torch.arange(24).view(1, 24)
    with torch.no_grad():
        pass_through(model, {"input_ids": ids}, each=each, end=4)
        for cost, pair in found.values():
            from surgery.linearize.comparing import _weights

            weights = _weights(pair, pair.module.mixer.shape.scale)
            values = weights @ pair.seen.v
            b, h, r, t, d = values.shape
            made = values.permute(0, 3, 1, 2, 4).reshape(b, t, h * r * d)
            assert torch.allclose(made, pair.teacher, atol=1e-5)
            least = float(-(weights * weights.clamp(min=1e-12).log()).sum(-1).mean())
            assert cost >= least - 1e-4


def test_attention_weights_are_brought_nearer_too(student, tmp_path):
    out = tmp_path / "out"
    transferred(student("hedgehog"), out, attention_weight=1.0, tokens=20 * 128)
    told = lines(tmp_path / "out.surgery-run")
    costs = [sum(one[f"attention.{n}"] for n in range(4)) for one in told]
    assert sum(costs[-4:]) < sum(costs[:4])
    assert told[0]["loss"] == pytest.approx(told[0]["error"] + costs[0] / 4)


# -- interruptions ---------------------------------------------------------------------------


def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_numbers(
    student, whole, tmp_path, monkeypatch
):
    out, real = tmp_path / "out", loop.Loop._step

    def step(self, number):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, number)

    monkeypatch.setattr(loop.Loop, "_step", step)
    stopped = transferred(student(), out)
    assert stopped.out is None
    assert stopped.curve.step == 4
    monkeypatch.undo()
    found = transferred(student(), out)
    assert found.told["layers"] == whole[1].told["layers"]
    assert furthest(out, whole[0]) == 0


def test_other_micro_batches_are_another_run(student, tmp_path):
    """The variance is that of what is fed at once."""
    transferred(student(), tmp_path / "out")
    with pytest.raises(SurgeryError, match="--micro-tokens 128"):
        transferred(student(), tmp_path / "out", micro_tokens=128)


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        ("base", {}, "is not linearized"),
        ("liger", {}, "has no parameters that a transfer would train"),
        ("swa-sink", {}, "has no parameters that a transfer would train"),
        ("gla", {"attention_weight": 0.1}, "those of gla are not defined"),
        ("lolcats", {"attention_weight": -1.0}, "is no weight"),
        ("lolcats", {"teacher": str(BASE)}, "holds the attention that it had"),
        ("lolcats", {"blocks": 0}, "counts layers"),
        ("lolcats", {"context": 4096}, "is more than"),
    ],
)
def test_wrong_asks_are_refused_in_a_sentence(method, options, sentence, student, tmp_path):
    found = BASE if method == "base" else student(method)
    with pytest.raises(SurgeryError, match=sentence):
        transferred(found, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_record_tells_the_stage(whole):
    record = open_checkpoint(whole[0])
    from surgery.provenance import read_record

    facts = read_record(record)["facts"]
    assert facts["trained"] == "transfer"
    assert facts["linear_layers"] == [0, 1, 2, 3]
    assert set(facts["errors"]) == {"before", "after"}


def test_settings_of_a_recovery_are_taken_for_their_steps(student, tmp_path):
    from surgery.recover.settings import Settings
    from transferring import SMALL, TEXT

    settings = Settings(train="full", **SMALL)
    asked = TransferAsk(
        student=str(student()), data=(Source(TEXT),), out=tmp_path / "out", settings=settings
    )
    told = transfer(asked).told["settings"]
    assert (told["train"], told["losses"], told["lr"]) == ("new", {"transfer": 1.0}, 1e-2)
