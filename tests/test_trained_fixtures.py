"""The trained fixtures: they load, and surgery on them does what it should, with room.

Orderings and margins only, never losses: a fixture made anew must pass as it is. The arithmetic
and the measurement here are naive on purpose; they do not use the code they will judge.
"""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = ("base", "uni", "arith", "v2")
DOMAINS = ("mix", "uni", "arith", "recall")
FAR = 64


@cache
def heldout(domain):
    return load_file(FIXTURES / "heldout" / f"{domain}.safetensors")


@cache
def documents(domain):
    lines = (FIXTURES / "heldout" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@cache
def weights(name):
    return {k: v.float() for k, v in load_file(FIXTURES / name / "model.safetensors").items()}


def plus(start, *steps):
    """Return start + the sum of weight * (model - base), rounded as it would be stored."""
    base = weights("base")
    return {
        name: (tensor + sum(w * (weights(m)[name] - base[name]) for m, w in steps)).bfloat16()
        for name, tensor in weights(start).items()
    }


RECIPES = {
    "base": ("base",),
    "uni": ("uni",),
    "arith": ("arith",),
    "v2": ("v2",),
    "soup": ("base", ("uni", 0.5), ("arith", 0.5)),
    "base - uni": ("base", ("uni", -0.5)),
    "base - arith": ("base", ("arith", -0.5)),
    "v2 + uni": ("v2", ("uni", 1.0)),
    "v2 + arith": ("v2", ("arith", 1.0)),
}


def load(state):
    model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base", dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]
    assert unexpected == []
    return model.eval()


@cache
def model(name):
    return load(plus(*RECIPES[name]))


@torch.inference_mode()
def measured(network, domain):
    """Return bits per byte: every row by itself, every token after the first scored once."""
    held = heldout(domain)
    bits = 0.0
    for rows in held["rows"].long().split(16):
        logits = network(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        )
        bits += float(loss) / math.log(2)
    return bits / int(held["bytes"][:, 1:].sum())


@cache
def bits(name, domain):
    return measured(model(name), domain)


@cache
@torch.inference_mode()
def recalled(name, kind, *, context):
    """Return (accuracy, bits per token) on a kind's answers, seeing the last `context` tokens."""
    held, right, total = heldout("recall"), [], 0.0
    kinds = [document["kind"] for document in documents("recall")]
    for row, column in held["answers"].nonzero().tolist():
        if kinds[row] != kind:
            continue
        window = held["rows"][row, max(0, column - context) : column].long()[None]
        logits = model(name)(input_ids=window, use_cache=False).logits[0, -1]
        answer = int(held["rows"][row, column])
        right.append(int(logits.argmax()) == answer)
        total -= float(logits.log_softmax(-1)[answer]) / math.log(2)
    return sum(right) / len(right), total / len(right)


@pytest.mark.parametrize("name", MODELS)
def test_loads_with_nothing_missing_or_left_over(name):
    _, info = AutoModelForCausalLM.from_pretrained(FIXTURES / name, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("name", MODELS)
def test_is_a_complete_directory_in_bfloat16(name):
    present = {path.name for path in (FIXTURES / name).iterdir()}
    assert present >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    tensors = load_file(FIXTURES / name / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("name", MODELS)
def test_tokenizer_gives_the_heldout_rows_from_their_documents(name, domain):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / name)
    rows = heldout(domain)["rows"].tolist()
    assert [[0, *tokenizer(d["text"])["input_ids"]] for d in documents(domain)] == rows


@pytest.mark.parametrize("domain", DOMAINS)
def test_heldout_byte_counts_are_those_of_the_documents(domain):
    counts = heldout(domain)["bytes"].sum(1).tolist()
    assert counts == [len(d["text"].encode()) for d in documents(domain)]


def test_digits_are_single_tokens():
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "base")
    assert len(tokenizer("20251120")["input_ids"]) == 8


BETTER = [
    pytest.param("base", "uni", "uni", 1.0, id="expert uni beats base on uni"),
    pytest.param("base", "arith", "arith", 1.0, id="expert arith beats base on arith"),
    pytest.param("base", "soup", "uni", 1.0, id="soup beats base on uni"),
    pytest.param("base", "soup", "arith", 1.0, id="soup beats base on arith"),
    pytest.param("arith", "soup", "uni", 1.0, id="soup beats expert arith on uni"),
    pytest.param("uni", "soup", "arith", 1.0, id="soup beats expert uni on arith"),
    pytest.param("soup", "uni", "uni", 0.15, id="expert uni beats soup on uni"),
    pytest.param("soup", "arith", "arith", 0.15, id="expert arith beats soup on arith"),
    pytest.param("base - uni", "base", "uni", 1.0, id="negation hurts uni"),
    pytest.param("base - arith", "base", "arith", 1.0, id="negation hurts arith"),
    pytest.param("v2", "v2 + uni", "uni", 1.0, id="diff uni transfers to v2"),
    pytest.param("v2", "v2 + arith", "arith", 1.0, id="diff arith transfers to v2"),
]


@pytest.mark.parametrize(("worse", "better", "domain", "margin"), BETTER)
def test_effect_is_larger_than(worse, better, domain, margin):
    assert bits(worse, domain) - bits(better, domain) > margin


@pytest.mark.parametrize(
    ("changed", "limit"), [("soup", 0.05), ("base - uni", 0.15), ("base - arith", 0.15)]
)
def test_cost_on_the_base_domain_is_below(changed, limit):
    assert bits(changed, "mix") - bits("base", "mix") < limit


@pytest.mark.parametrize("kind", ["words", "pairs"])
def test_base_recalls_lists_only_when_it_sees_them(kind):
    seen, near = (recalled("base", kind, context=c)[0] for c in (128, FAR))
    assert seen > 0.8
    assert near < 0.1


def test_base_completes_passages_better_when_it_saw_them():
    seen, near = (recalled("base", "passage", context=c)[0] for c in (128, FAR))
    assert seen - near > 0.3


@pytest.mark.parametrize("kind", ["passage", "words", "pairs"])
def test_recall_is_worth_bits(kind):
    seen, near = (recalled("base", kind, context=c)[1] for c in (128, FAR))
    assert near - seen > 2.0


@pytest.mark.parametrize("name", ["uni", "arith", "v2", "soup"])
def test_recall_survives_further_training_and_the_soup(name):
    assert recalled(name, "pairs", context=128)[0] > 0.7


@pytest.mark.slow
def test_transferred_diff_is_ahead_after_equal_training(monkeypatch):
    monkeypatch.syspath_prepend(FIXTURES)
    import rows
    import text
    import train

    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "base")
    mix = text.mix().train
    batches = rows.expert_batches(
        rows.stream(tokenizer, ["".join(text.uni().train)]),
        rows.stream(tokenizer, mix),
        rows.recall_pool(tokenizer, mix, 300, 1),
        seed=1,
    )
    schedule = train.Schedule(steps=20, lr=1e-3, warmup=2)
    with_diff, without = (
        train.train(load(plus(*RECIPES[name])), batches, schedule, report=lambda _: None)
        for name in ("v2 + uni", "v2")
    )
    assert measured(without, "uni") - measured(with_diff, "uni") > 0.4
