"""A decoder whose layers share parameters: many depths run through few blocks.

The file stands alone (torch and transformers), because it travels inside every checkpoint that
needs it. A recursive model is the stock model of its architecture with one layer object a depth,
so that caches, masks, adapters and activation checkpointing work as they do there; the layers of
one block hold the same `nn.Parameter`s. Relaxed Recursive Transformers, arXiv 2410.20672, with
two differences: what `per_depth` names is not shared, and no factor scales the low-rank term.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# Every stock configuration reads this field's keys as integers. A sentence as the key makes all of
# them refuse the directory, and not fill the layers that they do not find with random numbers.
FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
GUARD = "id2label"
REMEDY = {"a recursive model: load it with AutoModelForCausalLM and trust_remote_code=True": ""}
OWN = ("base_model_type", "layer_map", "per_depth", "lora_ranks", "num_loops")
TOP = (*OWN, "model_type", "architectures", "auto_map", "dtype", "tie_word_embeddings")


class RecursiveConfig(PreTrainedConfig):  # type: ignore[misc]
    """The stock configuration of the unrolled model, and which depth runs which block.

    In memory its fields are the stock class's and those below; on disk the stock ones are the
    section `text_config`.

    Attributes:
        base_model_type: transformers' name of the stock architecture.
        layer_map: for each depth the block that it runs.
        per_depth: names within a layer of the parameters that every depth has for itself.
        lora_ranks: for each linear with low-rank factors their rank at every depth, or 0.
        num_loops: how often a repeated block runs at most; None for as often as it is in the map.
    """

    model_type = "recursive"

    base_model_type: str = ""
    layer_map: list[int] = field(default_factory=list)
    per_depth: list[str] = field(default_factory=list)
    lora_ranks: dict[str, list[int]] = field(default_factory=dict)
    num_loops: int | None = None

    def __new__(cls, *_: object, base_model_type: str = "", **__: object) -> "RecursiveConfig":
        """Take the subclass that also is the stock configuration."""
        generic = cls is RecursiveConfig and base_model_type
        return object.__new__(_config_class(base_model_type) if generic else cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: object) -> "RecursiveConfig":
        """The configuration that a config.json, or a flat dictionary of the fields, tells."""
        text = {k: v for k, v in config_dict.get("text_config", {}).items() if k != GUARD}
        dropped = ("text_config", "model_type", GUARD)
        told = {k: v for k, v in config_dict.items() if k not in dropped}
        if "base_model_type" not in told:
            raise ValueError("config.json: base_model_type is missing: name the architecture")
        return cast("RecursiveConfig", super().from_dict({**text, **told}, **kwargs))

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

    def check_recursion(self) -> None:
        """Refuse a map that does not fit the layers."""
        depths, blocks = getattr(self, "num_hidden_layers", 0), set(self.layer_map)
        if not self.layer_map or len(self.layer_map) != depths:
            raise ValueError(
                f"layer_map: {len(self.layer_map)} entries for {depths} layers: one for each"
            )
        if blocks != set(range(len(blocks))):
            raise ValueError(f"layer_map: {self.layer_map} skips a block: number them 0, 1, 2, ...")
        for name, ranks in self.lora_ranks.items():
            if len(ranks) != depths or min(ranks) < 0:
                raise ValueError(f"lora_ranks.{name}: {ranks} is not one rank for every layer")
        if self.num_loops is not None and not 1 <= self.num_loops <= self.loops:
            raise ValueError(f"num_loops: {self.num_loops} is outside 1..{self.loops}")

    @property
    def loops(self) -> int:
        """How often the block that is used most runs."""
        return max(Counter(self.layer_map).values(), default=1)


@lru_cache
def _config_class(base_model_type: str) -> type[RecursiveConfig]:
    """The configuration that is recursive and of the stock architecture."""
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(f"base_model_type: {base_model_type} is no architecture of transformers")
    stock = CONFIG_MAPPING[base_model_type]
    made = strict(_named("RecursiveConfig", base_model_type, (RecursiveConfig, stock)))
    return cast("type[RecursiveConfig]", made)


def _named(name: str, kind: str, bases: tuple[type, ...], **members: object) -> type:
    """A class that saves under `name`; the second name is for pickle, which imports by it."""
    qualified = f"{name}_{kind}"
    made = type(name, bases, {"__module__": __name__, "__qualname__": qualified, **members})
    globals()[qualified] = made
    return made


class Factor(nn.Module):
    """A matrix that multiplies; no `nn.Linear`, or asks for all linears would find it."""

    def __init__(self, into: int, out: int, like: Tensor) -> None:
        super().__init__()
        weight = torch.zeros(out, into, device=like.device, dtype=like.dtype)
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        return nn.functional.linear(x, self.weight)


class LoraLinear(nn.Linear):
    """`W x + b + B A x`: a linear whose weight other depths share, and a term of its own."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = Factor(linear.in_features, rank, linear.weight)
        self.lora_B = Factor(rank, linear.out_features, linear.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        low_rank: Tensor = self.lora_B(self.lora_A(input))
        return super().forward(input) + low_rank


@dataclass
class _Run:
    """What one forward pass asks of the depths, and what they tell back."""

    num_loops: int
    keep: bool
    seen: int = 0
    states: list[Tensor] = field(default_factory=list)


class _Depth:
    """What a layer knows of its place; mixed into the stock layer class."""

    loop: int | None
    ends_loop: bool

    def __call__(
        self, hidden: Tensor, *args: object, recursion: _Run | None = None, **kwargs: object
    ) -> Tensor:
        # Not in `forward`: activation checkpointing runs that twice.
        stock = super().__call__  # type: ignore[misc]
        if recursion is None:
            return cast("Tensor", stock(hidden, *args, **kwargs))
        recursion.seen += 1
        if self.loop is None or self.loop < recursion.num_loops:
            hidden = stock(hidden, *args, **kwargs)
            if recursion.keep and self.ends_loop:
                recursion.states.append(hidden)
        return hidden


@lru_cache
def _depth_class(stock: type) -> type:
    # The stock name: placing a model over devices finds its layers by it.
    return type(stock.__name__, (_Depth, stock), {"__module__": __name__})


@dataclass
class RecursiveOutput(CausalLMOutputWithPast):  # type: ignore[misc]
    """Stock outputs, and the hidden state after each loop, [batch, tokens, hidden]."""

    loop_states: tuple[Tensor, ...] | None = None


class RecursiveForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model whose depths share the parameters of their blocks."""

    config_class = RecursiveConfig

    def __new__(
        cls, config: RecursiveConfig | None = None, *_: object, **__: object
    ) -> "RecursiveForCausalLM":
        """Take the subclass that also is the stock model of the configuration."""
        if cls is RecursiveForCausalLM and config is not None:
            return object.__new__(_model_class(config.base_model_type))
        return object.__new__(cls)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Write the tied form, each shared parameter once, with this file beside it."""
        _convert_as(self.config.base_model_type)
        super().save_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        """Tie the layers, then let transformers initialise them."""
        _convert_as(self.config.base_model_type)
        self._recur()
        super().post_init()

    def _recur(self) -> None:
        config = self.config
        config.check_recursion()
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("quantization_config: it would part tied layers: materialize first")
        layers = _layers(self)
        _check_names(config.per_depth, layers)
        for depth, layer in enumerate(layers):
            _relax(layer, {name: ranks[depth] for name, ranks in config.lora_ranks.items()})
        _place(config.layer_map, layers)
        prefix = f"{self.base_model_prefix}.layers."
        ties = dict(_share(config.layer_map, set(config.per_depth), layers))
        self._layer_ties = {prefix + target: prefix + source for target, source in ties.items()}
        # Saving reads the attribute, tying the method below.
        self._tied_weights_keys = {**self._head_ties(), **self._layer_ties}

    def _head_ties(self) -> dict[str, str]:
        tied = getattr(type(self), "_tied_weights_keys", None)
        return dict(tied or {}) if self.config.tie_word_embeddings else {}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Layer ties hold whether or not the head is tied to the embedding."""
        if all_submodels:
            found = super().get_expanded_tied_weights_keys(all_submodels=True)
            return cast("dict[str, str]", found)
        return {**self._head_ties(), **self._layer_ties}

    def initialize_weights(self) -> None:
        """Stock numbers for what no checkpoint filled, but no low-rank term: B = 0."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, LoraLinear):
                _fill(module.lora_A, module.in_features**-0.5)
                _fill(module.lora_B, 0.0)

    def forward(  # noqa: PLR0917
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        output_loop_states: bool = False,
        **kwargs: object,
    ) -> CausalLMOutputWithPast | tuple[object, ...]:
        """The stock forward pass, through the first loops only where `num_loops` asks for it.

        Args:
            num_loops: how often a repeated block runs at most; what runs once always runs. Every
                call that continues a cache asks for the same number.
            output_loop_states: also return `loop_states`, the hidden state after each loop.
            kwargs: as in the stock class, and so are the arguments without a word here.

        Raises:
            ValueError: this model has no such loops, or the cache was filled with other ones.
        """
        wanted = num_loops if num_loops is not None else self.config.num_loops
        asked = wanted is not None or output_loop_states
        run = _run(self.config, wanted, keep=output_loop_states)
        if asked:
            kwargs["recursion"] = run
        _check_cache(past_key_values, _depths(self.config, wanted)[-1])
        as_tuple = kwargs.pop("return_dict", None) is False
        output = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        if asked and run.seen != len(self.config.layer_map):
            raise ValueError(f"num_loops: {self.config.base_model_type} cannot run single loops")
        if output_loop_states:
            output = RecursiveOutput(**output, loop_states=tuple(run.states))
        return output.to_tuple() if as_tuple else output


@lru_cache
def _model_class(base_model_type: str) -> type[RecursiveForCausalLM]:
    """The model that is recursive and of the stock architecture."""
    config_class = _config_class(base_model_type)
    stock = AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[base_model_type], None)
    if stock is None:
        raise ValueError(f"base_model_type: {base_model_type} has no causal language model")
    bases = (RecursiveForCausalLM, stock)
    made = _named("RecursiveForCausalLM", base_model_type, bases, config_class=config_class)
    return cast("type[RecursiveForCausalLM]", made)


