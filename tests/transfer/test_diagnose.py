"""What is measured before a transfer agrees with a plain float64 computation."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from cli.main import main
from surgery.checkpoint import open_checkpoint
from surgery.diagnose import diagnose


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


@pytest.fixture
def sources(tmp_path):
    """Open three bare models of two layers; `far` makes another base of the new one."""

    def make(*, far=False, dtype=torch.float32, seed=0):
        rng = torch.Generator().manual_seed(seed)
        shapes = {"model.embed_tokens.weight": (50, 7), "model.norm.weight": (7,)}
        shapes |= {f"model.layers.{n}.mlp.up_proj.weight": (300, 301) for n in range(2)}
        old = {n: torch.randn(s, generator=rng) for n, s in shapes.items()}
        near = {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in old.items()}
        other = {n: torch.randn(t.shape, generator=rng) for n, t in old.items()}
        tuned = {n: t + 0.05 * torch.randn(t.shape, generator=rng) for n, t in old.items()}
        made = {"new": other if far else near, "tuned": tuned, "old": old}
        for name, tensors in made.items():
            stored = {n: t.to(dtype) for n, t in tensors.items()}
            save_file(stored, tmp_path / f"{name}.safetensors")
            made[name] = {n: t.double().reshape(-1) for n, t in stored.items()}
        opened = [open_checkpoint(tmp_path / f"{name}.safetensors") for name in made]
        return opened, list(made.values())

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_figures_of_a_layer_are_those_of_float64(dtype, sources) -> None:
    opened, (new, tuned, old) = sources(dtype=dtype)
    found = {row.name: row for row in diagnose(*opened).rows}
    assert list(found) == ["embedding", "layer 0", "layer 1", "norms"]
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        moved, change = new[name] - old[name], tuned[name] - old[name]
        row = found[f"layer {layer}"]
        assert row.elements == 300 * 301
        assert row.bases == pytest.approx(cosine(new[name], old[name]), abs=1e-12)
        assert row.cosine == pytest.approx(cosine(moved, change), abs=1e-12)
        assert row.ratio == pytest.approx(float(moved.norm() / change.norm()), rel=1e-12)
        product = moved * change
        against = int((product < 0).sum()) / int((product != 0).sum())
        assert row.conflict == pytest.approx(against, abs=1e-12)


def test_all_is_one_long_vector(sources) -> None:
    opened, models = sources()
    new, tuned, old = (torch.cat(list(tensors.values())) for tensors in models)
    total = diagnose(*opened).total
    assert total.cosine == pytest.approx(cosine(new - old, tuned - old), abs=1e-12)
    assert total.bases == pytest.approx(cosine(new, old), abs=1e-12)


def test_the_result_does_not_depend_on_the_workers(sources) -> None:
    opened, _ = sources()
    assert diagnose(*opened, workers=1) == diagnose(*opened, workers=4)


def test_bases_of_another_training_are_warned_of(sources) -> None:
    opened, _ = sources(far=True)
    (warning,) = diagnose(*opened).warnings
    assert "the bases are not close" in warning


def test_close_bases_are_not_warned_of(sources) -> None:
    opened, _ = sources()
    assert diagnose(*opened).warnings == ()


def test_a_tuned_model_that_is_its_base_is_warned_of(sources) -> None:
    (new, _, old), _ = sources()
    found = diagnose(new, old, old)
    assert found.total.ratio is None
    assert found.total.conflict is None
    assert found.warnings == ("the tuned model does not differ from the old base",)


def test_the_command_prints_before_and_records(sources, tmp_path, capsys) -> None:
    sources(far=True)
    out = tmp_path / "out.safetensors"
    words = ["transfer", "-o", str(out)]
    for name in ("new-base", "tuned", "old-base"):
        words += [f"--{name}", str(tmp_path / f"{name.partition('-')[0]}.safetensors")]
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "layer 1" in told.out
    assert "not close" in told.out
    assert not out.exists()
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert [row["name"] for row in facts["diagnosis"]["rows"]][1] == "layer 0"
    record = json.loads(open_checkpoint(out).metadata["surgery"])
    assert record["facts"] == facts


def test_the_reading_can_be_left_out(sources, tmp_path, capsys) -> None:
    sources()
    words = ["transfer", "-o", str(tmp_path / "out.safetensors"), "--no-diagnose", "--json"]
    for name in ("new-base", "tuned", "old-base"):
        words += [f"--{name}", str(tmp_path / f"{name.partition('-')[0]}.safetensors")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["facts"] == {}


def test_an_output_that_exists_is_told_before_measuring(sources, tmp_path, capsys) -> None:
    sources()
    out = tmp_path / "out.safetensors"
    out.touch()
    words = ["transfer", "-o", str(out)]
    for name in ("new-base", "tuned", "old-base"):
        words += [f"--{name}", str(tmp_path / f"{name.partition('-')[0]}.safetensors")]
    assert main(words) == 1
    answer = capsys.readouterr()
    assert "exists already" in answer.err
    assert not answer.out
