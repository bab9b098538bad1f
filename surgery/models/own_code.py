"""Checkpoints that carry one of our model classes: the installed one runs, never the copy."""

from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

# model_type: the module, and its classes of config and model.
CLASSES = {"recursive": ("modeling_recursive", "RecursiveConfig", "RecursiveForCausalLM")}


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a config names one of our model classes."""
    return config.get("model_type") in CLASSES


def own_classes(root: Path, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the classes of config and model that a checkpoint of ours is for.

    The file beside the weights is not run. It has to be the installed one to the byte, since
    whoever trusts it elsewhere would compute something else than what is looked at here.

    Raises:
        CheckpointError: the file is missing, or another.
    """
    module, *names = CLASSES[str(config["model_type"])]
    place, own = root / f"{module}.py", files("surgery.models") / f"{module}.py"
    if not place.is_file():
        remedy = "copy the checkpoint again"
        raise CheckpointError(place, "is missing, and the config asks for it", remedy)
    if place.read_bytes() != own.read_bytes():
        fact = "is not this version's file of that name, and code of a checkpoint is not run"
        raise CheckpointError(place, fact, "use the version in surgery.json, or make it again")
    found = import_module(f"surgery.models.{module}")
    first, second = (getattr(found, name) for name in names)
    return first, second


def own_model_class(model_type: str) -> Any:  # noqa: ANN401 - a class, or None
    """Return our model class of a type, or None."""
    if model_type not in CLASSES:
        return None
    module, _, name = CLASSES[model_type]
    return getattr(import_module(f"surgery.models.{module}"), name)
