"""Packages that are not needed: logs, kernels, 8-bit optimisers; stand-ins take their places."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch

from cli.main import main
from recovering import ask_of, figures, losses, recovered, words
from surgery.errors import RecipeError, TrainError
from surgery.recover import kernels, logs
from surgery.recover.ask import check_ask


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Put a module where an import finds it, and its parents."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        stand_in(monkeypatch, parent)


@pytest.fixture
def board(monkeypatch) -> dict[str, Any]:
    """What TensorBoard is given."""
    seen: dict[str, Any] = {"scalars": [], "closed": 0, "purged": []}

    class SummaryWriter:
        def __init__(self, place: str, purge_step: int) -> None:
            seen["place"] = place
            seen["purged"].append(purge_step)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen["scalars"].append((step, name, value))

        def close(self) -> None:
            seen["closed"] += 1

    stand_in(monkeypatch, "tensorboard")
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return seen


@pytest.fixture
def bench(monkeypatch) -> dict[str, Any]:
    """What W&B is given."""
    seen: dict[str, Any] = {"rows": [], "begun": [], "finished": 0}

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            seen["rows"].append((step, values))

        def finish(self) -> None:
            seen["finished"] += 1

    def init(**options: Any) -> Run:
        seen["begun"].append(options)
        return Run()

    stand_in(monkeypatch, "wandb", init=init)
    return seen


def test_tensorboard_gets_every_number_of_every_step(board, student, tmp_path) -> None:
    out = tmp_path / "out"
    recovered(student("pruned"), out, logs=("tensorboard",))
    lines = figures(out)
    told = {(step, name): value for step, name, value in board["scalars"]}
    assert [told[step, "loss"] for step in range(8)] == [line["loss"] for line in lines]
    assert {name for _, name in told} == {
        name for name, value in lines[0].items() if type(value) in {int, float}
    } - {"step"}
    assert board["place"] == str(tmp_path / "out.surgery-run" / "tensorboard")
    assert board["closed"] == 1
    assert board["purged"] == [0]


def test_wandb_goes_on_with_its_run(bench, student, tmp_path) -> None:
    out = tmp_path / "out"
    for tokens in (4, 8):
        recovered(student("pruned"), out, logs=("wandb",), tokens=tokens * 256,
                  schedule="constant", force=True)  # fmt: skip
    assert [step for step, _ in bench["rows"]] == list(range(8))
    assert [values["loss"] for _, values in bench["rows"]] == losses(out)
    first, again = bench["begun"]
    assert first["id"] == again["id"]
    assert first["config"]["train"] == "lora"
    assert bench["finished"] == 2


def test_wandb_that_does_not_begin_ends_the_run_in_one_sentence(
    monkeypatch, student, tmp_path
) -> None:
    def init(**_: Any) -> None:
        raise ConnectionError("no key")

    stand_in(monkeypatch, "wandb", init=init)
    with pytest.raises(TrainError, match=r"--log wandb: does not begin \(ConnectionError: no key"):
        recovered(student("pruned"), tmp_path / "out", logs=("wandb",))


def test_what_json_does_not_have_is_not_drawn() -> None:
    told = {"step": 3, "loss": math.nan, "lr": 1e-3, "verdict": "skip", "tokens": 5, "flag": True}
    assert logs._numbers(told) == {"lr": 1e-3, "tokens": 5}


@pytest.fixture
def bare(monkeypatch) -> None:
    """No package but those that are needed."""
    for module in (logs, kernels):
        monkeypatch.setattr(module, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--log", "tensorboard"), "--log tensorboard: needs the tensorboard package, which is not "
         "installed; run: pip install 'model-surgery[tensorboard]'"),
        (("--log", "paper"), "--log paper: is none of tensorboard, wandb"),
        (("--log", "wandb"), "pip install 'model-surgery[wandb]'"),
        (("--kernels", "liger", "--device", "cuda"), "pip install 'model-surgery[liger]'"),
        (("--kernels", "liger"), "--kernels liger: runs on CUDA alone, and --device is cpu"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("bare")
def test_a_missing_package_is_told_before_anything(
    more, sentence, student, tmp_path, capsys
) -> None:
    assert main(words(student("pruned"), tmp_path / "out", *more)) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def liger(monkeypatch: pytest.MonkeyPatch, gain: float | None) -> dict[str, Any]:
    """Kernels that scale what each norm gives; None for a package that does not know the model."""
    seen: dict[str, Any] = {}

    def apply(model: Any, **options: Any) -> None:
        seen.update(options)
        for module in model.modules() if gain is not None else ():
            if "RMSNorm" in type(module).__name__:
                real = type(module).forward

                def forward(self: Any, x: torch.Tensor, real: Any = real) -> torch.Tensor:
                    return real(self, x) * gain

                module.forward = MethodType(forward, module)

    stand_in(monkeypatch, "liger_kernel.transformers", _apply_liger_kernel_to_instance=apply)
    monkeypatch.setattr(kernels, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(kernels, "find_spec", lambda name: ModuleSpec(name, None))
    return seen


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_kernels_that_compute_the_same_are_taken(mode, monkeypatch, student, tmp_path) -> None:
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    recovered(student("pruned"), plain, train=mode)
    seen = liger(monkeypatch, 1.0 + 1e-7)
    done = recovered(student("pruned"), fast, train=mode, kernels="liger")
    assert seen == {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)
    told = json.loads((fast / "surgery.json").read_text())["facts"]["kernels"]
    assert told["loss_with"] == pytest.approx(told["loss"], rel=1e-4)
    assert told["gradient_norm_with"] == pytest.approx(told["gradient_norm"], rel=1e-3)
    assert done.told["kernels"] == told


@pytest.mark.parametrize(
    ("gain", "sentence"),
    [
        (1.2, "--kernels liger: computes a (loss|gradient norm) of"),
        (None, "--kernels liger: has no kernels for models of type llama"),
    ],
)
def test_kernels_that_compute_something_else_are_refused(
    gain, sentence, monkeypatch, student, tmp_path
) -> None:
    liger(monkeypatch, gain)
    with pytest.raises(TrainError, match=sentence):
        recovered(student("pruned"), tmp_path / "out", kernels="liger")


def test_kernels_that_cannot_be_applied_are_refused(monkeypatch, student, tmp_path) -> None:
    liger(monkeypatch, 1.0)

    def apply(**_: Any) -> None:
        raise AttributeError("LlamaThing")

    monkeypatch.setattr(
        sys.modules["liger_kernel.transformers"], "_apply_liger_kernel_to_instance", apply
    )
    with pytest.raises(TrainError, match=r"cannot be applied \(AttributeError: LlamaThing\)"):
        recovered(student("pruned"), tmp_path / "out", kernels="liger")


class Eight(torch.optim.AdamW):
    """AdamW under the name of the packages' 8-bit one."""


