"""The attention layers of a base: their sizes and kinds, or why they cannot be converted."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from surgery.anatomy import HEADED, RECURSIVE, Anatomy, anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError
from surgery.layers.families import SLIDING
from surgery.layers.rules import RULES, told_layers
from surgery.linearize.parameters import Sizes

# Architectures whose attention the model class was checked with.
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo2"),
    *("mixtral", "qwen3_moe"),
)
HEAD_DIM = {"qwen3": 128, "qwen3_moe": 128, "gemma3_text": 256}  # where the config does not say
WINDOWS = {"mistral": 4096, "qwen2": 4096, "qwen3": 4096, "gemma3_text": 4096}
FLOATS = ("BF16", "F16", "F32", "F64")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
OWN = re.compile(r"self_attn\.([qkvo]_proj\.(weight|bias)|[qk]_norm\.weight)")
MIXER = "self_attn.mixer."  # where the new parameters of a converted layer lie
# The first that fits a name inside a layer tells why the layer cannot be converted.
ODD = (
    (r"kv_a_proj|kv_b_proj|q_a_proj", "compresses keys and values into a latent (MLA)"),
    (r"linear_attn\.|mamba|mixer\.|ssm|A_log|rglru|recurrent|conv1d", "is linear already"),
    (r"crossattention|encoder_attn|cross_attn", "attends to another text"),
    (
        r"qkv|query_key_value|c_attn|Wqkv|in_proj|kv_proj|att_proj",
        "stores queries, keys and values as one projection",
    ),
    (r"sinks?$", "has attention sinks of its own, which no mixer knows"),
    (r"relative_attention|alibi|lambda_|gate|g_proj", "scales or gates its attention"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of a model.

    Attributes:
        parts: of the base.
        config: flat, of the model with softmax attention everywhere.
        sizes: of its layers, all alike.
        slides: for each layer whether it sees the last `window` tokens alone.
        window: that many; 0 where no layer slides.
        dtype: safetensors code of its projections.
    """

    parts: Anatomy
    config: Mapping[str, Any]
    sizes: Sizes
    slides: tuple[bool, ...]
    window: int
    dtype: str

    def name(self, layer: int, rest: str) -> str:
        """The name of a tensor of a layer's attention."""
        return self.parts.stack.name(layer, f"self_attn.{rest}")


def check_model(base: Checkpoint) -> None:
    """Refuse what is no plain decoder, before its layers are looked at.

    Raises:
        PlanError: with the reason.
    """
    config = base.config
    if config is None:
        fact = "has no config.json, which would say what model it is"
        raise PlanError(base.ref, fact, "name the directory of a model")
    named = [str(name) for name in config.get("architectures") or ()]
    if config.get("is_encoder_decoder") or (named and not named[0].endswith(HEADED)):
        told = f" ({named[0]})" if named else ""
        raise PlanError(base.ref, f"is no causal language model{told}", "name a decoder")
    if config.get("quantization_config"):
        fact = "is quantised, and its projections could not go on training"
        raise PlanError(base.ref, fact, "linearize the model it was quantised from")
    kind = config.get("model_type")
    if kind == RECURSIVE:
        fact = "is recursive, so that its layers share their attention"
        raise PlanError(base.ref, fact, "write it out first: surgery recurse materialize")
    if kind == "factored":
        remedy = "write it out first: surgery factor MODEL --materialize"
        raise PlanError(base.ref, "is factored, and so are its projections", remedy)
    if config.get("auto_map"):
        fact = "has code of its own, which the linearized model cannot build on"
        raise PlanError(base.ref, fact, "use an architecture that transformers knows")


def find_attention(base: Checkpoint, config: Mapping[str, Any], *, rope: bool) -> Attention:
    """Return the attention of a model whose layers can be converted.

    Args:
        config: flat, of the model with softmax attention everywhere.
        rope: refuse layers without rotary embedding.

    Raises:
        PlanError: a layer cannot be, with its number and the reason.
        CheckpointError: config and tensors disagree.
    """
    parts = anatomy(base)
    _check_place(base, parts)
    for layer in range(parts.layers):
        _check_layer(base, parts, layer)
    parts = replace(parts, section=())  # of the flat config
    _check_config(base, config)
    if rope:
        _check_rope(base, config, parts)
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        fact = f"is of the architecture {family}, whose attention was not checked"
        raise PlanError(base.ref, fact, f"supported are {', '.join(FAMILIES)}")
    sizes = _sizes(base, parts, config, family)
    slides, window = _sliding(config, parts)
    own = base.tensors[parts.stack.name(0, "self_attn.q_proj.weight")]
    return Attention(
        parts=parts, config=config, sizes=sizes, slides=slides, window=window, dtype=own.dtype
    )


def _check_rope(base: Checkpoint, config: Mapping[str, Any], parts: Anatomy) -> None:
    layer = next(_without_rope(config, parts), None)
    if layer is not None:
        fact = "has no rotary embedding, and its window would not know what is near"
        raise PlanError(f"{base.ref}, layer {layer}", fact, "keep softmax attention in it")


