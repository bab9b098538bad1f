"""Models that are built without values, and read part by part."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from launching import TESTS, in_two
from recovering import BASE, settings_of
from structures import STRUCTURES, is_decoder
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError
from surgery.evaluate.load import load, open_source
from surgery.recover.distributed import World
from surgery.recover.spread import Spread, load_empty
from surgery.recover.trainable import make_trainable

ALONE = World(0, 1, torch.device("cpu"))
# Experts that transformers fuses in memory are converted: such models are read whole.
FUSED = {"mixtral", "qwen3_moe", "deepseek_v3", "qwen3_next"}


def loaded_twice(path: Path, dtype: torch.dtype = torch.float32):
    with ExitStack() as scratch:
        source = open_source(path, scratch)
    return load(source, device=ALONE.device, dtype=dtype), load_empty(source, ALONE, dtype)


def with_tokenizer(path: Path, out: Path) -> Path:
    shutil.copytree(path, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (out / name).exists():
            shutil.copy(BASE / name, out)
    return out


def everything(model) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", [name for name in STRUCTURES if is_decoder(name)])
def test_what_is_read_part_by_part_is_what_transformers_loads(name, structure, tmp_path) -> None:
    whole, spread = loaded_twice(with_tokenizer(structure(name), tmp_path / "model"))
    if name in FUSED:
        assert spread is None
        return
    assert isinstance(spread, Spread)
    assert all(p.is_meta for p in spread.loaded.model.parameters())
    spread.fill(ALONE)
    same(whole.model, spread.loaded.model)


@pytest.mark.parametrize("kind", ["tied", "relaxed", "sparse", "expanded"])
def test_students_of_ours_are_read_as_they_are_loaded(kind, student) -> None:
    whole, spread = loaded_twice(student(kind), torch.bfloat16)
    assert spread is not None
    spread.fill(ALONE)
    same(whole.model, spread.loaded.model)


def same(one, other) -> None:
    first, second = everything(one), everything(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("start", ["default", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_drawn_alike_for_a_model_without_values(start, dtype) -> None:
    whole, spread = loaded_twice(BASE, dtype)
    found = []
    for model in (whole.model, spread.loaded.model):
        settings = settings_of(train="lora", lora_init=start, seed=5)
        lora = make_trainable(model, open_checkpoint(BASE), settings).lora
        found.append({name: model.get_parameter(name) for name in lora.names()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert value.dtype == found[1][name].dtype == torch.float32
        assert torch.equal(value, found[1][name]), name


def test_a_weight_that_is_no_number_is_named(tmp_path) -> None:
    out = tmp_path / "model"
    shutil.copytree(BASE, out)
    tensor = open_checkpoint(out).tensors["model.layers.1.mlp.up_proj.weight"]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset + tensor.nbytes - 2)
        file.write(b"\xc0\x7f")  # bfloat16's NaN
    _, spread = loaded_twice(out)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        spread.fill(ALONE)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_process_holds_half_of_the_models(mode, student, tmp_path) -> None:
    """Of two: its shards, one gathered layer with the root, and what trains of LoRA."""
    options = {"train": mode, "teacher": str(student("stacked"))}
    in_two(TESTS / "spreading.py", student("stacked"), tmp_path, json.dumps(options))
    for rank in range(2):
        told = json.loads((tmp_path / f"told{rank}.json").read_text())
        assert told["meta"] == 0
        assert told["read"] <= told["whole"] / 2 + told["uneven"]
        assert told["local"] <= told["whole"] / 2 + told["trained"] + told["uneven"]
        gathered = 2 * (told["root"] + 2 * told["layer"])  # copied in, copied out; one ahead
        assert told["peak"] <= told["local"] + told["trained"] + gathered
        assert told["peak"] < 0.8 * told["whole"]
