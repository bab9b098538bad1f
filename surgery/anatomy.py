"""Which tensors are what: layers, embeddings, head, experts, ties, from names, shapes, config."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError

TEXT_SECTIONS = ("text_config", "language_config", "llm_config", "language_model_config")
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|video", re.IGNORECASE)
EMBEDDING = re.compile(r"(^|[._])(wte|embed|emb|embeddings?|embed_tokens|embed_in)([._]|$)|embed")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|predictions\.decoder|decoder)\.weight$")
HEADED = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration")
RECURSIVE = "recursive"  # model_type of layers that are run through several times, stored once
MIXER = re.compile(r"(^|\.)self_attn\.mixer\.")  # what stands for softmax attention
NUMBER = re.compile(r"0|[1-9][0-9]{0,6}")

# The order in which parts are listed.
PART_ORDER = (
    *("embedding", "attention", "feed-forward", "experts", "router", "norms", "head"),
    *("other", "other towers"),
)
# The first match decides; names are those inside a layer.
PARTS = (
    ("attention", MIXER),  # its gates are no routers
    ("experts", re.compile(r"(^|\.)experts?(\.|_|$)|shared_expert")),
    ("router", re.compile(r"(^|\.)(router|gate|gate_inp)(\.|$)")),
    ("norms", re.compile(r"norm|(^|\.)ln_?[0-9f]?(\.|$)|layernorm", re.IGNORECASE)),
    ("attention", re.compile(r"att|(^|\.)(q|k|v|o|qkv)_?proj|wq|wk|wv|wo", re.IGNORECASE)),
    ("feed-forward", re.compile(r"mlp|ffn|feed_forward|(^|\.)(fc|dense|w)[0-9_]|intermediate|out")),
)


@dataclass(frozen=True, slots=True)
class Stack:
    """A numbered series of modules: `prefix.0`, `prefix.1`, ...

    Attributes:
        layers: per number the tensor names below it, without `prefix.number.`.
    """

    prefix: str
    layers: Mapping[int, tuple[str, ...]]

    def name(self, layer: int, rest: str) -> str:
        """Return the full name of a tensor of a layer."""
        return f"{self.prefix}.{layer}.{rest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """What a checkpoint is made of.

    Attributes:
        family: `model_type` of the config, or "unknown".
        stack: the decoder's (or encoder's) own layers.
        other_stacks: further numbered series, of a vision tower for instance.
        extra_layers: layers at the stack's end beyond `layers`, such as next-token predictors.
        section: keys that lead to the part of the config that describes the stack.
        layer_key: the config key that says how many layers there are, where there is a config.
        embedding, head: names of the token embedding and output head; None where there is none.
        tied: the head is the embedding.
        lost_head: the config promises a head of its own, and there is none.
        experts: experts per layer, 0 for a dense model.
    """

    family: str
    stack: Stack
    other_stacks: tuple[Stack, ...]
    extra_layers: int
    section: tuple[str, ...]
    layer_key: str | None
    embedding: str | None
    head: str | None
    tied: bool
    lost_head: bool
    experts: int

    @property
    def layers(self) -> int:
        """Number of layers that the model runs through."""
        return len(self.stack.layers) - self.extra_layers

    def locate(self, name: str) -> tuple[int, str] | None:
        """Return layer number and the rest of the name, or None outside the stack."""
        return split_layer(name, self.stack.prefix)

    def part(self, name: str) -> str:
        """Name the part of the model that a tensor belongs to."""
        if name in (self.embedding, self.head):
            return "embedding" if name == self.embedding else "head"
        inside = self.locate(name)
        if inside is None and OTHER_TOWERS.search(name):
            return "other towers"
        rest = inside[1] if inside else name
        part = next((part for part, pattern in PARTS if pattern.search(rest)), "other")
        return part if inside or part == "norms" else _outside(name)


def _outside(name: str) -> str:
    return "embedding" if "embed" in name else "other"


def anatomy(checkpoint: Checkpoint) -> Anatomy:
    """Find the parts of a checkpoint. No architecture table, no transformers.

    Raises:
        CheckpointError: no layers, a gap in their numbers, a config that disagrees with the
            tensors, or several stacks of which none is clearly the language model's.
    """
    config = checkpoint.config or {}
    section = _section(config)
    text = dig(config, section)
    key, told = _layer_count(checkpoint, config, text)
    stacks = find_stacks(checkpoint.tensors)
    if config.get("model_type") == RECURSIVE:
        stacks = tuple(_run_through(stack, told or 0) for stack in stacks)
    stack = _choose_stack(checkpoint, stacks, told, key, predictors(text))
    _check_gaps(checkpoint, stack)
    embedding, head = _ends(checkpoint, stack, text)
    promised = _promises_head(config, text)
    return Anatomy(
        family=str(config.get("model_type", "unknown")),
        stack=stack,
        other_stacks=tuple(s for s in stacks if s is not stack),
        extra_layers=len(stack.layers) - told if told is not None else 0,
        section=section,
        layer_key=key,
        embedding=embedding,
        head=head,
        tied=embedding is not None and head is None and _has_head(config) and not promised,
        lost_head=head is None and promised,
        experts=_experts(stack, text),
    )


def dig(config: Mapping[str, Any], section: Iterable[str]) -> Mapping[str, Any]:
    """Follow keys into nested tables."""
    for key in section:
        config = config[key]
    return config


def split_layer(name: str, prefix: str) -> tuple[int, str] | None:
    """Split `prefix.12.rest` into 12 and `rest`; None for any other name."""
    if not name.startswith(f"{prefix}."):
        return None
    number, _, rest = name[len(prefix) + 1 :].partition(".")
    return (int(number), rest) if NUMBER.fullmatch(number) and rest else None


def find_stacks(names: Iterable[str]) -> tuple[Stack, ...]:
    """Group names by the first number in them, in the order of first appearance."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        words = name.split(".")
        at = next((i for i, word in enumerate(words) if i and NUMBER.fullmatch(word)), None)
        if at is not None and at + 1 < len(words):
            layers = found.setdefault(".".join(words[:at]), {})
            layers.setdefault(int(words[at]), []).append(".".join(words[at + 1 :]))
    return tuple(
        Stack(prefix, {n: tuple(sorted(layers[n])) for n in sorted(layers)})
        for prefix, layers in found.items()
    )


