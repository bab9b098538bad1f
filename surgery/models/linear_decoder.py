"""What a linearized decoder does before its layers: it tells them of padding and of documents."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .linear_cache import adopt

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up


class Decoder:
    """Tells the layers what is padding and where documents begin; mixed into the stock decoder."""

    def forward(  # noqa: PLR0917
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> Any:  # noqa: ANN401 - the stock class's output
        """The stock pass, and `docs` for its layers."""
        model = cast("Any", self)
        config = model.config
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if use_cache is None:
            use_cache = config.use_cache and not (model.gradient_checkpointing and model.training)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        told = _tell(attention_mask, position_ids, given, seen)
        if told.packed and past_key_values is not None:
            raise ValueError("position_ids: packed documents do not go on from a cache")
        if use_cache and past_key_values is None and not told.packed:
            past_key_values = DynamicCache(config=config)
        if past_key_values is not None:
            adopt(past_key_values, config, config.linear_layers)
        if not _attends(
            model
        ):  # a mask of four axes keeps the stock class from making a square one
            attention_mask = torch.zeros(1, 1, 1, 1, device=given.device)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=told.position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache and not told.packed,
            docs=told.docs,
            **kwargs,
        )


@dataclass(frozen=True)
class _Told:
    position_ids: Tensor | None
    docs: Tensor | None
    packed: bool = False


def _tell(mask: Tensor | None, position_ids: Tensor | None, given: Tensor, seen: int) -> _Told:
    """Positions, and the number of each token's document.

    Maps of rotated keys see where a text begins. Where nobody says otherwise it begins at its first
    token, not in the padding before it.
    """
    b, t = given.shape[:2]
    if mask is None:
        if position_ids is None or seen:
            return _Told(position_ids, None)
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        if not starts.any():
            return _Told(position_ids, None)
        docs = nn.functional.pad(starts.long().cumsum(1), (1, 0)).expand(b, -1)
        return _Told(position_ids, docs, packed=True)
    if not isinstance(mask, Tensor) or mask.dim() != 2:  # noqa: PLR2004
        raise ValueError("attention_mask: linear layers read masks of [rows, tokens] alone")
    if mask.shape[1] != seen + t:
        fact = f"has {mask.shape[1]} columns for {seen} tokens in the cache and {t} new ones"
        raise ValueError(f"attention_mask: {fact}: give one for each")
    real = mask.to(given.device).bool()
    begins = (nn.functional.pad(real[:, :-1], (1, 0)) < real).sum(1)
    whole, torn = torch.stack((real[:, -t:].all(), (begins > 1).any())).tolist()
    if torn:
        raise ValueError("attention_mask: padding between the tokens of a row: pad on the left")
    if position_ids is None:
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)[:, -t:]
    return _Told(position_ids, None if whole else real[:, -t:].long() - 1)


def _attends(model: Any) -> bool:  # noqa: ANN401
    """Whether any layer runs softmax attention over all tokens."""
    return any(getattr(layer.self_attn, "mode", "teacher") != "linear" for layer in model.layers)
