"""What stands for softmax attention: methods by name, their options and parameters (no torch)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from surgery.errors import RecipeError
from surgery.linearize.parameters import (
    Kept,
    New,
    Sizes,
    Spec,
    gated_delta,
    gla,
    halves,
    lizard,
    lolcats,
    maps,
    nothing,
    products,
    square,
    square_and_taps,
    square_and_window,
    sums_and_window,
    t2r,
    window_and_sinks,
)

OPTIONS = ("window", "sinks", "feature_dim", "feature_map")


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


TRAINED = ("q_proj", "k_proj", "v_proj", "o_proj")
WIDTH = 64  # of features and windows in LoLCATs
METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method(
                name="lolcats",
                defaults={"window": WIDTH, "feature_dim": lambda d: min(WIDTH, d)},
                maps=("softmax", "exp"),
                new=lolcats,
                kept=sums_and_window(halves(2)),
                source="arXiv 2410.10254, section 3; lolcats@375df84",
            ),
            Method(
                name="hedgehog",
                defaults={"feature_dim": lambda d: min(WIDTH, d)},
                maps=("exp", "softmax"),
                new=maps,
                kept=sums_and_window(halves(2)),
                source="arXiv 2402.04347, section 4",
            ),
            Method(
                name="t2r",
                defaults={"feature_dim": lambda d: d},
                maps=("relu",),
                new=t2r,
                kept=sums_and_window(halves(1)),
                source="arXiv 2103.13076, section 2",
            ),
            Method(
                name="liger",
                defaults={"window": WIDTH},
                new=nothing,
                kept=square_and_window,
                source="arXiv 2503.01496, section 3",
            ),
            Method(
                name="lizard",
                defaults={"window": 128, "sinks": 4, "feature_dim": lambda d: d // 2},
                maps=("softmax", "exp"),
                new=lizard,
                kept=sums_and_window(halves(2)),
                rope=False,
                source="arXiv 2507.09025, sections 3 and 4",
            ),
            Method(
                name="based",
                defaults={"window": WIDTH, "feature_dim": lambda d: min(16, d)},
                maps=("taylor",),
                new=maps,
                kept=sums_and_window(products),
                source="arXiv 2402.18668, section 4",
            ),
            Method(
                name="gla",
                defaults={},
                new=gla,
                kept=square,
                projections=TRAINED,
                rope=False,
                source="arXiv 2312.06635, section 4.3",
            ),
            Method(
                name="gated-delta",
                defaults={},
                new=gated_delta,
                kept=square_and_taps,
                projections=TRAINED,
                rope=False,
                source="arXiv 2412.06464, section 3.4",
            ),
            Method(
                name="swa-sink",
                defaults={"window": WIDTH, "sinks": 4},
                new=nothing,
                kept=window_and_sinks,
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
            raise RecipeError(place, "is too small", _remedy(method.defaults[name]))
    window = asked.get("window") or method.defaults.get("window")
    sinks = asked.get("sinks")
    sinks = method.defaults.get("sinks", 0) if sinks is None else sinks
    if window and sinks >= window:
        fact = f"leaves no room for near tokens in a window of {window}"
        raise RecipeError(f"--sinks {sinks}", fact, "lower it, or widen the window")


def _remedy(default: Any) -> str:  # noqa: ANN401 - a number, or a function of the width of a head
    return "give 1 or more" if callable(default) else f"the default is {default}"


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