class Wrong(torch.optim.SGD):
    def __init__(self, groups: Any, lr: float, betas: Any) -> None:
        super().__init__(groups, lr=lr)


@pytest.mark.parametrize("package", ["torchao.optim", "bitsandbytes.optim"])
def test_an_8_bit_optimiser_that_steps_as_adamw_does_is_taken(
    package, monkeypatch, student, tmp_path
) -> None:
    stand_in(monkeypatch, package, AdamW8bit=Eight)
    for name in ("adamw", "adamw8bit"):
        recovered(student("pruned"), tmp_path / name, optimizer=name, train="full")
    # Its default of weight decay is another; the groups say which.
    assert losses(tmp_path / "adamw8bit") == losses(tmp_path / "adamw")


def test_an_8_bit_optimiser_that_steps_otherwise_is_refused(monkeypatch, student, tmp_path) -> None:
    stand_in(monkeypatch, "torchao.optim", AdamW8bit=Wrong)
    with pytest.raises(TrainError, match="adamw8bit: changes weights by something else than AdamW"):
        recovered(student("pruned"), tmp_path / "out", optimizer="adamw8bit", train="full")


def test_without_a_package_8_bit_adamw_is_refused(monkeypatch, student, tmp_path) -> None:
    for name in ("torchao.optim", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrainError, match="needs torchao or bitsandbytes"):
        recovered(student("pruned"), tmp_path / "out", optimizer="adamw8bit")


def test_an_ask_without_extras_asks_for_no_package(monkeypatch, student, tmp_path) -> None:
    for module in (logs, kernels):
        monkeypatch.setattr(module, "find_spec", pytest.fail)
    check_ask(ask_of(student("pruned"), tmp_path / "out"))
    with pytest.raises(RecipeError, match="runs on CUDA alone"):
        check_ask(ask_of(student("pruned"), tmp_path / "out", kernels="liger"))
