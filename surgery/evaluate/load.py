"""Models and tokenizers through transformers, from local files, whole or not at all."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import CheckpointError, RecipeError, TrainError
from surgery.evaluate.tokens import Mark, find_mark
from surgery.lora.fuse import fuse
from surgery.models.own_code import is_own, own_classes, own_model_class
from surgery.run import run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Tokenizers without a limit say so with an enormous number.
_NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that is known but not loaded.

    Attributes:
        ref: What the user typed.
        name: Its last part.
        path: The directory on this machine.
        revision: The commit of a hub ref.
        config: The transformers config.
        tokenizer: The transformers tokenizer.
        mark: The beginning-of-sequence mark.
        limit: The longest input in tokens, or None where neither config nor tokenizer tells.
    """

    ref: str
    name: str
    path: Path
    revision: str | None
    config: "PreTrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    mark: Mark
    limit: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory, ready for forward passes on its device.

    Attributes:
        path: Where it came from.
        model: The transformers model, in evaluation mode.
        device: Where it is.
        dtype: What it computes in.
        parameters: How many numbers it holds; a tied one counts once.
        embeddings: Rows of the input embedding: token ids stay below it.
        vocabulary: Width of the logits.
    """

    path: Path
    model: "PreTrainedModel"
    device: "torch.device"
    dtype: str
    parameters: int
    embeddings: int
    vocabulary: int


def open_source(ref: str | Path, scratch: ExitStack) -> Source:
    """Read a model's headers, config and tokenizer, without its weights.

    A base with adapters is written out as one model, which is gone when `scratch` closes.

    Raises:
        CheckpointError: Something is missing, broken or not understood.
    """
    from transformers import AutoConfig, AutoTokenizer

    found = open_checkpoint(ref)
    _check_parts(found)
    path = _fused(found, scratch) if found.adapters else found.root
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    own = is_own(found.config or {})
    auto = own_classes(found.root, found.config or {})[0] if own else AutoConfig
    with quiet():
        config = _attempt(path, "config", lambda: auto.from_pretrained(path, **local))
        if own:  # transformers would read it again, and ask for trust
            local |= {"config": config}
        tokenizer = _attempt(
            path, "tokenizer", lambda: AutoTokenizer.from_pretrained(path, **local)
        )
    return Source(
        ref=found.ref,
        name=found.name,
        path=path,
        revision=found.revision,
        config=config,
        tokenizer=tokenizer,
        mark=find_mark(tokenizer),
        limit=_limit(config, tokenizer),
    )


def find_device(name: str) -> "torch.device":
    """Return the device of that name, if this machine has it.

    Raises:
        RecipeError: There is no such device here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError("--device", f"{name} is not a device of this machine", "try cpu") from (
            error
        )
    return device


def find_dtype(name: str | None, device: "torch.device") -> "torch.dtype | str":
    """Return the dtype to compute in: the stored one on a GPU, float32 on the CPU by default.

    Raises:
        RecipeError: The name is not a floating dtype.
    """
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else "auto"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        remedy = "give float32, bfloat16, float16 or float64"
        raise RecipeError("--dtype", f"{name} is not a dtype to compute in", remedy)
    return dtype  # type: ignore[no-any-return]


def load(
    source: Source, *, device: "torch.device", dtype: "torch.dtype | str", empty: bool = False
) -> Loaded:
    """Load the weights, refusing any tensor that is missing, left over or of another shape.

    Args:
        empty: only look whether they would load; the model stays on the meta device.

    Raises:
        TrainError: transformers cannot load the model whole, or it is not a causal language model.
    """
    auto = _auto_class(source.config)
    with quiet():
        model, info = _attempt(
            source.path,
            "model",
            lambda: auto.from_pretrained(
                source.path,
                config=source.config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                **({"device_map": "meta"} if empty else {}),
            ),
        )
    _check_whole(source.path, info)
    if not empty:
        _attempt(source.path, "model", lambda: model.to(device))
    model.eval()
    head, rows = model.get_output_embeddings(), model.get_input_embeddings().weight.shape[0]
    return Loaded(
        path=source.path,
        model=model,
        device=device,
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(p.numel() for p in model.parameters()),
        embeddings=rows,
        vocabulary=rows if head is None else head.weight.shape[0],
    )


def _check_parts(found: Checkpoint) -> None:
    if found.bare:
        remedy = "put it in a directory with its config.json and tokenizer"
        raise CheckpointError(found.ref, "a weight file alone cannot be evaluated", remedy)
    if found.config is None:
        raise CheckpointError(found.root, "there is no config.json", "add the model's")
    if not any((found.root / name).is_file() for name in _TOKENIZER_FILES):
        remedy = "copy tokenizer.json and tokenizer_config.json from the model it was made from"
        raise CheckpointError(found.root, "there is no tokenizer", remedy)


def _fused(found: Checkpoint, scratch: ExitStack) -> Path:
    folder = Path(scratch.enter_context(TemporaryDirectory(prefix="surgery-")))
    return run(fuse(found), folder / "fused").out


def _auto_class(config: "PreTrainedConfig") -> Any:  # noqa: ANN401 - one of two classes
    """Return the class that loads every part of the model, those for images included."""
    import transformers

    own = own_model_class(config.model_type)
    if own is not None:
        return own
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _limit(config: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> int | None:
    text = config.get_text_config(decoder=True)
    told = (getattr(text, "max_position_embeddings", None), tokenizer.model_max_length)
    limits = [int(n) for n in told if n and 0 < n < _NO_LIMIT]
    return min(limits, default=None)


def _check_whole(path: Path, info: dict[str, Any]) -> None:
    for kind, word in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "left over"),
        ("mismatched_keys", "of another shape than the config says"),
        ("error_msgs", "not readable"),
    ):
        names = sorted(k if isinstance(k, str) else k[0] for k in info.get(kind) or ())
        if names:
            fact = f"tensors are {word}: {_listed(names)}"
            raise TrainError(path, fact, "mend the checkpoint; its figures would be noise")


def _listed(names: list[str]) -> str:
    first, more = names[:3], len(names[3:])
    return ", ".join(first) + (f" and {more} more" if more else "")


def _attempt(path: Path, what: str, action: Callable[[], T]) -> T:
    """Run a step of transformers; whatever it raises becomes one sentence of ours.

    It raises nearly any type for a bad checkpoint (KeyError, TypeError, SafetensorError and many
    more), so nothing narrower than Exception will do.
    """
    try:
        return action()
    except Exception as error:
        kind = CheckpointError if what in {"config", "tokenizer"} else TrainError
        raise kind(path, f"transformers cannot load the {what} ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    """Return an error of another library as half a line: its kind and its first words."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    text = next((line for line in lines if line), "")
    return f"{type(error).__name__}: {text}"[:300].rstrip(":. ")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing on the terminal; put its settings back afterwards."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
