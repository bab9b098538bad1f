"""What a run has to remember: what it trains, its optimisers, its random numbers.

Names are those of parameters; nothing tells how many processes there were. Hyperparameters are
not kept: they follow from the settings and the step.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, TrainError
from surgery.recover.chance import random_states, restore_random_states
from surgery.recover.distributed import World
from surgery.recover.saved import Saved

if TYPE_CHECKING:
    import torch

    Parameters = Mapping[str, torch.Tensor]
    Optimizers = Sequence[torch.optim.Optimizer]

WEIGHTS, MOMENTS, NUMBERS, CHANCE = "weights", "optimizer", "optimizer_numbers", "random"


def training_state(
    parameters: "Parameters", optimizers: "Optimizers", world: World, **facts: object
) -> dict[str, Any]:
    """Return the state of a run for `Checkpoints.save`; tensors are referred to, not copied.

    Args:
        parameters: everything that trains, by name, as it is now (after sharding).
        facts: further sections, of JSON values.

    Raises:
        TrainError: an optimiser has a state that cannot be kept.
    """
    moments: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for name, _, key, value in _moments(parameters, optimizers):
        if isinstance(value, int | float):
            numbers[f"{name}/{key}"] = value
            continue
        moments.update(_plain(f"{name}/{key}", value))
    return {
        WEIGHTS: dict(parameters),
        MOMENTS: moments,
        NUMBERS: numbers,
        CHANCE: random_states(world),
        **facts,
    }


def restore(
    saved: Saved,
    parameters: "Parameters",
    optimizers: "Optimizers",
    world: World,
    *,
    chance: bool = True,
) -> None:
    """Copy a saved state into a run of any number of processes.

    Args:
        chance: random numbers too; a run that only goes back to good weights keeps its own.

    Raises:
        CheckpointError: it is of other parameters or another optimiser.
    """
    strange = sorted(set(saved.tensors.get(WEIGHTS, {})) - set(parameters))
    if strange:
        fact = f"holds {strange[0]!r}, which the run does not train"
        raise CheckpointError(saved.folder / f"{WEIGHTS}.safetensors", fact)
    _restore_moments(saved, parameters, optimizers)
    for name, parameter in parameters.items():
        saved.fill(WEIGHTS, name, parameter.detach())
    if chance:
        restore_random_states(saved, CHANCE, world)


def _restore_moments(saved: Saved, parameters: "Parameters", optimizers: "Optimizers") -> None:
    left = {*saved.tensors.get(MOMENTS, {}), *saved[NUMBERS]}
    known = {full[:at] for full in left for at, letter in enumerate(full) if letter == "/"}
    names = _names(parameters)
    for optimizer in optimizers:
        _make_moments(optimizer, names, known)
    for name, state, key, value in list(_moments(parameters, optimizers)):
        full = f"{name}/{key}"
        if isinstance(value, int | float):
            if full in saved[NUMBERS]:
                state[key] = saved[NUMBERS][full]
            left.discard(full)
            continue
        for part, tensor in _plain(full, value).items():
            saved.fill(MOMENTS, part, tensor)
            left.discard(part)
    if left:
        fact = f"holds {min(left)!r}, which the optimiser does not have"
        raise CheckpointError(saved.folder / f"{MOMENTS}.safetensors", fact)


def _make_moments(
    optimizer: "torch.optim.Optimizer", names: Mapping[int, str], known: set[str]
) -> None:
    """Let an optimiser make the states that were saved, by a step whose values are replaced.

    It alone knows their kinds and where they lie; parameters that never had a gradient get none.
    """
    import torch

    chosen = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = [p for p in chosen if _name(p, names) in known]
    if any(p not in optimizer.state for p in wanted):
        for parameter in wanted:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for parameter in chosen:
        if _name(parameter, names) not in known:
            optimizer.state.pop(parameter, None)


def _moments(
    parameters: "Parameters", optimizers: "Optimizers"
) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
    """Yield parameter name, its state, and the state's keys and values."""
    names = _names(parameters)
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                yield _name(parameter, names), state, key, value


def _names(parameters: "Parameters") -> dict[int, str]:
    return {id(parameter): name for name, parameter in parameters.items()}


def _name(parameter: "torch.Tensor", names: Mapping[int, str]) -> str:
    if id(parameter) not in names:
        fact = "trains a parameter that the run does not name"
        raise TrainError("the optimiser", fact, "make it after the model is sharded")
    return names[id(parameter)]


def _plain(name: str, value: object) -> "dict[str, torch.Tensor]":
    """Return a state as tensors that a file can hold: quantised ones in their parts.

    Raises:
        TrainError: it is of a kind that cannot be kept.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not isinstance(value, torch.Tensor):
        fact = f"keeps {name} as a {type(value).__name__}, which is no tensor or number"
        raise TrainError("the optimiser", fact, "take another --optimizer")
    if isinstance(value, DTensor):
        if is_traceable_wrapper_subclass(value.to_local()):
            fact = f"keeps {name} quantised in shards, which depends on the number of processes"
            raise TrainError("the optimiser", fact, "take --optimizer adamw, or one process")
        return {name: value}
    if not is_traceable_wrapper_subclass(value):
        return {name: value}
    inner, _ = value.__tensor_flatten__()
    found: dict[str, torch.Tensor] = {}
    for part in inner:
        found.update(_plain(f"{name}/{part}", getattr(value, part)))
    return found
