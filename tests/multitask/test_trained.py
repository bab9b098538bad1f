"""On the trained fixtures: a task's model from a store is nearly its expert, and beats the soup."""

from functools import cache
from pathlib import Path

import pytest

FIXTURES = Path(__file__).parents[2] / "fixtures"
TASKS = ("uni", "arith")
# How much better than the soup on its own text, in bits per byte; measured 0.62 and 0.19 (EMR),
# 0.61 and 0.22 (TALL).
BETTER = {"uni": 0.3, "arith": 0.08}


@cache
def models(folder):
    """Write the soup and every task's model, by both rules."""
    from merges.multitask import build_store, restore_task
    from surgery.checkpoint import open_checkpoint
    from surgery.recipe import compile, merge_models
    from surgery.run import run

    paths = {name: FIXTURES / name for name in ("base", *TASKS)}
    experts = [paths[task] for task in TASKS]
    paths["soup"] = folder / "soup"
    run(compile(merge_models("linear", experts, weight=1.0)), paths["soup"])
    for kind, rule in (("emr", {}), ("tall", {"bounds": (0.4, 0.4)})):
        opened = [open_checkpoint(paths[name]) for name in ("base", *TASKS)]
        run(build_store(*opened, kind=kind, **rule), folder / kind)
        for task in TASKS:
            plan = restore_task(opened[0], open_checkpoint(folder / kind), task=task)
            paths[f"{kind} {task}"] = folder / f"{kind}-{task}"
            run(plan, paths[f"{kind} {task}"])
    return paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return models(tmp_path_factory.mktemp("trained"))


def measured(made, task, names):
    from surgery.evaluate import evaluate

    texts = [FIXTURES / "heldout" / f"{text}.jsonl" for text in (task, "mix")]
    found = evaluate([made[name] for name in names], texts, context=128, bootstrap=500)
    return dict(zip(names, found.models, strict=True))


@pytest.mark.parametrize("kind", ["emr", "tall"])
@pytest.mark.parametrize("task", TASKS)
def test_a_task_s_model_beats_the_soup_on_its_own_text(made, kind, task):
    """Paired intervals over documents; the base domain costs little."""
    name = f"{kind} {task}"
    found = measured(made, task, ("soup", "base", name))
    own = next(d for d in found[name].domains if Path(d.name).stem == task)
    assert own.difference.bits_per_byte < -BETTER[task]
    assert own.difference.high < -BETTER[task] / 2
    for half in (0, 1):
        mine, soup = (nats_per_byte(found[who], half) for who in (name, "soup"))
        assert mine < soup
    mix = {who: next(d for d in found[who].domains if Path(d.name).stem == "mix") for who in found}
    assert mix[name].bits_per_byte < mix["base"].bits_per_byte + 0.1


def nats_per_byte(model, half):
    """Of every second document of the task's text."""
    own = [d for d in model.per_document if "/mix.jsonl" not in d.name][half::2]
    return sum(d.nats for d in own) / sum(d.bytes for d in own)


@pytest.mark.parametrize("task", TASKS)
def test_a_restored_model_loads_whole(made, task):
    from transformers import AutoModelForCausalLM

    _, told = AutoModelForCausalLM.from_pretrained(made[f"emr {task}"], output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