def _convert_as(base_model_type: str) -> None:
    # Experts lie apart on disk and packed in memory, by a table that transformers keeps by name.
    table = get_checkpoint_conversion_mapping(base_model_type) or []
    register_checkpoint_conversion_mapping(RecursiveConfig.model_type, table, overwrite=True)


def _layers(model: RecursiveForCausalLM) -> nn.ModuleList:
    layers = getattr(getattr(model, model.base_model_prefix), "layers", None)
    if layers is None or len(layers) != len(model.config.layer_map):
        raise ValueError(f"base_model_type: {model.config.base_model_type} has no plain layers")
    return cast("nn.ModuleList", layers)


def _check_names(per_depth: Sequence[str], layers: nn.ModuleList) -> None:
    held = {name for layer in layers for name, _ in layer.named_parameters()}
    for name in per_depth:
        if name not in held:
            raise ValueError(f"per_depth: {name} is no parameter of a layer")


def _relax(layer: nn.Module, ranks: dict[str, int]) -> None:
    modules = dict(layer.named_modules())
    for name, rank in ranks.items():
        linear = modules.get(name)
        if type(linear) is nn.Linear and rank:
            layer.set_submodule(name, LoraLinear(linear, rank))
        elif rank:
            raise ValueError(f"lora_ranks: {name} is no linear of a layer")


