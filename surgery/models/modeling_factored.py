"""A decoder some of whose linear maps are products of smaller ones, or those and a few weights.

The file stands alone (torch and transformers), because it travels inside every checkpoint that
needs it. A factored model is the stock model of its architecture, in which the maps that the
configuration names are built from fewer numbers. Three kinds:

- `low-rank`: `B A`, with A [rank, in] and B [out, rank].
- `sparse-low-rank`: `B A + S`, S zero but at listed places (SLTrain, arXiv 2406.02214).
- `monarch`: block-diagonal, shuffled, block-diagonal (arXiv 2204.00595): the block of W that leads
  from input block k to the outputs o with o mod J = j has a low rank.
"""

from collections.abc import Mapping
from dataclasses import field
from functools import lru_cache
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
# Every stock configuration reads this field's keys as integers. A sentence as the key makes all of
# them refuse the directory, and not fill the maps that they do not find with random numbers.
GUARD = "id2label"
REMEDY = {"a factored model: load it with AutoModelForCausalLM and trust_remote_code=True": ""}
OWN = ("base_model_type", "factored")
TOP = (*OWN, "model_type", "architectures", "auto_map", "dtype", "tie_word_embeddings")
KINDS = ("low-rank", "sparse-low-rank", "monarch")
INT32 = 1 << 31  # more places need wider numbers


class FactoredConfig(PreTrainedConfig):  # type: ignore[misc]
    """The stock configuration of the dense model, and which of its linear maps are factored.

    In memory its fields are the stock class's and those below; on disk the stock ones are the
    section `text_config`.

    Attributes:
        base_model_type: transformers' name of the stock architecture.
        factored: by name of a module its `kind` and `rank`; `entries`, how many weights S has;
            `blocks`, how many a monarch map has on the side of the inputs and of the outputs.
    """

    model_type = "factored"

    base_model_type: str = ""
    factored: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __new__(cls, *_: object, base_model_type: str = "", **__: object) -> "FactoredConfig":
        """Take the subclass that also is the stock configuration."""
        generic = cls is FactoredConfig and base_model_type
        return object.__new__(_config_class(base_model_type) if generic else cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: object) -> "FactoredConfig":
        """The configuration that a config.json, or a flat dictionary of the fields, tells."""
        text = {k: v for k, v in config_dict.get("text_config", {}).items() if k != GUARD}
        dropped = ("text_config", "model_type", GUARD)
        told = {k: v for k, v in config_dict.items() if k not in dropped}
        if "base_model_type" not in told:
            raise ValueError("config.json: base_model_type is missing: name the architecture")
        return cast("FactoredConfig", super().from_dict({**text, **told}, **kwargs))

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
def _config_class(base_model_type: str) -> type[FactoredConfig]:
    """The configuration that is factored and of the stock architecture."""
    if base_model_type not in CONFIG_MAPPING:
        raise ValueError(f"base_model_type: {base_model_type} is no architecture of transformers")
    stock = CONFIG_MAPPING[base_model_type]
    made = strict(_named("FactoredConfig", base_model_type, (FactoredConfig, stock)))
    return cast("type[FactoredConfig]", made)


def _named(name: str, kind: str, bases: tuple[type, ...], **members: object) -> type:
    """A class that saves under `name`; the second name is for pickle, which imports by it."""
    qualified = f"{name}_{kind}"
    made = type(name, bases, {"__module__": __name__, "__qualname__": qualified, **members})
    globals()[qualified] = made
    return made


