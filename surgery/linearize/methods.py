"""What stands for softmax attention: methods by name, their options and parameters (no torch)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from surgery.errors import RecipeError
from surgery.linearize.initial import IDENTITY, ZERO, Start, constant

Spec = Mapping[str, Any]
OPTIONS = ("window", "sinks", "feature_dim", "feature_map")
FLOAT = 4  # bytes of a number of the state
INT = 8  # bytes of the number of a document


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of an attention layer: width of its input, heads, heads of keys and values, their width."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class New:
    """A parameter that softmax attention does not have: its shape and how it begins."""

    shape: tuple[int, ...]
    start: Start


@dataclass(frozen=True, slots=True)
class Kept:
    """What a layer keeps of a text, however long, for a row.

    Attributes:
        sums: numbers in float32.
        tokens: keys and values of so many tokens, in the dtype of the model.
        whole: int64 numbers: of documents, of places.
    """

    sums: int = 0
    tokens: int = 0
    whole: int = 0

    def nbytes(self, sizes: Sizes, width: int) -> int:
        """Bytes a row; `width` are those of a number of the model."""
        cached = 2 * self.tokens * sizes.kv_heads * sizes.head_dim * width
        return FLOAT * self.sums + cached + INT * self.whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to mix tokens without softmax over all of them.

    Attributes:
        defaults: of the options that apply; others are refused. `feature_dim` is a function of
            the width of a head.
        maps: the feature maps to choose from, the default first.
        more: further entries of the spec, fixed.
        new: the parameters of a layer, by name below `self_attn.mixer`.
        kept: what a layer keeps of a text.
        projections: those of the base that train with the new parameters in the transfer stage.
        rope: needs rotary embedding.
        source: where its equations are from.
    """

    name: str
    defaults: Spec
    maps: tuple[str, ...] = ("none",)
    more: Spec = field(default_factory=dict)
    new: Callable[[Spec, Sizes], dict[str, New]]
    kept: Callable[[Spec, Sizes], Kept]
    projections: tuple[str, ...] = ()
    rope: bool = True
    source: str

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that apply."""
        choice = ("feature_map",) if len(self.maps) > 1 else ()
        return tuple(name for name in OPTIONS if name in (*self.defaults, *choice))


def _maps(spec: Spec, sizes: Sizes) -> dict[str, New]:
    shape = (sizes.heads, sizes.head_dim, spec["feature_dim"])
    return {name: New(shape, IDENTITY) for name in ("query_map", "key_map")}


def _lolcats(spec: Spec, sizes: Sizes) -> dict[str, New]:
    return {**_maps(spec, sizes), "window_factors": New((sizes.heads,), constant(LOGIT))}


def _t2r(spec: Spec, sizes: Sizes) -> dict[str, New]:
    bias = New((sizes.heads, 1, spec["feature_dim"]), ZERO)
    return {**_maps(spec, sizes), "query_bias": bias, "key_bias": bias}


def _none(spec: Spec, sizes: Sizes) -> dict[str, New]:  # noqa: ARG001
    return {}


def _lizard(spec: Spec, sizes: Sizes) -> dict[str, New]:
    gate = {"gate.weight": New((1, sizes.hidden), ZERO), "gate.bias": New((1,), constant(3.0))}
    more = {
        "alpha": New((1,), constant(1.0)),
        "sink_logits": New((sizes.heads, spec["sinks"]), ZERO),
    }
    return {**_maps(spec, sizes), **gate, **more}


def _linear(maps: int) -> Callable[[Spec, Sizes], Kept]:
    """Sums over all tokens before, with a column for the normaliser, for each query head."""

    def kept(spec: Spec, sizes: Sizes) -> Kept:
        features = maps * spec["feature_dim"]
        sums = sizes.heads * features * (sizes.head_dim + 1)
        tokens = spec["window"] - 1 if spec["window"] else 0
        return Kept(sums=sums, tokens=tokens)

    return kept


LOGIT = math.log(0.1 / 0.9)  # sigmoid gives 0.1

WIDTH = 64  # of features and windows in LoLCATs
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                name="lolcats",
                defaults={"window": WIDTH, "feature_dim": lambda d: min(WIDTH, d)},
                maps=("softmax", "exp"),
                new=_lolcats,
                kept=_linear(2),
                source="arXiv 2410.10254, section 3; lolcats@375df84",
            ),
            Method(
                name="hedgehog",
                defaults={"feature_dim": lambda d: min(WIDTH, d)},
                maps=("exp", "softmax"),
                new=_maps,
                kept=_linear(2),
                source="arXiv 2402.04347, section 4",
            ),
            Method(
                name="t2r",
                defaults={"feature_dim": lambda d: d},
                maps=("relu",),
                new=_t2r,
                kept=_linear(1),
                source="arXiv 2103.13076, section 2",
            ),
            Method(
                name="liger",
                defaults={"window": WIDTH},
                new=_none,
                kept=_linear(1),
                source="arXiv 2503.01496, section 3",
            ),
            Method(
                name="lizard",
                defaults={"window": 128, "sinks": 4, "feature_dim": lambda d: d // 2},
                maps=("softmax", "exp"),
                new=_lizard,
                kept=_linear(2),
                rope=False,
                source="arXiv 2507.09025, sections 3 and 4",
            ),
            Method(
                name="based",
                defaults={"window": WIDTH, "feature_dim": lambda d: min(16, d)},
                maps=("taylor",),
                new=_maps,
                kept=_linear(1),
                source="arXiv 2402.18668, section 4",
            ),
            Method(
                name="swa-sink",
                defaults={"window": WIDTH, "sinks": 4},
                new=_none,
                kept=lambda spec, _: Kept(tokens=spec["window"]),
                source="arXiv 2608.28444; sinks of arXiv 2309.17453",
            ),
        )
    }
)


def method_of(name: str) -> Method:
    """Return a method by its name.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in METHODS:
        raise RecipeError(f"--method {name}", f"is none of {', '.join(METHODS)}")
    return METHODS[name]


