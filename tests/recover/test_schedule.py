"""Learning rates against formulas in numpy, optimisers, and figures of speed."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch

from surgery.errors import RecipeError, TrainError
from surgery.recover.meter import Meter, peak_of
from surgery.recover.optimise import make_optimisers
from surgery.recover.schedule import decay_start, rate
from surgery.recover.settings import Settings, default_context, parse_losses

STEPS, WARM, LAST = 200, 10, 160  # of a run with 5% of warmup and a decay over the last 20%


def settings_of(kind: str, *, floor: float = 0.1, steps: int = STEPS) -> Settings:
    tokens = steps * 64
    options = {"tokens": tokens, "context": 64, "batch_tokens": 64, "warmup": 0.05, "decay": 0.2}
    return Settings(schedule=kind, floor=floor, **options)


def shape_of(kind: str) -> np.ndarray:
    """Shares of the peak after warming up, before the floor."""
    step = np.arange(WARM, STEPS)
    z = (step - WARM) / (STEPS - WARM)
    left = np.clip((step - LAST) / (STEPS - LAST), 0, None)
    cooled = np.clip((step - WARM) / (0.3 * STEPS), None, 1)
    stable = 0.5 + 0.25 * (1 + np.cos(np.pi * cooled))
    return {
        "wsd": 1 - np.sqrt(left),
        "cosine": (1 + np.cos(np.pi * z)) / 2,
        "linear": 1 - z,
        "constant": np.ones_like(z),
        "infinite": stable * np.exp(left * np.log(0.05)),
        "rex": (1 - z) / (0.5 + 0.5 * (1 - z)),
        "power": (1 + (np.minimum(step, LAST) - WARM) / WARM) ** -0.51 * (1 - left),
    }[kind]


KINDS = ("wsd", "cosine", "linear", "constant", "infinite", "rex", "power")


@pytest.mark.parametrize("kind", KINDS)
def test_rates_follow_their_formula(kind) -> None:
    settings = settings_of(kind)
    found = [rate(settings, step) for step in range(STEPS)]
    warming = np.arange(1, WARM + 1) / (WARM + 1)
    np.testing.assert_allclose(found[:WARM], warming, rtol=1e-12)
    np.testing.assert_allclose(found[WARM:], 0.1 + 0.9 * shape_of(kind), rtol=1e-12)


@pytest.mark.parametrize("kind", ["wsd", "infinite", "power", "constant"])
def test_an_extended_run_has_the_same_beginning(kind) -> None:
    short, long = settings_of(kind), settings_of(kind, steps=3 * STEPS)
    kept = range(decay_start(short))
    assert [rate(long, n, first=STEPS) for n in kept] == [rate(short, n) for n in kept]


@pytest.mark.parametrize(
    ("kind", "start"), [("wsd", LAST), ("power", LAST), ("cosine", STEPS), ("constant", STEPS)]
)
def test_the_final_decay_begins_where_it_does(kind, start) -> None:
    assert decay_start(settings_of(kind)) == start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_rates(kind, steps) -> None:
    settings = settings_of(kind, steps=steps, floor=0.0)
    found = [rate(settings, step) for step in range(steps)]
    assert all(0 <= value <= 1 for value in found)
    assert found[0] > 0


def parameters() -> list[torch.nn.Parameter]:
    shapes = [(6, 4), (4, 4), (3, 4, 2), (4,)]
    return [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]


def groups(ps: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": ps, "weight_decay": 0.1, "share": 1.0}]


def test_muon_takes_hidden_matrices_and_leaves_the_ends() -> None:
    embedding, matrix, experts, norm = ps = parameters()
    found = make_optimisers(groups(ps), Settings(optimizer="muon"), ends=[embedding])
    muon, adamw = found.parts
    assert isinstance(muon, torch.optim.Muon)
    assert muon.param_groups[0]["params"] == [matrix]
    assert muon.param_groups[0]["weight_decay"] == 0.1
    assert [id(p) for p in adamw.param_groups[0]["params"]] == list(
        map(id, (embedding, experts, norm))
    )


def test_rates_reach_every_group_by_its_share() -> None:
    ps = parameters()
    given = [{**groups(ps[:2])[0], "share": 2.0}, groups(ps[2:])[0]]
    found = make_optimisers(given, Settings(lr=0.5))
    assert found.set_rate(0.5) == 0.25
    assert [group["lr"] for group in found.parts[0].param_groups] == [0.5, 0.25]


def test_muon_without_matrices_is_refused() -> None:
    with pytest.raises(RecipeError, match="trains matrices, and --train norms trains none"):
        make_optimisers(groups(parameters()[2:]), Settings(optimizer="muon", train="norms"))


def test_eight_bits_without_a_package_are_one_sentence(monkeypatch) -> None:
    for name in ("torchao", "torchao.optim", "bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainError, match="neither is installed; take adamw"):
        make_optimisers(groups(parameters()), Settings(optimizer="adamw8bit"))


@pytest.mark.parametrize(
    ("partly", "teacher", "done", "six"), [(False, 0, 6, 6), (True, 0, 4, 6), (True, 7, 18, 20)]
)
def test_the_meter_counts_operations(partly, teacher, done, six, monkeypatch) -> None:
    clock = iter([0.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter(
        parameters=10**9, teacher=teacher * 10**9, partly=partly, peak=500.0, devices=2,
        _since=next(clock),
    )  # fmt: skip
    meter.start()
    told = meter.add(2000)
    assert (told["seconds"], told["tokens_per_second"]) == (2.0, 1000.0)
    assert told["tflops"] == pytest.approx(done)
    assert (told["mfu"], told["mfu_6n"]) == pytest.approx((done / 1000, six / 1000))
    meter.start()
    meter.add(2000)
    assert meter.mean()["tokens_per_second"] == pytest.approx(4000 / 6)


def test_devices_are_known_by_their_names() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_of("NVIDIA H100 PCIe") == 756.0
    assert peak_of("a CPU") is None


def test_settings_survive_json() -> None:
    settings = Settings(
        losses=parse_losses("kl,hidden-cos=0.5,early_exit"), include=("q",), lr=1e-3
    )
    assert settings.losses == {"kl": 1.0, "hidden_cos": 0.5, "early_exit": 0.1}
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_steps_are_whole() -> None:
    settings = Settings(tokens=1000, context=64, batch_tokens=300)
    assert (settings.batch_rows, settings.steps) == (4, math.ceil(1000 / 256))


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (None, 2048),
        ({"max_position_embeddings": 128}, 128),
        ({"max_position_embeddings": 131072}, 2048),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": "many"}, 2048),
    ],
)
def test_rows_are_as_long_as_the_model_reads_by_default(config, tokens):
    assert default_context(config) == tokens
