"""A linearized checkpoint, opened to be written in the layout of another class."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError, PlanError
from surgery.linearize.attention import Attention, find_attention
from surgery.linearize.config import check_config, is_linearized, stock_config
from surgery.plan import Function, Step, TensorSpec

# Before attention and before the feed-forward part one RMSNorm each, whose weights multiply.
PLAIN = ("llama", "mistral", "qwen2", "qwen3")
SILU = ("silu", "swish")
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Linearized:
    """A model some of whose layers are linear.

    Attributes:
        stock: the flat config of the model with softmax attention everywhere.
        linear: numbers of the layers with a mixer.
    """

    source: Checkpoint
    stock: Mapping[str, Any]
    attention: Attention
    linear: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """Numbers of the layers with softmax attention."""
        return tuple(n for n in range(self.attention.parts.layers) if n not in self.linear)

    def tensor(self, layer: int, rest: str) -> TensorInfo:
        """A tensor of a layer.

        Raises:
            CheckpointError: it is missing.
        """
        name = self.attention.parts.stack.name(layer, rest)
        if name not in self.source.tensors:
            raise CheckpointError(self.source.ref, f"has no {name}", "restore the weights")
        return self.source.tensors[name]

    def inside(self, layer: int) -> tuple[str, ...]:
        """Names of a layer's tensors, without what is before all of them."""
        return self.attention.parts.stack.layers[layer]

    def outside(self) -> Iterator[TensorInfo]:
        """Yield the tensors of no layer."""
        parts = self.attention.parts
        return (t for name, t in self.source.tensors.items() if parts.locate(name) is None)


def open_linearized(source: Checkpoint, *, method: str, to: str) -> Linearized:
    """Return an opened checkpoint of that method, if its architecture has nothing of its own.

    Raises:
        PlanError: it is another one, or a part of it has no place in `to`.
        CheckpointError: it is damaged.
    """
    if not is_linearized(source):
        raise PlanError(source.ref, "is no linearized model", "surgery linearize makes one")
    config = check_config(source)
    own = config["mixer"].get("method")
    if own != method:
        fact = f"is of the method {own}, and {to} computes {method} alone"
        raise PlanError(source.ref, fact, "keep the checkpoint as it is: it carries its code")
    stock = stock_config(config)
    family = stock["model_type"]
    if family not in PLAIN:
        fact = f"is of the architecture {family}, whose norms or layers {to} does not have"
        raise PlanError(source.ref, fact, f"exported are {', '.join(PLAIN)}")
    attention = find_attention(source, stock, rope=False)
    opened = Linearized(
        source=source, stock=stock, attention=attention, linear=tuple(config["linear_layers"])
    )
    _check(opened, to)
    return opened


def _check(opened: Linearized, to: str) -> None:
    source, stock = opened.source, opened.stock
    if stock.get("hidden_act", "silu") not in SILU:
        fact = f"activates its feed-forward parts by {stock['hidden_act']}, {to} by silu"
        raise PlanError(source.ref, fact)
    biased = next((n for n in source.tensors if n.endswith(("_proj.bias", "norm.bias"))), None)
    if biased is not None:
        raise PlanError(source.ref, f"has the bias {biased}, for which {to} has no place")
    if not isinstance(stock.get("rms_norm_eps"), int | float):
        raise PlanError(source.ref, "does not tell its rms_norm_eps", "write it into config.json")


def sizes_of(opened: Linearized) -> dict[str, Any]:
    """Return the entries of a config that every class of decoders reads alike."""
    stock, parts = opened.stock, opened.attention.parts
    assert parts.embedding is not None  # noqa: S101 - a decoder has one
    told: dict[str, Any] = {
        "hidden_size": opened.attention.sizes.hidden,
        "intermediate_size": opened.tensor(0, "mlp.gate_proj.weight").shape[0],
        "num_hidden_layers": parts.layers,
        "vocab_size": opened.source.tensors[parts.embedding].shape[0],
        "tie_word_embeddings": bool(parts.tied or stock.get("tie_word_embeddings", False)),
    }
    told |= {key: stock.get(key) for key in IDS}
    more = ("max_position_embeddings", "initializer_range", "use_cache")
    told |= {key: stock[key] for key in more if key in stock}
    dtype = stock.get("dtype", stock.get("torch_dtype"))
    return told if dtype is None else {**told, "dtype": dtype}


def unknown(opened: Linearized, name: str, to: str) -> PlanError:
    """Return the error for a tensor without a place."""
    return PlanError(opened.source.ref, f"has the tensor {name}, for which {to} has no place")


def copy_as(tensor: TensorInfo, name: str) -> Step:
    """Return the step that copies a tensor under another name."""
    return Step(inputs=(tensor,), outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),))


def change(tensor: TensorInfo, name: str, fn: Function, why: str, *, dtype: str = "") -> Step:
    """Return the step that changes each number of a tensor by itself."""
    spec = TensorSpec(dtype or tensor.dtype, tensor.shape)
    return Step(
        inputs=(tensor,), outputs=((name, spec),), fn=fn, elementwise=True, plain=True, why=why
    )
