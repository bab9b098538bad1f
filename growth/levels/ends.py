"""What changes with the width beside the mixes: the ends of the model, and its config."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from growth.dimensions import Dimensions
from surgery.anatomy import Anatomy, dig
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError

# Architectures of which the arithmetic of a changed width was compared with transformers'.
WIDTHS = {
    "bert", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral",
    "mixtral", "olmo2", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
}  # fmt: skip
ONE_PLUS = {"gemma", "gemma2", "gemma3_text"}  # gains are stored less one
SCALED_EMBEDDING = {"gemma", "gemma2", "gemma3_text"}  # multiplied by the root of the width
LAST_NORM = re.compile(
    r"(^|\.)(norm|ln_f|final_layer_?norm|predictions\.transform\.LayerNorm)\.(weight|bias)$"
)
# Config entries that tell numbers of units, by dimension.
ENTRIES: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "query": ("num_attention_heads", "n_head"),
    "key": ("num_key_value_heads",),
    "ffn": ("intermediate_size", "n_inner"),
    "expert ffn": ("moe_intermediate_size",),
    "shared ffn": ("shared_expert_intermediate_size",),
}


@dataclass(frozen=True, slots=True)
class Ends:
    """Factors of the tensors outside the layers when the model is halved; inverse when doubled.

    A tied embedding is averaged as what it writes to the stream, while the head would sum: the
    last norm's gain makes up for it, so that the function of a symmetric model stays.

    Attributes:
        embedding: factor of the token embedding.
        last: factor of the norm in front of the head.
        one_plus: norms store their gain less one.
    """

    embedding: float
    last: float
    one_plus: bool

    def factor(self, name: str, parts: Anatomy) -> tuple[float, float]:
        """Return a and b of the tensor's a * x + b."""
        if name == parts.embedding:
            return self.embedding, 0.0
        if parts.locate(name) is None and LAST_NORM.search(name) and self.last != 1.0:
            return self.last, self.last - 1.0 if self.one_plus else 0.0
        return 1.0, 0.0


def ends_of(base: Checkpoint, found: Dimensions) -> Ends:
    """Tell the factors at the ends of a model that is halved in width.

    Raises:
        PlanError: the architecture's arithmetic with its width is not known.
    """
    family = found.heads.family
    if family not in WIDTHS:
        fact = f"is a {family}, whose arithmetic with its width is not known"
        raise PlanError(base.ref, fact, "change its depth alone: --no-width")
    tied = found.parts.head is None and any(
        LAST_NORM.search(name) for name in base.tensors if found.parts.locate(name) is None
    )
    masked = any(name.endswith("predictions.bias") for name in base.tensors)
    tied = tied and (found.parts.tied or masked)
    embedding = math.sqrt(2.0) if family in SCALED_EMBEDDING else 1.0
    return Ends(embedding, 2.0 / embedding if tied else 1.0, family in ONE_PLUS)


def halve_config(config: dict[str, Any], parts: Anatomy, *, keys: bool) -> None:
    """Halve the numbers of units in a config, in place.

    Args:
        keys: key-value heads too; the width of a head stays.
    """
    text = dict(dig(config, parts.section))
    for dimension, names in ENTRIES.items():
        for name in names:
            value = text.get(name)
            if type(value) is int and (dimension != "key" or keys):
                text[name] = value // 2
    _put(config, parts.section, text)


def _put(config: dict[str, Any], section: tuple[str, ...], text: dict[str, Any]) -> None:
    if not section:
        config.update(text)
        return
    inner = config
    for key in section[:-1]:
        inner = inner[key]
    inner[section[-1]] = text