def _share(
    layer_map: Sequence[int], per_depth: set[str], layers: nn.ModuleList
) -> Iterator[tuple[str, str]]:
    """Give each depth its block's parameters; yield the name of each and of its source."""
    for depth, block in enumerate(layer_map):
        first = layer_map.index(block)
        for name, parameter in list(layers[depth].named_parameters()) if first < depth else ():
            if name in per_depth or ".lora_" in name:
                continue
            source = dict(layers[first].named_parameters()).get(name)
            if source is None or source.shape != parameter.shape:
                raise ValueError(f"layer_map: layers {first} and {depth} differ in {name}")
            owner, _, leaf = name.rpartition(".")
            setattr(layers[depth].get_submodule(owner), leaf, source)
            yield f"{depth}.{name}", f"{first}.{name}"


def _place(layer_map: Sequence[int], layers: nn.ModuleList) -> None:
    """Tell every layer which loop it belongs to and whether it is the last of it."""
    loops = _loops(layer_map)
    for depth, layer in enumerate(layers):
        stock: type = type(layer)
        layer.__class__ = _depth_class(stock)
        place = cast("_Depth", layer)
        place.loop = loops[depth]
        place.ends_loop = place.loop is not None and place.loop not in loops[depth + 1 :]


def _loops(layer_map: Sequence[int]) -> list[int | None]:
    """For each depth how often its block ran before; None where it runs but once."""
    uses = Counter(layer_map)
    several = max(uses.values()) > 1
    return [
        layer_map[:depth].count(block) if uses[block] > 1 or not several else None
        for depth, block in enumerate(layer_map)
    ]


def _depths(config: RecursiveConfig, num_loops: int | None) -> list[int]:
    """The depths that run."""
    most = config.loops if num_loops is None else num_loops
    return [d for d, loop in enumerate(_loops(config.layer_map)) if loop is None or loop < most]


def _run(config: RecursiveConfig, num_loops: int | None, *, keep: bool) -> _Run:
    most = config.loops if num_loops is None else num_loops
    if isinstance(most, bool) or not 1 <= most <= config.loops:
        raise ValueError(f"num_loops: {most} is outside 1..{config.loops}")
    depths = _depths(config, most)
    kinds = getattr(config, "layer_types", None) or [""] * len(config.layer_map)
    if any(kinds.index(kinds[depth]) not in depths for depth in depths):
        # A cache tells the length of all layers of a kind by the first of them.
        raise ValueError(f"num_loops: {most} loops leave out the first layer of a kind of mask")
    order = [loop for loop in _loops(config.layer_map) if loop is not None]
    if keep and order != sorted(order):
        raise ValueError("output_loop_states: the loops of this layer_map overlap")
    return _Run(num_loops=most, keep=keep)


def _check_cache(cache: object, last: int) -> None:
    if isinstance(cache, DynamicCache) and cache.get_seq_length(0) != cache.get_seq_length(last):
        raise ValueError("num_loops: the cache was filled with fewer loops: start a new one")


def _fill(factor: Factor, deviation: float) -> None:
    # The flag is transformers', on each parameter that came from the checkpoint.
    flag = "_is_hf_initialized"
    if not getattr(factor.weight, flag, False):
        with torch.no_grad():
            factor.weight.normal_(0.0, deviation)
        setattr(factor.weight, flag, True)


RecursiveConfig.register_for_auto_class()
RecursiveForCausalLM.register_for_auto_class("AutoModelForCausalLM")
