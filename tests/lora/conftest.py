"""Adapters written by peft itself, with random weights, and what peft makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a plan into a new directory and return it."""
    from surgery.run import run

    def write(plan: Any, name: str = "out", **options: Any) -> Path:
        return run(plan, tmp_path_factory.mktemp("lora") / name, **options).out

    return write


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write an adapter of a model directory: every trained number random, nothing zero."""

    def train(base: Path, *, seed: int = 0, name: str = "adapter", **config: Any) -> Path:
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            model = get_peft_model(load(base), LoraConfig(**config))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn_like(parameter) * 0.1
            out = tmp_path_factory.mktemp("adapters") / name
            model.save_pretrained(out)
        return out

    return train


def load(path: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    vision = hasattr(AutoConfig.from_pretrained(path), "vision_config")
    auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32).eval()


def adapted(base: Path, *adapters: Path) -> Any:
    """The model that peft runs, adapters not merged."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="0")
        for number, path in enumerate(adapters[1:], 1):
            model.load_adapter(path, adapter_name=str(number))
        model.base_model.set_adapter([str(number) for number in range(len(adapters))])
        return model.eval()


def merged(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """What peft's merge_and_unload saves, by the names on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted(base, adapter).merge_and_unload().save_pretrained(out)
    return tensors(out)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) * 7 % 250
    with torch.no_grad():
        return model(input_ids=ids).logits


def missing(base: Path, adapter: Path) -> list[str]:
    """Tensors of the adapter's that peft does not find a place for, and places left empty."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(load(base), adapter, adapter_name="0")
        told = model.load_adapter(adapter, adapter_name="second")
    left = (key for key in told.missing_keys if ".second" in key)
    return [*told.unexpected_keys, *left]


@pytest.fixture(scope="session")
def lab(structure, train, write, tmp_path_factory) -> SimpleNamespace:
    """All of the above, without an import of this file."""
    return SimpleNamespace(
        structure=structure,
        train=train,
        write=write,
        fresh=lambda: tmp_path_factory.mktemp("fresh") / "out",
        missing=missing,
        load=load,
        adapted=adapted,
        merged=merged,
        tensors=tensors,
        logits=logits,
    )
