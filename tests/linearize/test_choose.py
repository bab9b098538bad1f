"""Which layers cost most when they become linear."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recovering import BASE, TEXT
from surgery.errors import RecipeError
from surgery.linearize.choose import Choice, choose_layers
from surgery.models.linear_layer import set_mode
from transferring import converted, transferred

ASKED = {"context": 48, "rows": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A transferred model by method."""
    made: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            transferred(converted(folder / "untrained", method), folder / "out")
            made[method] = folder / "out"
        return made[method]

    return get


def by_hand(path: Path, layer: int) -> float:
    """KL of two whole forward passes, by the definition."""
    from contextlib import ExitStack

    from surgery.evaluate.load import find_device, load, open_source
    from surgery.recover.batch import Batch
    from surgery.recover.data import Source, open_rows

    with ExitStack() as scratch:
        source = open_source(path, scratch)
        loaded = load(source, device=find_device("cpu"), dtype=torch.float32)
        rows = open_rows([Source(TEXT)], source.tokenizer, context=48, seed=0, mark=source.mark)
    total, tokens = 0.0, 0
    for index in range(6):
        batch = Batch.of(rows, [index], loaded.device)
        with torch.no_grad():
            set_mode(loaded.model, "teacher")
            teacher = loaded.model(**batch.inputs(loaded.model), use_cache=False).logits
            set_mode(loaded.model, "linear", [layer])
            swapped = loaded.model(**batch.inputs(loaded.model), use_cache=False).logits
        p, q = (x.flatten(0, 1).log_softmax(-1)[batch.targets >= 0] for x in (teacher, swapped))
        total, tokens = total + float((p.exp() * (p - q)).sum()), tokens + batch.tokens
    return total / tokens


def test_the_cost_of_a_layer_is_that_of_two_whole_passes(model):
    found = choose_layers(model("lolcats"), [TEXT], count=1, **ASKED)
    for layer in range(4):
        assert found.kl[layer] == pytest.approx(by_hand(model("lolcats"), layer), rel=1e-3)


def test_the_layers_that_cost_most_are_kept(model):
    found = choose_layers(model("lolcats"), [TEXT], count=2, **ASKED)
    first = sorted(found.kl, key=lambda n: -found.kl[n])[:2]
    assert found.layers == tuple(sorted(first))


def test_of_layers_that_cost_the_same_the_lower_is_taken(model, monkeypatch):
    from surgery.linearize import choose

    costs = {0: 0.1, 1: 0.5, 2: 0.5, 3: 0.5}
    monkeypatch.setattr(choose, "_measure", lambda *_: (costs, 10))
    assert choose_layers(model("lolcats"), [TEXT], count=2, **ASKED).layers == (1, 2)


def test_the_teacher_is_taken_where_projections_were_trained(model):
    """With its own projections a layer is compared with itself, and not with the model it was."""
    found = choose_layers(model("gla"), [TEXT], count=1, teacher=BASE, **ASKED)
    assert all(cost > 0 for cost in found.kl.values())


def test_a_teacher_changes_nothing_where_projections_were_not_trained(model):
    alone = choose_layers(model("lolcats"), [TEXT], count=1, **ASKED)
    beside = choose_layers(model("lolcats"), [TEXT], count=1, teacher=BASE, **ASKED)
    assert beside == alone


def test_progress_is_told_row_by_row(model):
    told = []
    choose_layers(
        model("lolcats"), [TEXT], count=1, progress=lambda *row: told.append(row), **ASKED
    )
    assert told == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize(
    ("method", "count", "sentence"),
    [
        ("lolcats", 0, "keeps 0 of the 4 layers"),
        ("lolcats", 4, "keeps 4 of the 4 layers"),
        ("gla", 1, "name the model that it was linearized from"),
        ("base", 1, "is not linearized"),
    ],
)
def test_wrong_asks_are_refused(method, count, sentence, model):
    found = BASE if method == "base" else model(method)
    with pytest.raises(RecipeError, match=sentence):
        choose_layers(found, [TEXT], count=count, **ASKED)


def test_a_choice_is_told_as_json_has_it():
    told = Choice(layers=(1,), kl={0: 0.5, 1: 1.0}, tokens=3).as_dict()
    assert told == {"layers": [1], "kl": {"0": 0.5, "1": 1.0}, "tokens": 3}
