"""Attention modules of a linearized model: with a mixer, or as they were."""

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .linear_seen import Mixer, Seen, Shape

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
PARTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"})
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

Mode = Literal["linear", "teacher", "compare"]


@dataclass(frozen=True)
class Compared:
    """Outputs of one layer on the same input, before the output projection.

    Attributes:
        student: [b, t, heads * head_dim], of the mixer.
        teacher: of softmax attention, without a gradient.
        keep: [b, t], which tokens are no padding.
    """

    student: Tensor
    teacher: Tensor
    keep: Tensor


class Kept:
    """A layer with softmax attention; it does not hear of documents."""

    def forward(self, *args: object, docs: object = None, **kwargs: object) -> Any:  # noqa: ANN401, ARG002
        """The stock pass."""
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class Linear:
    """A layer whose mixer stands for softmax attention; mixed into the stock attention class."""

    mixer: Mixer
    mode: Mode = "linear"
    frozen: tuple[
        nn.Module, ...
    ] = ()  # the teacher where its projections are no longer the layer's
    compared: Compared | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        docs: Tensor | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes: [b, t, hidden] to the same; `docs` int64 [b, t]."""
        layer = cast("Any", self)
        if self.mode == "linear":
            past = None
            if past_key_values is not None:
                past = past_key_values.layers[layer.layer_idx].past
            mixed = self.mixer(_seen(layer, hidden_states, position_embeddings, docs), past)
            if past is not None:
                past.length += hidden_states.shape[1]
            return layer.o_proj(mixed.to(hidden_states.dtype)), None
        if past_key_values is not None:
            raise ValueError(f"mode {self.mode}: softmax attention runs without a cache here")
        before: list[Tensor] = []
        with torch.no_grad(), _before_output(self.frozen, layer, before):
            run = self.frozen[0] if self.frozen else super().forward  # type: ignore[misc]
            output = run(hidden_states, position_embeddings, attention_mask, **kwargs)[0]
        if self.mode == "compare":
            seen = _seen(layer, hidden_states.detach(), position_embeddings, docs)
            keep = torch.ones_like(hidden_states[..., 0], dtype=torch.bool)
            keep = keep if docs is None else docs >= 0
            self.compared = Compared(self.mixer(seen, None), before[0], keep)
        return output, None


@contextmanager
def _before_output(
    frozen: tuple[nn.Module, ...],
    layer: Any,  # noqa: ANN401
    into: list[Tensor],
) -> Iterator[None]:
    """Catch what the output projection of the teacher is given."""
    projection = cast("Any", frozen[0] if frozen else layer).o_proj
    handle = projection.register_forward_pre_hook(lambda _, given: into.append(given[0]))
    try:
        yield
    finally:
        handle.remove()


def _seen(layer: Any, x: Tensor, turns: tuple[Tensor, Tensor], docs: Tensor | None) -> Seen:  # noqa: ANN401
    """Queries, keys and values as softmax attention would have them."""
    shape: Shape = layer.mixer.shape
    q, k = (_normed(layer, x, name) for name in ("q", "k"))
    v = _heads(layer.v_proj(x), shape.head_dim)
    rotate = sys.modules[layer.stock.__module__].apply_rotary_pos_emb
    q_rope, k_rope = rotate(q, k, *turns)
    return Seen(
        x=x,
        q=_grouped(q, shape),
        k=k[:, :, None],
        v=v[:, :, None],
        q_rope=_grouped(q_rope, shape),
        k_rope=k_rope[:, :, None],
        docs=docs,
    )


def _normed(layer: Any, x: Tensor, name: str) -> Tensor:  # noqa: ANN401
    """Project, and norm where the architecture does: over a head, or before it is cut in heads."""
    width = layer.mixer.shape.head_dim
    projected: Tensor = getattr(layer, f"{name}_proj")(x)
    norm = getattr(layer, f"{name}_norm", None)
    if norm is None or not layer.mixer.normed:
        return _heads(projected, width)
    if norm.weight.numel() == width:
        return cast("Tensor", norm(_heads(projected, width)))
    return _heads(norm(projected), width)


def _grouped(q: Tensor, shape: Shape) -> Tensor:
    b, _, t, d = q.shape
    return q.reshape(b, shape.kv_heads, shape.groups, t, d)


def _heads(x: Tensor, width: int) -> Tensor:
    return x.view(*x.shape[:-1], -1, width).transpose(1, 2)


@lru_cache
def mixed_class(ours: type, stock: type) -> type:
    """Return the stock class with what is ours before it."""
    # The stock names: transformers finds by them what it places over devices, and what it records
    # where hidden states are asked for. Pickle would find the stock class: it is told another way.
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    remade = {"__reduce__": lambda self: (_blank, (ours, stock), self.__dict__)}
    return type(stock.__name__, (ours, stock), {**names, **remade})


def _blank(ours: type, stock: type) -> Any:  # noqa: ANN401
    return object.__new__(mixed_class(ours, stock))


def check_attention(attention: nn.Module, n: int) -> None:
    """Refuse attention that is more than projections, norms and RoPE.

    Raises:
        ValueError: layer `n` has, or lacks, something.
    """
    found = {name for name, _ in attention.named_children()}
    alone = {name for name, _ in attention.named_parameters(recurse=False)}
    odd = sorted((found - PARTS) | alone)
    missing = sorted(set(PROJECTIONS) - found)
    if odd or missing:
        fact = f"has {odd[0]}" if odd else f"has no {missing[0]}"
        raise ValueError(f"linear_layers: the attention of layer {n} {fact}")


def shape_of(attention: Any, config: Any) -> Shape:  # noqa: ANN401
    """Return the sizes of an attention module."""
    width = attention.head_dim
    return Shape(
        hidden=attention.q_proj.in_features,
        heads=attention.q_proj.out_features // width,
        kv_heads=attention.k_proj.out_features // width,
        head_dim=width,
        scale=attention.scaling,
        eps=config.rms_norm_eps,
    )


def converted(model: nn.Module) -> dict[int, Any]:
    """Return the attention modules of linear layers, by layer.

    Args:
        model: a linearized model, or what wraps one.
    """
    found = (module for module in model.modules() if isinstance(module, Linear))
    return {cast("Any", module).layer_idx: module for module in found}


def set_mode(model: nn.Module, mode: Mode, layers: Iterable[int] | None = None) -> None:
    """Choose what linear layers compute.

    Args:
        model: a linearized model.
        mode: `linear`; `teacher`, the softmax attention that the layer had; or `compare`, which
            hands on the teacher's output and leaves both on the module, as `compared`.
        layers: which; None for all.
    """
    modules = converted(model)
    for n in modules if layers is None else layers:
        modules[n].mode = mode
        modules[n].compared = None


def keep_teacher(model: nn.Module) -> None:
    """Keep frozen copies of the attention of linear layers, before its projections train.

    The copies are no parameters of the model and in no checkpoint of it; place the model first.
    """
    for module in converted(model).values():
        mixer = module.mixer
        try:
            module.mixer = None
            stock = copy.deepcopy(module)
        finally:
            module.mixer = mixer
        stock.__class__ = module.stock
        del stock.mixer
        module.frozen = (stock.requires_grad_(requires_grad=False),)


def ablate(model: nn.Module, *, linear_branch: bool) -> None:
    """Leave the linear branch out, or take it in again, in memory alone."""
    for module in converted(model).values():
        module.mixer.spec = {**module.mixer.spec, "linear_branch": linear_branch}