def _without_rope(config: Mapping[str, Any], parts: Anatomy) -> Iterator[int]:
    """Yield the layers without rotary embedding: told one by one, or by the kind (Cohere 2)."""
    listed = config.get("no_rope_layers")
    rule = next(rule for rule in RULES if rule.key == "no_rope_layers")
    told = listed if isinstance(listed, list) and listed else rule.told(dict(config), parts.layers)
    if told is None and config.get("model_type") in {"cohere2", "exaone4"}:
        told = [kind == SLIDING for kind in told_layers(config, parts) or ()]
    yield from (n for n, has in enumerate(told or ()) if not has)


def _check_place(base: Checkpoint, parts: Anatomy) -> None:
    if parts.section not in ((), ("text_config",)) or parts.other_stacks:
        fact = "has towers or stacks beside the language model's layers"
        raise PlanError(base.ref, fact, "name a model of text alone")
    if parts.lost_head:
        raise PlanError(base.ref, "promises an output head of its own, but there is none")
    if parts.extra_layers:
        fact = f"predicts further tokens with layer {parts.layers}, which is not built"
        raise PlanError(base.ref, fact, "drop these layers first")


def _check_layer(base: Checkpoint, parts: Anatomy, layer: int) -> None:
    rests = [r for r in parts.stack.layers[layer] if not r.startswith(MIXER)]
    place = f"{base.ref}, layer {layer}"
    for pattern, fact in ODD:
        found = next((r for r in rests if re.search(pattern, r) and _is_attention(r)), None)
        if found is not None:
            raise PlanError(place, f"{fact}: {found}", "keep softmax attention in this model")
    missing = [p for p in PROJECTIONS if f"self_attn.{p}.weight" not in rests]
    if missing:
        fact = f"has no attention with a projection self_attn.{missing[0]}"
        raise PlanError(place, fact, "only attention as in Llama is converted")
    odd = next((r for r in rests if r.startswith("self_attn.") and not OWN.fullmatch(r)), None)
    if odd is not None:
        fact = f"has {odd}, which no mixer knows"
        raise PlanError(place, fact, "only attention as in Llama is converted")
    packed = next(
        (r for r in rests if base.tensors[parts.stack.name(layer, r)].dtype not in FLOATS), None
    )
    if packed is not None:
        dtype = base.tensors[parts.stack.name(layer, packed)].dtype
        raise PlanError(place, f"stores {packed} as {dtype}", "dequantise the checkpoint first")


def _is_attention(rest: str) -> bool:
    """Whether a tensor is of a layer's mixing of tokens, not of what follows it."""
    return re.search(r"mlp|ffn|feed_forward|expert|moe", rest) is None


def _check_config(base: Checkpoint, config: Mapping[str, Any]) -> None:
    place = f"{base.ref}, layer 0"
    if config.get("attn_logit_softcapping") is not None:
        fact = f"caps its scores at {config['attn_logit_softcapping']}, which no mixer does"
        raise PlanError(place, fact, "keep softmax attention in this model")
    if config.get("position_embedding_type") in {"alibi", "relative_key"} or config.get("alibi"):
        fact = "adds to its scores by distance, which no mixer does"
        raise PlanError(place, fact, "keep softmax attention in this model")
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise PlanError(place, "attends to what follows, as encoders do", "name a decoder")


def _sizes(base: Checkpoint, parts: Anatomy, config: Mapping[str, Any], family: str) -> Sizes:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    width = config.get("head_dim") or HEAD_DIM.get(family) or hidden // heads
    for layer in range(parts.layers):
        shapes = {
            p: base.tensors[parts.stack.name(layer, f"self_attn.{p}.weight")].shape
            for p in PROJECTIONS
        }
        kv_heads = config.get("num_key_value_heads") or shapes["k_proj"][0] // width
        rows = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        wanted = {p: (n * width, hidden) for p, n in rows.items()} | {
            "o_proj": (hidden, heads * width)
        }
        wrong = next((p for p in PROJECTIONS if shapes[p] != wanted[p]), None)
        if wrong is not None:
            fact = f"has {wrong} of the shape {list(shapes[wrong])}, not {list(wanted[wrong])}"
            remedy = "restore the config, or convert a model whose layers are alike"
            raise PlanError(f"{base.ref}, layer {layer}", fact, remedy)
    return Sizes(hidden=hidden, heads=heads, kv_heads=int(kv_heads), head_dim=int(width))


def _sliding(config: Mapping[str, Any], parts: Anatomy) -> tuple[tuple[bool, ...], int]:
    """Return which layers see a window alone, and how wide it is."""
    default = WINDOWS.get(str(config.get("model_type")))
    window = config.get("sliding_window", default)
    if type(window) is not int or window < 1 or config.get("use_sliding_window") is False:
        return (False,) * parts.layers, 0
    kinds = told_layers(config, parts)
    slides = tuple(kind == SLIDING for kind in kinds or [SLIDING] * parts.layers)
    return slides, window if any(slides) else 0
