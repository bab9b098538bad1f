"""A decoder some of whose layers attend in linear time and constant memory.

The files of this folder that begin with `linear_` belong to it and travel along inside every
checkpoint that needs them. A linearized model is the stock model of its architecture; in the
layers that the configuration names a mixer stands for softmax attention, between the same
projections. One code path serves a whole text, its pieces, single tokens, rows padded on the left
and packed documents, so that all of them are the same function.
"""

from dataclasses import field
from functools import lru_cache
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .linear_decoder import Decoder
from .linear_gated import GATED
from .linear_kernels import use_kernels
from .linear_layer import (
    Kept,
    Linear,
    ablate,
    check_attention,
    converted,
    keep_teacher,
    mixed_class,
    set_mode,
    shape_of,
)
from .linear_mixers import MIXERS
from .linear_seen import Mixer

__all__ = [
    "LinearizedConfig",
    "LinearizedForCausalLM",
    "ablate",
    "converted",
    "keep_teacher",
    "set_mode",
    "use_kernels",
]

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
# Every stock configuration reads this field's keys as integers. A sentence as the key makes all of
# them refuse the directory, and not run softmax attention over layers that were trained without.
GUARD = "id2label"
REMEDY = {"a linearized model: load it with AutoModelForCausalLM and trust_remote_code=True": ""}
OWN = ("base_model_type", "linear_layers", "mixer")
TOP = (*OWN, "model_type", "architectures", "auto_map", "dtype", "tie_word_embeddings")


class LinearizedConfig(PreTrainedConfig):  # type: ignore[misc]
    """The stock configuration, which layers are linear, and what mixes their tokens.

    In memory its fields are the stock class's and those below; on disk the stock ones are the
    section `text_config`.

    Attributes:
        base_model_type: transformers' name of the stock architecture.
        linear_layers: the layers without softmax attention over all tokens.
        mixer: `method`, and the numbers that it needs.
    """

    model_type = "linearized"

    base_model_type: str = ""
    linear_layers: list[int] = field(default_factory=list)
    mixer: dict[str, Any] = field(default_factory=dict)

    def __new__(cls, *_: object, base_model_type: str = "", **__: object) -> "LinearizedConfig":
        """Take the subclass that also is the stock configuration."""
        generic = cls is LinearizedConfig and base_model_type
        return object.__new__(_config_class(base_model_type) if generic else cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: object) -> "LinearizedConfig":
        """The configuration that a config.json, or a flat dictionary of the fields, tells."""
        text = {k: v for k, v in config_dict.get("text_config", {}).items() if k != GUARD}
        dropped = ("text_config", "model_type", GUARD)
        told = {k: v for k, v in config_dict.items() if k not in dropped}
        if "base_model_type" not in told:
            raise ValueError("config.json: base_model_type is missing: name the architecture")
        return cast("LinearizedConfig", super().from_dict({**text, **told}, **kwargs))

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        flat: dict[str, Any] = super().to_diff_dict()
        top = {key: flat.pop(key) for key in TOP if key in flat}
        flat.pop(GUARD, None)
        version = flat.pop("transformers_version", None)
        top |= {GUARD: REMEDY, "text_config": {**flat, GUARD: REMEDY}}
        return top | ({} if version is None else {"transformers_version": version})

    def to_json_string(self, use_diff: bool = True) -> str:  # noqa: ARG002
        """The text of config.json; the form without differences would lose the guard."""
        return str(super().to_json_string(use_diff=True))


@lru_cache
def _config_class(base_model_type: str) -> type[LinearizedConfig]:
    """The configuration that is linearized and of the stock architecture."""
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(f"base_model_type: {base_model_type} is no architecture of transformers")
    stock = CONFIG_MAPPING[base_model_type]
    made = strict(_named("LinearizedConfig", base_model_type, (LinearizedConfig, stock)))
    return cast("type[LinearizedConfig]", made)