def _run_through(stack: Stack, depths: int) -> Stack:
    """Add the depths of a recursive model that share all they have with an earlier one."""
    most = max(depths, *(n + 1 for n in stack.layers))
    if most > depths:  # for whoever looks for gaps
        return stack
    return Stack(stack.prefix, {n: stack.layers.get(n, ()) for n in range(depths)})


def _section(config: Mapping[str, Any]) -> tuple[str, ...]:
    for key in TEXT_SECTIONS:
        if isinstance(config.get(key), dict):
            return (key,)
    return ()


def _layer_count(
    checkpoint: Checkpoint, config: Mapping[str, Any], text: Mapping[str, Any]
) -> tuple[str | None, int | None]:
    if checkpoint.config is None:
        return None, None
    place = checkpoint.root / "config.json"
    if config.get("is_encoder_decoder"):
        fact = "describes an encoder-decoder model, which has two stacks of layers"
        raise CheckpointError(place, fact, "only models with one stack are supported")
    key = next((key for key in LAYER_KEYS if key in text), None)
    if key is None and text is not config:  # older configs leave out what is the default
        return LAYER_KEYS[0], None
    listed = text.get("layers_block_type")
    if key is None and isinstance(listed, list) and listed:  # Nemotron-H: one entry a layer
        return None, len(listed)
    if key is None:
        fact = f"does not say how many layers there are ({', '.join(LAYER_KEYS)})"
        raise CheckpointError(place, fact, "name the .safetensors file itself for a bare result")
    told = text[key]
    layer_map = config.get("layer_map") if config.get("model_type") == RECURSIVE else None
    most = max(len(checkpoint.tensors), len(layer_map) if isinstance(layer_map, list) else 0)
    if type(told) is not int or not 0 < told <= most:
        fact = f"has {key} = {repr(told)[:40]}, but there are {len(checkpoint.tensors)} tensors"
        raise CheckpointError(place, fact, "restore the config of this checkpoint")
    return key, told


def predictors(text: Mapping[str, Any]) -> int:
    """Layers stored after the model's own that predict further tokens (DeepSeek-V3)."""
    count = text.get("num_nextn_predict_layers") or text.get("num_mtp_layers") or 0
    return count if type(count) is int and count > 0 else 0


