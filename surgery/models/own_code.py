"""Checkpoints that carry one of our model classes: the installed one runs, never the copy."""

import re
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError

FORMAT = re.compile(rb"^FORMAT = (\d+)", re.MULTILINE)
IMPORT = re.compile(rb"^from \.(\w+) import", re.MULTILINE)
# model_type: the module, and its classes of config and model.
CLASSES = {
    "recursive": ("modeling_recursive", "RecursiveConfig", "RecursiveForCausalLM"),
    "factored": ("modeling_factored", "FactoredConfig", "FactoredForCausalLM"),
    "linearized": ("modeling_linearized", "LinearizedConfig", "LinearizedForCausalLM"),
}


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a config names one of our model classes."""
    return config.get("model_type") in CLASSES


def code_files(module: str) -> dict[str, bytes]:
    """Return the installed files of a model class by name: its own, and those that it imports."""
    found, wanted = dict[str, bytes](), [module]
    while wanted:
        name = f"{wanted.pop()}.py"
        if name not in found:
            found[name] = (files("surgery.models") / name).read_bytes()
            wanted += [part.decode() for part in IMPORT.findall(found[name])]
    return dict(sorted(found.items()))


def own_classes(root: Path, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the classes of config and model that a checkpoint of ours is for.

    The files beside the weights are not run. They have to be of the installed ones' formats, so
    that what is looked at here is what they compute elsewhere; that their bytes are those that were
    written is for the record to tell.

    Raises:
        CheckpointError: a file is missing, or of another format.
    """
    module, *names = CLASSES[str(config["model_type"])]
    for name, own in code_files(module).items():
        _check_file(root / name, own)
    found = import_module(f"surgery.models.{module}")
    first, second = (getattr(found, name) for name in names)
    return first, second


def _check_file(place: Path, own: bytes) -> None:
    if not place.is_file():
        remedy = "copy the checkpoint again"
        raise CheckpointError(place, "is missing, and the config asks for it", remedy)
    if _format(place.read_bytes()) != _format(own):
        fact = "is not of the installed version's format, and code of a checkpoint is not run"
        raise CheckpointError(place, fact, "use the version in surgery.json, or make it again")


def _format(source: bytes) -> bytes | None:
    match = FORMAT.search(source)
    return match[1] if match else None


def own_model_class(model_type: str) -> Any:  # noqa: ANN401 - a class, or None
    """Return our model class of a type, or None."""
    if model_type not in CLASSES:
        return None
    module, _, name = CLASSES[model_type]
    return getattr(import_module(f"surgery.models.{module}"), name)