def check_options(method: Method, asked: Mapping[str, Any]) -> None:
    """Refuse options that do not apply, or that make no sense whatever the model.

    Args:
        asked: by name; None where nothing was asked for.

    Raises:
        RecipeError: with the reason.
    """
    for name, value in asked.items():
        place = f"--{name.replace('_', '-')} {value}"
        if value is None:
            continue
        if name not in method.options:
            has = ", ".join(f"--{n.replace('_', '-')}" for n in method.options)
            remedy = f"its options are {has}" if has else "it has no such options"
            raise RecipeError(place, f"is nothing that --method {method.name} has", remedy)
        if name == "feature_map":
            if value not in method.maps:
                fact = f"is no feature map of --method {method.name}"
                raise RecipeError(place, fact, f"take {' or '.join(method.maps)}")
        elif type(value) is not int or value < (0 if name == "sinks" else 1):
            raise RecipeError(place, "is too small", f"the default is {method.defaults[name]}")
    window = asked.get("window") or method.defaults.get("window")
    sinks = asked.get("sinks") or 0
    if window and sinks >= window:
        fact = f"leaves no room for near tokens in a window of {window}"
        raise RecipeError(f"--sinks {sinks}", fact, "lower it, or widen the window")


def full_spec(method: Method, asked: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the section `mixer` of the config, with every entry written out.

    Args:
        asked: options by name; None where the default holds.
    """
    told = {name: value for name, value in asked.items() if value is not None}
    spec = {"window": 0, "sinks": 0, "feature_map": method.maps[0], "feature_dim": 0}
    chosen = spec | dict(method.defaults) | told | dict(method.more)
    if callable(chosen["feature_dim"]):
        chosen["feature_dim"] = chosen["feature_dim"](sizes.head_dim)
    return {"method": method.name, **chosen}
