"""Checkpoints that carry one of our model classes: the installed one runs, never the copy."""

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

FORMAT = re.compile(rb"^FORMAT = (\d+)", re.MULTILINE)
# model_type: the module, and its classes of config and model.
CLASSES = {
    "recursive": ("modeling_recursive", "RecursiveConfig", "RecursiveForCausalLM"),
    "factored": ("modeling_factored", "FactoredConfig", "FactoredForCausalLM"),
}


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a config names one of our model classes."""
    return config.get("model_type") in CLASSES


def own_classes(root: Path, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the classes of config and model that a checkpoint of ours is for.

    The file beside the weights is not run. It has to be of the installed one's format, so that
    what is looked at here is what it computes elsewhere; that its bytes are those that were
    written is for the record to tell.

    Raises:
        CheckpointError: the file is missing, or of another format.
    """
    module, *names = CLASSES[str(config["model_type"])]
    place, own = root / f"{module}.py", files("surgery.models") / f"{module}.py"
    if not place.is_file():
        remedy = "copy the checkpoint again"
        raise CheckpointError(place, "is missing, and the config asks for it", remedy)
    if _format(place.read_bytes()) != _format(own.read_bytes()):
        fact = "is not of the installed version's format, and code of a checkpoint is not run"
        raise CheckpointError(place, fact, "use the version in surgery.json, or make it again")
    found = import_module(f"surgery.models.{module}")
    first, second = (getattr(found, name) for name in names)
    return first, second


def _format(source: bytes) -> bytes | None:
    match = FORMAT.search(source)
    return match[1] if match else None


def own_model_class(model_type: str) -> Any:  # noqa: ANN401 - a class, or None
    """Return our model class of a type, or None."""
    if model_type not in CLASSES:
        return None
    module, _, name = CLASSES[model_type]
    return getattr(import_module(f"surgery.models.{module}"), name)