class FactoredLinear(nn.Module):
    """`W' x + b` with W' a product; no `nn.Linear`, or asks for all linears would find it.

    Attributes:
        in_features, out_features: of the map that it stands for.
    """

    factor_A: nn.Parameter
    factor_B: nn.Parameter

    def __init__(self, linear: nn.Module, rank: int, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.in_features, self.out_features = _sizes(linear)
        self.rank, like = rank, cast("Tensor", linear.weight)
        for name, shape in zip(("factor_A", "factor_B"), shapes, strict=True):
            zeros = torch.zeros(shape, device=like.device, dtype=like.dtype)
            self.register_parameter(name, nn.Parameter(zeros))
        self.bias = cast("nn.Parameter | None", linear.bias)

    @property
    def weight(self) -> Tensor:
        """The map as one matrix, [out, in]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What printing a model shows."""
        told = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{told}, rank={self.rank}, bias={self.bias is not None}"

    def start(self) -> None:
        """Draw numbers for what no checkpoint filled; the product keeps the size of its input."""
        for factor in (self.factor_A, self.factor_B):
            _fill(factor, factor.shape[-1] ** -0.5)


class LowRankLinear(FactoredLinear):
    """`B A x + b`."""

    def __init__(self, linear: nn.Module, rank: int) -> None:
        into, out = _sizes(linear)
        super().__init__(linear, rank, ((rank, into), (out, rank)))

    @property
    def weight(self) -> Tensor:
        """The map as one matrix, [out, in]."""
        return self.factor_B @ self.factor_A

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        low = nn.functional.linear(x, self.factor_A)
        return nn.functional.linear(low, self.factor_B, self.bias)


class SparseLowRankLinear(FactoredLinear):
    """`(B A + S) x + b`; as in the paper the sum is made in every pass, and dropped again."""

    sparse_places: Tensor  # flat, into [out, in], rising

    def __init__(self, linear: nn.Module, rank: int, entries: int) -> None:
        into, out = _sizes(linear)
        if not 0 < entries <= into * out:
            raise ValueError(f"factored: {entries} entries of a map of {out} x {into}")
        super().__init__(linear, rank, ((rank, into), (out, rank)))
        device, dtype = self.factor_A.device, self.factor_A.dtype
        # Even places: with a checkpoint they come from there, without one they are as good as any.
        places = torch.arange(entries, device=device) * (into * out) // entries
        wide = torch.int32 if into * out < INT32 else torch.int64
        self.register_buffer("sparse_places", places.to(wide))
        self.sparse_values = nn.Parameter(torch.zeros(entries, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        """The map as one matrix, [out, in]."""
        product = (self.factor_B @ self.factor_A).flatten()
        whole = product.index_add(0, self.sparse_places, self.sparse_values)
        return whole.view(self.out_features, self.in_features)

    def start(self) -> None:
        """Draw numbers for what no checkpoint filled."""
        super().start()
        _fill(self.sparse_values, self.in_features**-0.5)


class MonarchLinear(FactoredLinear):
    """`W' x + b` with K blocks of inputs, J of outputs, and a low-rank map for each of K J pairs.

    factor_A is [K, J rank, in / K] and factor_B [J, out / J, K rank]; output o is in block o mod J.
    """

    def __init__(self, linear: nn.Module, rank: int, blocks: tuple[int, int]) -> None:
        (into, out), (first, second) = _sizes(linear), blocks
        if into % first or out % second:
            raise ValueError(f"factored: blocks {list(blocks)} do not divide {into} and {out}")
        shapes = (first, second * rank, into // first), (second, out // second, first * rank)
        super().__init__(linear, rank, shapes)
        self.blocks = blocks

    @property
    def weight(self) -> Tensor:
        """The map as one matrix, [out, in]."""
        first, second = self.blocks
        a = self.factor_A.view(first, second, self.rank, -1)  # [K, J, r, in / K]
        b = self.factor_B.view(second, -1, first, self.rank)  # [J, out / J, K, r]
        return torch.einsum("jlkr,kjri->ljki", b, a).reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: [..., in] to [..., out]."""
        first, second = self.blocks
        blocks = x.reshape(*x.shape[:-1], first, -1)
        inner = torch.einsum("...ki,kci->...kc", blocks, self.factor_A)
        inner = inner.view(*inner.shape[:-1], second, self.rank).transpose(-3, -2).flatten(-2)
        found = torch.einsum("...jc,jlc->...lj", inner, self.factor_B).flatten(-2)
        return found if self.bias is None else found + self.bias


def _factored(linear: nn.Module, told: Mapping[str, Any]) -> FactoredLinear:
    kind, rank = told.get("kind"), told.get("rank")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"factored: rank {rank} is no number above 0")
    if kind == "low-rank":
        return LowRankLinear(linear, rank)
    if kind == "sparse-low-rank":
        return SparseLowRankLinear(linear, rank, int(told["entries"]))
    if kind == "monarch":
        first, second = told["blocks"]
        return MonarchLinear(linear, rank, (first, second))
    raise ValueError(f"factored: the kind {kind} is none of {', '.join(KINDS)}")


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    shape = cast("Tensor", linear.weight).shape
    return (shape[0], shape[1]) if isinstance(linear, Conv1D) else (shape[1], shape[0])


def _fill(parameter: nn.Parameter, deviation: float) -> None:
    # The flag is transformers', on each parameter that came from the checkpoint.
    flag = "_is_hf_initialized"
    if not getattr(parameter, flag, False):
        with torch.no_grad():
            parameter.normal_(0.0, deviation)
        setattr(parameter, flag, True)


class FactoredForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model some of whose linear maps are factored."""

    config_class = FactoredConfig

    def __new__(
        cls, config: FactoredConfig | None = None, *_: object, **__: object
    ) -> "FactoredForCausalLM":
        """Take the subclass that also is the stock model of the configuration."""
        if cls is FactoredForCausalLM and config is not None:
            return object.__new__(_model_class(config.base_model_type))
        return object.__new__(cls)

    def save_pretrained(self, *args: object, **kwargs: object) -> None:
        """Write the factors, with this file beside them."""
        _convert_as(self.config.base_model_type)
        super().save_pretrained(*args, **kwargs)

    def post_init(self) -> None:
        """Put factored maps in place of the stock ones, then let transformers initialise them."""
        _convert_as(self.config.base_model_type)
        if getattr(self.config, "quantization_config", None) is not None:
            raise ValueError("quantization_config: factors are not quantised: materialize first")
        modules = dict(self.named_modules())
        for name, told in self.config.factored.items():
            linear = modules.get(name)
            if type(linear) not in (nn.Linear, Conv1D):
                raise ValueError(f"factored: {name} is no linear map of the model")
            self.set_submodule(name, _factored(cast("nn.Module", linear), told))
        super().post_init()

    def initialize_weights(self) -> None:
        """Stock numbers for what no checkpoint filled, and random factors."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, FactoredLinear):
                module.start()


@lru_cache
def _model_class(base_model_type: str) -> type[FactoredForCausalLM]:
    """The model that is factored and of the stock architecture."""
    config_class = _config_class(base_model_type)
    stock = AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[base_model_type], None)
    if stock is None:
        raise ValueError(f"base_model_type: {base_model_type} has no causal language model")
    bases = (FactoredForCausalLM, stock)
    made = _named("FactoredForCausalLM", base_model_type, bases, config_class=config_class)
    return cast("type[FactoredForCausalLM]", made)


def _convert_as(base_model_type: str) -> None:
    # Experts lie apart on disk and packed in memory, by a table that transformers keeps by name.
    table = get_checkpoint_conversion_mapping(base_model_type) or []
    register_checkpoint_conversion_mapping(FactoredConfig.model_type, table, overwrite=True)


FactoredConfig.register_for_auto_class()
FactoredForCausalLM.register_for_auto_class("AutoModelForCausalLM")
