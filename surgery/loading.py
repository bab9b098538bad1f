"""Ask transformers whether it would load a checkpoint whole, without holding a weight."""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.adapter_source import AdapterSource
from surgery.errors import CheckpointError
from surgery.models.own_code import is_own, own_classes, own_model_class

MAX_LAYERS = 10_000  # of any tower; more would be built for minutes
COUNTED = re.compile(r"^(n|num)_.*(layers?|blocks)$|^(n_layer|depth|\w*coder_layers)$")
CONVERSION = re.compile(r"^(\S+)\s*\|\s*CONVERSION", re.MULTILINE)
LOGGER = "transformers.modeling_utils"


class CannotTell(Exception):
    """transformers cannot be asked about this checkpoint here; the message says why."""


def loading_problems(checkpoint: Checkpoint) -> list[str]:
    """Build the model on the meta device and return what is missing, left over or misshapen.

    transformers' own loader does it, its conversions between names on disk and in memory
    included. It maps the files, and parameters have shapes but no storage, so that the memory
    used does not grow with the model.
    No code of the checkpoint is run and the network is not used.

    Raises:
        CannotTell: a bare file, no config, a model that needs its own code or a missing package.
        CheckpointError: transformers cannot build the model that the config describes.
    """
    config = _askable(checkpoint)
    _check_counts(config, checkpoint)
    with _captured() as report:
        try:
            info = _load(checkpoint, config)
        except ImportError as error:
            raise CannotTell(f"transformers needs a package: {_first_line(error)}") from error
        except CannotTell:
            raise
        except Exception as error:  # a bad checkpoint makes it raise nearly any type
            return _conversions(report) or _refusal(checkpoint, config, error)
    return _told(info)


def empty_model(checkpoint: Checkpoint) -> Any:  # noqa: ANN401 - transformers' own
    """Return the model that a checkpoint's config describes, on the meta device.

    Raises:
        CannotTell: as `loading_problems`.
        CheckpointError: transformers cannot build it.
    """
    import torch

    config = _askable(checkpoint)
    _check_counts(config, checkpoint)
    with _captured():
        try:
            known = _known_config(checkpoint, config)
            kind = _model_class(config, known)
            with torch.device("meta"):
                return kind.from_config(known) if hasattr(kind, "from_config") else kind(known)
        except ImportError as error:
            raise CannotTell(f"transformers needs a package: {_first_line(error)}") from error
        except Exception as error:  # a bad config makes it raise nearly any type
            fact = f"transformers cannot build the model ({_first_line(error)})"
            raise CheckpointError(checkpoint.root, fact) from error


def _askable(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    if checkpoint.adapters:
        raise CannotTell("adapters are added when it is read; `surgery lora fuse` writes it out")
    if isinstance(checkpoint, AdapterSource):
        raise CannotTell("an adapter, which peft loads onto its base")
    if config is None:
        raise CannotTell("there is no config.json, which would say what to build")
    if (checkpoint.root / "adapter_config.json").exists():
        raise CannotTell("transformers would load the adapter that adapter_config.json names")
    single = [f for f in checkpoint.files if f.name == "model.safetensors"]
    if (checkpoint.root / "model.safetensors").exists() and not single:
        raise CannotTell("transformers would read model.safetensors, not the weights chosen")
    if is_own(config):
        own_classes(checkpoint.root, config)
    elif config.get("auto_map"):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if config.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise CannotTell("needs its own code, which is not run")
    return config


def _check_counts(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse numbers of layers, in any part of the config, that nobody could build."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, checkpoint)
            continue
        counted = type(value) is int and COUNTED.match(key)
        if counted and value > max(len(checkpoint.tensors), MAX_LAYERS):
            fact = f"has {key} = {value:.3g}, for {len(checkpoint.tensors)} tensors"
            raise CheckpointError(checkpoint.root / "config.json", fact, "restore the config")


def _known_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the config as transformers, or a model class of ours, reads it."""
    import transformers

    own = is_own(config)
    kind = own_classes(checkpoint.root, config)[0] if own else transformers.AutoConfig
    local = {"local_files_only": True, "trust_remote_code": False}
    return kind.from_pretrained(checkpoint.root, **local)


def _load(checkpoint: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:

    local = {"local_files_only": True, "trust_remote_code": False}
    known = _known_config(checkpoint, config)
    info: dict[str, Any]
    _, info = _model_class(config, known).from_pretrained(
        checkpoint.root,
        config=known,
        device_map="meta",
        dtype="auto",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        use_safetensors=True,
        **local,
    )
    return info


def _model_class(config: Mapping[str, Any], known: Any) -> Any:  # noqa: ANN401 - transformers' own
    """Return the class that the config names, or the Auto class that fits its type."""
    import transformers

    own = own_model_class(str(config.get("model_type")))
    if own is not None:
        return own
    names = config.get("architectures")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
            found = getattr(transformers, name, None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
    mappings = (
        (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
        (
            transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            transformers.AutoModelForImageTextToText,
        ),
    )
    return next((auto for kinds, auto in mappings if type(known) in kinds), transformers.AutoModel)


def _told(info: Mapping[str, Any]) -> list[str]:
    shapes = [
        f"{name}: has shape {list(stored)}, the config says {list(built)}"
        for name, stored, built in sorted(info.get("mismatched_keys") or ())
    ]
    return [
        *(f"{name}: missing, the config asks for it" for name in sorted(info["missing_keys"])),
        *(
            f"{name}: left over, the model has no place for it"
            for name in sorted(info["unexpected_keys"])
        ),
        *shapes,
        *(str(message) for message in info.get("error_msgs") or ()),
    ]


def _conversions(report: list[str]) -> list[str]:
    """Name the modules whose tensors could not be joined (experts stored one by one)."""
    names = [name for text in report for name in CONVERSION.findall(text)]
    return [f"{name}: cannot be put together from the tensors on disk" for name in names]


def _refusal(checkpoint: Checkpoint, config: Mapping[str, Any], error: Exception) -> list[str]:
    quantisation = config.get("quantization_config")
    if quantisation is not None:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        told = f"is quantised ({method}), which cannot be checked here: {_first_line(error)}"
        raise CannotTell(told) from error
    fact = f"transformers cannot build the model ({_first_line(error)})"
    raise CheckpointError(checkpoint.root, fact) from error


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    text = next(filter(None, lines), "")
    return f"{type(error).__name__}: {text}"[:300].rstrip(":. ")


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Keep transformers off the terminal and collect the report of its loader."""
    from transformers.utils import logging as theirs

    logger = logging.getLogger(LOGGER)
    collector = _Collector()
    level, bar = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    before = logger.level, logger.propagate
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield collector.texts
    finally:
        logger.removeHandler(collector)
        logger.setLevel(before[0])
        logger.propagate = before[1]
        theirs.set_verbosity(level)
        if bar:
            theirs.enable_progress_bar()
