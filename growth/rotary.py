"""What a config says of rotary positions, old spelling or new, and how it is changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import PlanError

OLD = ("rope_theta", "rope_scaling", "rotary_emb_base")
THETA = ("rope_theta", "rotary_emb_base")
PARTIAL = ("partial_rotary_factor", "rotary_pct")
PLAIN = (None, "default", "mrope")  # kinds that scale nothing
# Families whose configs may leave out the base of the frequencies, which is then 10000.
UNSAID = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "olmo"})
UNSAID_PARTIAL: Mapping[str, float] = {"gpt_neox": 0.25}
# Families with one set of frequencies for full attention and one for sliding: their bases.
BY_KIND: Mapping[str, tuple[float, float]] = {
    "gemma3": (1e6, 1e4),
    "gemma3_text": (1e6, 1e4),
    "olmo3": (5e5, 5e5),
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """The positions of a model.

    Attributes:
        parameters: of the layers that look at everything; `rope_theta` is among them if known.
        sliding: of those that look at a window, where they have their own.
        dimensions: how many of a head's are rotated; None where the config does not tell.
        head: the size of a head, where the config leaves it to be computed.
    """

    parameters: Mapping[str, Any]
    sliding: Mapping[str, Any] | None
    dimensions: int | None
    head: int | None

    @property
    def kind(self) -> str | None:
        """How they are scaled already."""
        kind: str | None = self.parameters.get("rope_type", self.parameters.get("type"))
        return kind


def read_rotary(text: Mapping[str, Any], family: str, place: object) -> Rotary:
    """Read the rotary positions of the config of a language model.

    Raises:
        PlanError: it says nothing of any, or has more kinds of them than full and sliding.
    """
    told = text.get("rope_parameters")
    if text.get("alibi"):
        raise PlanError(place, "has ALiBi in place of rotary positions", "it needs no extension")
    says = isinstance(told, dict) or any(key in text for key in OLD)
    if not says and family not in UNSAID and family not in BY_KIND:
        fact = f"says of no rotary positions ({', '.join(('rope_parameters', *OLD))})"
        raise PlanError(place, fact, "only rotary positions can be extended by a config")
    if isinstance(told, dict) and any(isinstance(part, dict) for part in told.values()):
        return _nested(told, text, place)
    if told is None and (family in BY_KIND or "rope_local_base_freq" in text):
        return _old_by_kind(text, family)
    return _flat(told or {}, text, family)


def _nested(told: Mapping[str, Any], text: Mapping[str, Any], place: object) -> Rotary:
    if not set(told) <= {FULL, SLIDING} or not isinstance(told.get(FULL), dict):
        fact = f"has rotary positions of the kinds {', '.join(map(str, told))}"
        raise PlanError(place, fact, f"only {FULL} and {SLIDING} are known")
    parameters, sliding = dict(told[FULL]), told.get(SLIDING)
    return Rotary(
        parameters=parameters,
        sliding=sliding if isinstance(sliding, dict) else {"rope_type": "default"},
        dimensions=_dimensions(text, parameters.get("partial_rotary_factor")),
        head=_head(text),
    )


def _old_by_kind(text: Mapping[str, Any], family: str) -> Rotary:
    far, near = BY_KIND.get(family, (1e6, 1e4))
    theta = text.get("rope_theta", far)
    own = theta if family == "olmo3" else text.get("rope_local_base_freq", near)
    return Rotary(
        parameters={"rope_theta": theta, **_typed(text.get("rope_scaling") or {})},
        sliding={"rope_type": "default", "rope_theta": own},
        dimensions=_dimensions(text, None),
        head=_head(text),
    )


def _flat(told: Mapping[str, Any], text: Mapping[str, Any], family: str) -> Rotary:
    found = {**told, **_typed(text.get("rope_scaling") or {})}
    theta = next((text[key] for key in THETA if text.get(key) is not None), None)
    partial = next((text[key] for key in PARTIAL if text.get(key) is not None), None)
    theta = 10000.0 if theta is None and family in UNSAID else theta
    partial = UNSAID_PARTIAL.get(family) if partial is None else partial
    if theta is not None and found.get("rope_theta") is None:
        found["rope_theta"] = theta
    if partial is not None:
        found.setdefault("partial_rotary_factor", partial)
    return Rotary(
        parameters=found,
        sliding=None,
        dimensions=_dimensions(text, found.get("partial_rotary_factor")),
        head=_head(text),
    )


def _typed(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """Return an old `rope_scaling` with the newer name of its kind."""
    kind = scaling.get("rope_type", scaling.get("type"))
    kind = "default" if kind == "mrope" else kind
    rest = {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
    return {**rest, "rope_type": kind} if kind else rest


def _head(text: Mapping[str, Any]) -> int | None:
    """Return the size of a head where the config leaves it to be computed."""
    heads, width = text.get("num_attention_heads"), text.get("hidden_size")
    told = text.get("head_dim") or text.get("qk_rope_head_dim")
    if told or not isinstance(heads, int) or not isinstance(width, int) or not heads:
        return None
    return width // heads


def _dimensions(text: Mapping[str, Any], partial: float | None) -> int | None:
    """Return how many dimensions of a head are rotated."""
    head: Any = text.get("qk_rope_head_dim") or text.get("head_dim") or _head(text)
    if not isinstance(head, int):
        return None
    whole = text.get("qk_rope_head_dim") is not None
    return int(head * (1.0 if whole or partial is None else partial))


def with_rotary(text: Mapping[str, Any], old: Rotary, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with new positions; older keys that it has say the same."""
    found = dict(text)
    if old.sliding is not None:
        found["rope_parameters"] = {FULL: dict(new), SLIDING: dict(old.sliding)}
        for key in (*OLD, "rope_local_base_freq"):
            found.pop(key, None)
        return found
    found["rope_parameters"] = dict(new)
    for key in (key for key in THETA if text.get(key) is not None and new.get("rope_theta")):
        found[key] = new["rope_theta"]
    if any(key in text for key in OLD):
        rest = {k: v for k, v in new.items() if k not in ("rope_theta", *PARTIAL)}
        found["rope_scaling"] = None if set(rest) <= {"rope_type"} and plain(rest) else rest
    return found


def plain(parameters: Mapping[str, Any]) -> bool:
    """Whether parameters scale nothing."""
    return parameters.get("rope_type", parameters.get("type")) in PLAIN
