"""A sliding window for every layer, in the words of each family's config."""

from collections.abc import Mapping
from typing import Any

from surgery.errors import PlanError

# One window for all layers, and the one that a config has which says nothing.
ONE: Mapping[str, int | None] = {
    "mistral": 4096, "mixtral": None, "phi3": None, "starcoder2": None,
}  # fmt: skip
SWITCHED = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")  # use_sliding_window
SLIDING = "sliding_attention"
COUNT = "num_hidden_layers"


def with_window(
    text: Mapping[str, Any], family: str, window: int, place: object, *, whole: bool
) -> dict[str, Any]:
    """Return the config of a language model with a window in every layer.

    A Llama without biases becomes a Mistral, which is the same but for its window.

    Args:
        whole: it is the whole config, and no section of one.

    Raises:
        PlanError: the family's own class has no window, or the model has one already.
    """
    if family == "llama" and whole and not _biased(text):
        names = [str(n).replace("Llama", "Mistral") for n in text.get("architectures") or ()]
        named = {"architectures": names} if names else {}
        return {**text, **named, "model_type": "mistral", "sliding_window": window}
    if family not in ONE and family not in SWITCHED:
        fact = f"is of the family {family}, whose class has no window for all layers"
        raise PlanError(place, fact, "take --method yarn or dynamic")
    _refuse_window(text, family, place)
    if family in ONE:
        return {**text, "sliding_window": window}
    switched = {**text, "use_sliding_window": True, "sliding_window": window}
    switched["max_window_layers"] = 0
    if "layer_types" in text or family in ("qwen2", "qwen3", "smollm3"):
        switched["layer_types"] = [SLIDING] * int(text[COUNT])
    return switched


def _biased(text: Mapping[str, Any]) -> bool:
    return bool(text.get("attention_bias") or text.get("mlp_bias"))


def _refuse_window(text: Mapping[str, Any], family: str, place: object) -> None:
    there = text.get("sliding_window", ONE.get(family))
    used = family in ONE or bool(text.get("use_sliding_window"))
    if there is not None and used:
        fact = f"has a window of {there} already"
        raise PlanError(place, fact, "take --method yarn or dynamic")