def _named(name: str, kind: str, bases: tuple[type, ...], **members: object) -> type:
    """A class that saves under `name`; the second name is for pickle, which imports by it."""
    qualified = f"{name}_{kind}"
    made = type(name, bases, {"__module__": __name__, "__qualname__": qualified, **members})
    globals()[qualified] = made
    return made


def __getattr__(name: str) -> type:
    """Make the class that pickle asks for by its second name."""
    made = {"LinearizedConfig": _config_class, "LinearizedForCausalLM": _model_class}
    generic, _, kind = name.partition("_")
    if generic not in made or not kind:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return made[generic](kind)


class LinearizedForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model with linear attention in the layers that its configuration names."""

    config_class = LinearizedConfig
    _is_stateful = True  # what was summed cannot be taken back, as assisted decoding would

    def __new__(
        cls, config: LinearizedConfig | None = None, *_: object, **__: object
    ) -> "LinearizedForCausalLM":
        """Take the subclass that also is the stock model of the configuration."""
        if cls is LinearizedForCausalLM and config is not None:
            return object.__new__(_model_class(config.base_model_type))
        return object.__new__(cls)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Write the model, with its files beside it."""
        _convert_as(self.config.base_model_type)
        super().save_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        """Put the mixers in, then let transformers initialise."""
        _convert_as(self.config.base_model_type)
        _convert(self)
        super().post_init()

    def initialize_weights(self) -> None:
        """Stock numbers for what no checkpoint filled, and the mixers' own."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Mixer):
                _fill(module)


@lru_cache
def _model_class(base_model_type: str) -> type[LinearizedForCausalLM]:
    """The model that is linearized and of the stock architecture."""
    config_class = _config_class(base_model_type)
    stock = AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[base_model_type], None)
    if stock is None:
        raise ValueError(f"base_model_type: {base_model_type} has no causal language model")
    bases = (LinearizedForCausalLM, stock)
    made = _named("LinearizedForCausalLM", base_model_type, bases, config_class=config_class)
    return cast("type[LinearizedForCausalLM]", made)


def _convert_as(base_model_type: str) -> None:
    # Experts lie apart on disk and packed in memory, by a table that transformers keeps by name.
    table = get_checkpoint_conversion_mapping(base_model_type) or []
    register_checkpoint_conversion_mapping(LinearizedConfig.model_type, table, overwrite=True)


def _convert(model: LinearizedForCausalLM) -> None:
    """Put mixers into the layers that the configuration names."""
    config = model.config
    decoder = getattr(model, model.base_model_prefix)
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise ValueError(f"base_model_type: {config.base_model_type} has no plain layers")
    method = config.mixer.get("method")
    kind = {**MIXERS, **GATED}.get(method)
    if kind is None:
        raise ValueError(f"mixer: method {method} is none of {', '.join([*MIXERS, *GATED])}")
    beyond = [n for n in config.linear_layers if not 0 <= n < len(layers)]
    if beyond:
        raise ValueError(f"linear_layers: {beyond[0]} is outside 0..{len(layers) - 1}")
    decoder.__class__ = mixed_class(Decoder, cast("Any", type(decoder)))
    for n, layer in enumerate(layers):
        attention = layer.self_attn
        stock = cast("Any", type(attention))
        if n not in config.linear_layers:
            attention.__class__ = mixed_class(Kept, stock)
            continue
        check_attention(attention, n)
        attention.__class__ = mixed_class(Linear, stock)
        attention.stock = stock
        attention.mixer = kind(config.mixer, shape_of(attention, config))


def _fill(mixer: Mixer) -> None:
    """Initial values for what the checkpoint lacks."""
    # The flag is transformers', on each parameter that came from the checkpoint.
    flag = "_is_hf_initialized"
    with torch.no_grad():
        found = {p: p.clone() for p in mixer.parameters() if getattr(p, flag, False)}
        if len(found) == len(list(mixer.parameters())):
            return
        mixer.reset()
        for parameter, values in found.items():
            parameter.copy_(values)
    for parameter in mixer.parameters():
        setattr(parameter, flag, True)


LinearizedConfig.register_for_auto_class()
LinearizedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
