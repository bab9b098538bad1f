"""The models that benchmarks.linear_speed measures: shapes, methods, random weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.linear_speed_page import LENGTHS, SOFTMAX
from surgery.linearize.config import linearized_config
from surgery.linearize.methods import METHODS, full_spec
from surgery.linearize.parameters import Sizes
from surgery.models.linear_kernels import installed
from surgery.models.modeling_linearized import LinearizedConfig, LinearizedForCausalLM

REPEATS = 5  # of which the best counts, where one is short


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder, and how much time and memory its figures may take.

    Attributes:
        context: tokens before the one that is decoded.
        steps: tokens decoded, the first to warm up; the rest several times where there is time.
        limit: seconds; a longer text is not tried when it would take more.
        rows: at most so many are decoded at once.
        piece: tokens of a step of the transfer stage.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    dtype: str
    context: int
    steps: int
    limit: float
    rows: int
    piece: int

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def room(self) -> int:
        """Tokens that a cache has to hold."""
        return self.context + REPEATS * self.steps


SHAPES = {
    "tiny": Shape(128, 2, 4, 2, 256, 512, "float32", 4096, 32, 10.0, 512, 1024),
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, "bfloat16", 32768, 32, 20.0, 4096, 4096),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, "bfloat16", 32768, 16, 30.0, 4096, 4096),
}


@dataclass(frozen=True, slots=True)
class Arm:
    """A line of the tables."""

    method: str
    kernels: str = "torch"

    @property
    def name(self) -> str:
        """As the tables have it."""
        return self.method if self.kernels == "torch" else f"{self.method}, {self.kernels}"


def arms(device: str, only: str | None) -> list[Arm]:
    """Return softmax, every method, and those with sums once more with kernels where they run."""
    found = [Arm(SOFTMAX), *(Arm(name) for name in METHODS)]
    if device == "cuda" and installed():
        found += [Arm(name, "fla") for name in METHODS if name != "swa-sink"]
    return [arm for arm in found if only is None or arm.method in {SOFTMAX, *only.split(",")}]


def build(arm: Arm, shape: Shape, device: str) -> Any:  # noqa: ANN401
    """Return a model with random weights."""
    stock = {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2 * LENGTHS[-1],
        "dtype": shape.dtype,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    with torch.device(device):
        if arm.method == SOFTMAX:
            config = AutoConfig.for_model(**stock)
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
        sizes = Sizes(
            hidden=shape.hidden,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
        )
        mixer = full_spec(METHODS[arm.method], {}, sizes) | {"kernels": arm.kernels}
        told = linearized_config(stock, linear_layers=range(shape.layers), mixer=mixer)
        config = LinearizedConfig.from_dict(told)
        return LinearizedForCausalLM(config).to(getattr(torch, shape.dtype))