def _choose_stack(
    checkpoint: Checkpoint,
    stacks: tuple[Stack, ...],
    told: int | None,
    key: str | None,
    predictors: int,
) -> Stack:
    own = [s for s in stacks if not OTHER_TOWERS.search(s.prefix)] or list(stacks)
    own.sort(key=lambda stack: -_stack_bytes(checkpoint, stack))
    if not own:
        fact = "holds no numbered layers (such as model.layers.0)"
        raise CheckpointError(checkpoint.ref, fact, "name a transformer's checkpoint")
    if told is None:
        return _largest(checkpoint, own)
    fits = [s for s in own if len(s.layers) in {told, told + predictors}]
    if fits and _stack_bytes(checkpoint, fits[0]) * 2 >= _stack_bytes(checkpoint, own[0]):
        return fits[0]
    has = ", ".join(f"{s.prefix} with {len(s.layers)}" for s in own[:3])
    fact = f"the config has {key} = {told}, but the tensors show {has}"
    remedy = "restore the config, or the missing files"
    raise CheckpointError(checkpoint.root / "config.json", fact, remedy)


def _largest(checkpoint: Checkpoint, own: list[Stack]) -> Stack:
    """Return the first of the stacks, which are sorted by size, where no other comes near it."""
    sizes = [_stack_bytes(checkpoint, stack) for stack in own[:2]]
    if len(sizes) > 1 and sizes[1] * 2 >= sizes[0]:
        fact = f"has two series of layers of like size, {own[0].prefix} and {own[1].prefix}"
        remedy = "name the directory with its config.json, which says which one is meant"
        raise CheckpointError(checkpoint.ref, fact, remedy)
    return own[0]


def _stack_bytes(checkpoint: Checkpoint, stack: Stack) -> int:
    return sum(
        checkpoint.tensors[stack.name(n, rest)].nbytes
        for n, layer in stack.layers.items()
        for rest in layer
    )


def _check_gaps(checkpoint: Checkpoint, stack: Stack) -> None:
    for name in checkpoint.tensors:
        number, _, rest = name.removeprefix(f"{stack.prefix}.").partition(".")
        if name.startswith(f"{stack.prefix}.") and (_is_no_layer(number) or _is_bare(number, rest)):
            fact = f"has the tensor {name[:80]!r}, whose layer number cannot be one"
            raise CheckpointError(checkpoint.ref, fact, "the checkpoint is damaged or forged")
    missing = next((n for n in range(len(stack.layers)) if n not in stack.layers), None)
    if missing is not None:
        fact = f"has no tensors of layer {stack.prefix}.{missing}, but of later layers"
        raise CheckpointError(checkpoint.ref, fact, "the checkpoint is incomplete: copy it again")


def _is_no_layer(word: str) -> bool:
    return word.lstrip("+-").isdigit() and not NUMBER.fullmatch(word)


def _is_bare(word: str, rest: str) -> bool:
    return NUMBER.fullmatch(word) is not None and not rest


def _ends(
    checkpoint: Checkpoint, stack: Stack, text: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Find the token embedding and the head: matrices of the vocabulary's size, by name."""
    vocabulary = text.get("vocab_size")
    outside = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2  # noqa: PLR2004 - a matrix
        and split_layer(name, stack.prefix) is None
        and not OTHER_TOWERS.search(name)
    ]
    fitting = [t for t in outside if t.shape[0] == vocabulary] or outside
    head = next((t.name for t in fitting if HEAD.search(t.name)), None)
    embedding = [t for t in fitting if EMBEDDING.search(t.name) and t.name != head]
    embedding.sort(key=lambda t: -t.shape[0])  # positions and token types have fewer rows
    return (embedding[0].name if embedding else None), head


def _promises_head(config: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    return tied is False and _has_head(config)


def _has_head(config: Mapping[str, Any]) -> bool:
    if config.get("tie_word_embeddings"):
        return True
    architectures = config.get("architectures") or []
    return any(str(name).endswith(HEADED) for name in architectures)


def _experts(stack: Stack, text: Mapping[str, Any]) -> int:
    inside = re.compile(r"(?:^|\.)experts\.(\d+)\.")
    numbers = {
        int(m[1]) for layer in stack.layers.values() for r in layer if (m := inside.search(r))
    }
    if numbers:
        return max(numbers) + 1
    if any(".experts." in f".{rest}" for layer in stack.layers.values() for rest in layer):
        keys = ("num_local_experts", "num_experts", "n_routed_experts")
        return next((text[key] for key in keys if isinstance(text.get(key), int)), 0)
    return 0
