"""What training on does to damaged and grown models, in bits per byte of text that none saw.

Short forms of `benchmarks.recovery`; a margin is half of the worst that was seen on three seeds.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cli.main import main
from fixtures.text import mix
from surgery.evaluate import evaluate
from surgery.recover.ask import Ask
from surgery.recover.run import recover
from surgery.recover.settings import Settings
from surgery.recover.sources import Source

FIXTURES = Path(__file__).parents[1] / "fixtures"
BASE, TEXT = FIXTURES / "base", FIXTURES / "heldout" / "mix.jsonl"
STEP, STEPS = 1024, 16  # tokens of a step; steps of healing
CALIBRATED = ("--calibration", str(FIXTURES / "heldout" / "recall.jsonl"))
DAMAGED = {
    "pruned": ("prune", "--method", "block-influence", "--layers", "1", *CALIBRATED),
    "tied": ("recurse tie", "--blocks", "2", "--init", "average"),
    "sparse": ("sparsify", "--method", "magnitude", "--sparsity", "0.6"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("healed")


@pytest.fixture(scope="module")
def text(folder) -> Path:
    """Files of the standard library that no held-out text is from."""
    path = folder / "text.jsonl"
    documents = mix().train[:40]
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    return path


def damaged(folder: Path, name: str) -> Path:
    out = folder / name
    if not out.exists():
        verb, *words = DAMAGED[name]
        assert main([*verb.split(), str(BASE), *words, "-o", str(out)]) == 0
    return out


def new_model(out: Path, *, layers: int, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(BASE)
    config.num_hidden_layers = layers
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(out)
    return out


def trained(student: Path, text: Path, *, steps: int, taught: bool, seed: int = 0, **options):
    """The model after some steps, by text alone or with the base as its teacher."""
    settings = Settings(
        losses={"kl": 1.0} if taught else {"ce": 1.0},
        tokens=steps * STEP,
        context=128,
        batch_tokens=STEP,
        micro_tokens=STEP,
        seed=seed,
        **{"train": "full", "lr": 1e-3, **options},
    )
    out = student.with_name(f"{student.name}-{'taught' if taught else 'alone'}-{steps}")
    teacher = str(BASE) if taught else None
    ask = Ask(
        student=str(student),
        data=(Source(text),),
        out=out,
        settings=settings,
        teacher=teacher,
        resume=False,
    )
    assert recover(ask, force=True).out == out
    return out


def bits(*models: Path) -> list[float]:
    return [model.overall.bits_per_byte for model in evaluate(models, [TEXT]).models]


def test_six_steps_with_the_teacher_heal_a_pruned_model(folder, text):
    pruned = damaged(folder, "pruned")
    before, after = bits(pruned, trained(pruned, text, steps=6, taught=True))
    assert before - after > 0.021


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "margin"), [("pruned", 0.015), ("tied", 0.018), ("sparse", 0.006)]
)
def test_a_teacher_heals_more_than_the_text_alone(folder, text, name, margin):
    student = damaged(folder, name)
    taught, alone = bits(
        *(trained(student, text, steps=STEPS, taught=taught) for taught in (True, False))
    )
    assert alone - taught > margin


@pytest.mark.slow
def test_stacking_a_trained_model_beats_its_depth_from_scratch_at_equal_flops(folder, text):
    options = {"taught": False, "lr": 2e-3, "schedule": "cosine", "warmup": 0.1}
    shallow = trained(new_model(folder / "two", layers=2), text, steps=60, **options)
    stacked = folder / "stacked"
    assert main(["stack", str(shallow), "--factor", "2", "-o", str(stacked)]) == 0
    grown = trained(stacked, text, steps=60, **options)
    # 94 = 60 (1 + c) / c, c = 1.78: what a token costs in four layers over what it costs in two.
    scratch = trained(new_model(folder / "four", layers=4), text, steps=94, **options)
    grown_bits, scratch_bits = bits(grown, scratch)
    assert scratch_bits - grown_bits > 0.05


@pytest.mark.slow
def test_norms_alone_heal_less_than_everything(folder, text):
    student = damaged(folder, "sparse")
    modes = {"norms": 2.5e-2, "full": 1e-3}
    few, all_ = (
        bits(trained(student, text, steps=STEPS, taught=True, train=mode, lr=lr))[0]
        for mode, lr in modes.items()
    )
    assert bits(student)[0] - few > 0.08
    assert few - all_ > 0.045
