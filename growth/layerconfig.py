"""Carry a config from one sequence of layers to another: every per-layer fact by one map.

Nothing is made anew by rule: what layer i was told about itself goes wherever layer i goes. A
rule (`every sixth layer is global`) that does not hold for the new sequence is written out as a
list where the architecture knows one, and refused otherwise.
"""

import math
import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from growth.layerrules import RULES, Config, Rule
from surgery.anatomy import Anatomy, dig
from surgery.errors import PlanError

# Lists with one entry per layer. Others of that length are taken for such if named *layer*.
PER_LAYER = {
    "layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "attention_layers",
    "block_types", "moe_layer_freq", "num_key_value_heads_per_layer", "per_layer_config",
}  # fmt: skip
# Lists that hold layer numbers.
NUMBERS = {
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices",
    "full_attn_idxs", "global_attention_layers", "sliding_window_layers", "hybrid_layer_ids",
}  # fmt: skip
# Lists that may happen to be as long as there are layers, and say nothing about them.
NOT_LAYERS = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "mrope_section",
    "out_features", "out_indices", "stage_names", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "forced_decoder_ids", "keys_to_ignore_at_inference",
}  # fmt: skip
# Architectures whose arithmetic depends on a layer's depth in a way no config can undo.
DEPTH_MATHS = {
    "diffllama": "its attention's lambda depends on the depth of the layer",
    "rwkv": "it rescales its hidden states at set depths",
}


def remap_config(config: Config, anatomy: Anatomy, sources: Sequence[int]) -> Config:
    """Return the config of a model whose layer i is the source's layer `sources[i]`.

    Raises:
        PlanError: something in the config ties a layer to its depth and cannot be carried over.
    """
    new = deepcopy(config)
    text = new
    for key in anatomy.section:
        text = text[key]
    old = dict(dig(config, anatomy.section))
    old.setdefault("model_type", config.get("model_type"))
    _refuse_depth_maths(old, sources, anatomy.layers)
    _remap_lists(text, old, sources, anatomy.layers)
    if anatomy.layer_key:
        text[anatomy.layer_key] = len(sources)
    _compensate(text, old, len(sources), anatomy.layers)
    for rule in RULES:
        _remap_rule(rule, text, old, sources, anatomy.layers)
    _remap_names(new, anatomy, sources)
    return new


def _is_identity(sources: Sequence[int], layers: int) -> bool:
    return list(sources) == list(range(layers))


def _refuse_depth_maths(old: Config, sources: Sequence[int], layers: int) -> None:
    if _is_identity(sources, layers):
        return
    why = DEPTH_MATHS.get(str(old.get("model_type")))
    if why:
        raise PlanError(str(old["model_type"]), f"layers cannot move: {why}")
    moved = any(i != source for i, source in enumerate(sources))
    if old.get("scale_attn_by_inverse_layer_idx") and moved:
        fact = "divides attention by the layer's number, which changes when a layer moves"
        raise PlanError("config.json, scale_attn_by_inverse_layer_idx", fact)
    if old.get("num_kv_shared_layers"):
        fact = "its last layers read the keys and values of earlier ones, by number"
        raise PlanError("config.json, num_kv_shared_layers", fact, "this family is not supported")


def _compensate(text: Config, old: Config, count: int, layers: int) -> None:
    """Keep each residual branch's factor scale_depth / sqrt(layers) as it was (MiniCPM)."""
    if str(old.get("model_type", "")).startswith("minicpm") and "scale_depth" in old:
        text["scale_depth"] = old["scale_depth"] * math.sqrt(count / layers)


def _remap_lists(text: Config, old: Config, sources: Sequence[int], layers: int) -> None:
    for key, value in old.items():
        if key in NUMBERS and isinstance(value, list):
            kept = set(value)
            text[key] = [i for i, source in enumerate(sources) if source in kept]
        elif key == "hybrid_override_pattern" and isinstance(value, str):
            text[key] = "".join(value[source] for source in sources)
        elif isinstance(value, list) and _is_per_layer(key, value, layers):
            text[key] = [value[source] for source in sources]
    if (
        "attention_types" in old and "attention_layers" in text
    ):  # GPT-Neo derives one from the other
        text["attention_types"] = [[text["attention_layers"], 1]]


def _is_per_layer(key: str, value: list[Any], layers: int) -> bool:
    if key in PER_LAYER:
        if len(value) < layers:
            fact = f"has {len(value)} entries for {layers} layers"
            raise PlanError(f"config.json, {key}", fact, "restore the config")
        return True
    if len(value) != layers or key in NOT_LAYERS or layers == 1:
        return False
    if "layer" in key or "block" in key:
        return True
    fact = f"has {layers} entries, as many as there are layers, and may be about them or not"
    remedy = "rename or remove it, or report it as a case to support"
    raise PlanError(f"config.json, {key}", fact, remedy)


def _remap_rule(rule: Rule, text: Config, old: Config, sources: Sequence[int], layers: int) -> None:
    before = rule.told(old, layers)
    if before is None:
        return
    wanted = [before[source] for source in sources]
    typed = {**text, "model_type": old.get("model_type")}
    if rule.told(typed, len(sources)) == wanted:
        return
    spelled = rule.spelled(text, wanted)
    if spelled is None:
        now = rule.told(typed, len(sources)) or [None] * len(sources)
        where = next(i for i, (a, b) in enumerate(zip(wanted, now, strict=True)) if a != b)
        fact = f"cannot say that layer {where} is to be what layer {sources[where]} was"
        raise PlanError(f"config.json, {rule.key}", fact, "choose a map that keeps its pattern")
    text.update(spelled)


def _remap_names(config: Config, anatomy: Anatomy, sources: Sequence[int]) -> None:
    """Rename layers in the quantisation's lists of modules (`model.layers.3.mlp`)."""
    quantisation = config.get("quantization_config")
    if not isinstance(quantisation, dict):
        return
    named = re.compile(rf"^(.*?{re.escape(anatomy.stack.prefix.split('.')[-1])}\.)(\d+)(\..*)?$")
    for key, value in quantisation.items():
        if isinstance(value, list):
            quantisation[key] = [n for name in value for n in _renamed(name, named, sources)]


def _renamed(name: object, named: re.Pattern[str], sources: Sequence[int]) -> list[object]:
    match = named.match(name) if isinstance(name, str) else None
    if match is None:
        return [name]
    new = [i for i, source in enumerate(sources) if source == int(match[2])]
    return [f"{match[1]}{i}{match[3] or ''}" for i in new]
