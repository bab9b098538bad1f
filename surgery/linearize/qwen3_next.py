"""The gated delta rule in the layout of transformers' Qwen3NextForCausalLM."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError
from surgery.linearize.linearized import (
    Linearized,
    change,
    copy_as,
    open_linearized,
    sizes_of,
    unknown,
)
from surgery.plan import Function, Step, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.stored import Stored

TO, METHOD = "qwen3-next", "gated-delta"
NORMED = "qwen3"  # the one that norms queries and keys as Qwen3NextAttention does
COPIED = tuple(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down"))
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
HEAD_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
MIXER = "self_attn.mixer."
PARTS = ("gate.weight", "norm", "conv_q", "conv_k", "conv_v", "beta.weight", "decay.weight")
OWN = frozenset(
    [*(f"self_attn.{n}_proj.weight" for n in "qkvo"), *HEAD_NORMS]
    + [f"{MIXER}{rest}" for rest in (*PARTS, "A_log", "dt_bias")]
)
TAPS = 4
NOTE = (
    "its norms multiply by 1 + w: w - 1 is stored in float32; where a weight is below 1/2, loading "
    "in bfloat16 rounds it"
)


def open_for(source: Checkpoint) -> Linearized:
    """Return the opened checkpoint.

    Raises:
        PlanError: it is not exactly a model of that class.
        CheckpointError: it is damaged.
    """
    opened = open_linearized(source, method=METHOD, to=TO)
    if opened.stock["model_type"] != NORMED:
        fact = f"is of {opened.stock['model_type']}, which does not norm queries and keys of a head"
        raise PlanError(source.ref, fact, f"{TO} takes models made from Qwen3")
    if not opened.kept:
        fact = "keeps softmax attention in no layer, and the class counts tokens by such a layer"
        raise PlanError(source.ref, fact, "linearize with --keep-softmax, at least one layer")
    slid = next((n for n in opened.kept if opened.attention.slides[n]), None)
    if slid is not None:
        fact = f"attends within a window, which {TO} does not have"
        raise PlanError(f"{source.ref}, layer {slid}", fact, "convert it: --sliding convert")
    return opened


def steps(opened: Linearized) -> Iterator[Step]:
    """Yield the steps: copies, doubled and shifted weights, and rows in the order of the class."""
    embedding = opened.attention.parts.embedding
    for tensor in opened.outside():
        if tensor.name == "model.norm.weight":
            yield _shifted(tensor, tensor.name)
        elif tensor.name in {"lm_head.weight", embedding}:
            renamed = "model.embed_tokens.weight" if tensor.name == embedding else tensor.name
            yield copy_as(tensor, renamed)
        else:
            raise unknown(opened, tensor.name, TO)
    for layer in range(opened.attention.parts.layers):
        yield from _around(opened, layer)
        yield from (_linear if layer in opened.linear else _kept)(opened, layer)


def _around(opened: Linearized, layer: int) -> Iterator[Step]:
    for rest in opened.inside(layer):
        tensor, name = opened.tensor(layer, rest), f"model.layers.{layer}.{rest}"
        if rest in COPIED:
            yield copy_as(tensor, name)
        elif rest in NORMS:
            yield _shifted(tensor, name)
        elif rest not in OWN:
            raise unknown(opened, tensor.name, TO)


def _kept(opened: Linearized, layer: int) -> Iterator[Step]:
    """Softmax attention with an output gate: sigmoid(0) is 1/2, which o_proj makes good."""
    place, sizes = f"model.layers.{layer}.self_attn", opened.attention.sizes
    q = opened.tensor(layer, "self_attn.q_proj.weight")
    yield Step(
        inputs=(q,),
        outputs=((f"{place}.q_proj.weight", _spec(q, 2 * q.shape[0], q.shape[1])),),
        fn=partial(_with_gate, width=sizes.head_dim),
        streamed=True,
        scratch=2 * sizes.head_dim * sizes.hidden * 8,
        why="gate",
    )
    for part in "kv":
        yield copy_as(
            opened.tensor(layer, f"self_attn.{part}_proj.weight"), f"{place}.{part}_proj.weight"
        )
    o = opened.tensor(layer, "self_attn.o_proj.weight")
    yield change(o, f"{place}.o_proj.weight", _double, "double")
    for rest in HEAD_NORMS:
        yield _shifted(opened.tensor(layer, rest), f"model.layers.{layer}.{rest}")


def _linear(opened: Linearized, layer: int) -> Iterator[Step]:
    """The gated delta rule; keys and values that query heads share are repeated for each."""
    place, sizes = f"model.layers.{layer}.linear_attn", opened.attention.sizes
    mixer = {r: opened.tensor(layer, f"{MIXER}{r}") for r in (*PARTS, "A_log", "dt_bias")}
    projections = [opened.tensor(layer, f"self_attn.{n}_proj.weight") for n in "qkv"]
    width, groups = sizes.head_dim, sizes.heads // sizes.kv_heads
    wide = sizes.heads * width
    q = projections[0]
    yield Step(
        inputs=(*projections, mixer["gate.weight"]),
        outputs=((f"{place}.in_proj_qkvz.weight", _spec(q, 4 * wide, sizes.hidden)),),
        fn=partial(_by_head, width=width, groups=groups),
        streamed=True,
        scratch=2 * width * sizes.hidden * 8,
        why="rows by head",
    )
    rates, taps = (mixer["beta.weight"], mixer["decay.weight"]), [mixer[f"conv_{n}"] for n in "qkv"]
    ba = _spec(rates[0], 2 * sizes.heads, sizes.hidden)
    yield _whole(rates, f"{place}.in_proj_ba.weight", ba, partial(_side_by_side, groups=groups))
    conv = _spec(taps[0], 3 * wide, 1, TAPS)
    channels = partial(_channels, width=width, groups=groups)
    yield _whole(tuple(taps), f"{place}.conv1d.weight", conv, channels)
    for name in ("A_log", "dt_bias"):
        each = partial(_repeated, groups=groups)
        spec = _spec(mixer[name], sizes.heads)
        yield _whole((mixer[name],), f"{place}.{name}", spec, each)
    yield copy_as(mixer["norm"], f"{place}.norm.weight")
    yield copy_as(opened.tensor(layer, "self_attn.o_proj.weight"), f"{place}.out_proj.weight")


def _spec(like: TensorInfo, *shape: int) -> TensorSpec:
    return TensorSpec(like.dtype, shape)


def _whole(inputs: tuple[TensorInfo, ...], name: str, spec: TensorSpec, fn: Function) -> Step:
    return Step(inputs=inputs, outputs=((name, spec),), fn=fn, why="rows by head")


def _shifted(tensor: TensorInfo, name: str) -> Step:
    return change(tensor, name, _less_one, "less 1", dtype="F32")


def _less_one(weight: Any) -> Any:  # noqa: ANN401 - an array or a tensor
    return weight - 1


def _double(weight: Any) -> Any:  # noqa: ANN401
    return weight * 2


def _with_gate(q: "Stored", *, width: int) -> "Iterator[Tensor]":
    """Of each head the rows, then as many zeros."""
    import torch

    for start in range(0, q.shape[0], width):
        rows = q[start : start + width]
        yield rows
        yield torch.zeros_like(rows)


def _by_head(
    q: "Stored", k: "Stored", v: "Stored", z: "Stored", *, width: int, groups: int
) -> "Iterator[Tensor]":
    """Of each query head its rows of q, k, v and z."""
    for head in range(q.shape[0] // width):
        own, shared = head * width, head // groups * width
        yield q[own : own + width]
        yield k[shared : shared + width]
        yield v[shared : shared + width]
        yield z[own : own + width]


def _side_by_side(b: "Tensor", a: "Tensor", *, groups: int) -> "Tensor":
    """Of each query head a row of beta, then one of the decay."""
    import torch

    return torch.stack((_repeated(b, groups=groups), _repeated(a, groups=groups)), 1).flatten(0, 1)


def _channels(q: "Tensor", k: "Tensor", v: "Tensor", *, width: int, groups: int) -> "Tensor":
    """Taps of all channels of queries, keys and values, [channels, 1, taps]."""
    import torch

    wide = (_repeated(x.view(-1, width, TAPS), groups=groups).flatten(0, 1) for x in (k, v))
    return torch.cat((q, *wide))[:, None]


def _repeated(x: "Tensor", *, groups: int) -> "Tensor":
    return x.repeat_interleave(groups, 0)


def config(opened: Linearized) -> dict[str, Any]:
    """Return config.json of a model without experts."""
    sizes, layers = opened.attention.sizes, opened.attention.parts.layers
    kinds = ("full_attention", "linear_attention")
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **sizes_of(opened),
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": opened.stock["rms_norm_eps"],
        "attention_bias": False,
        "attention_dropout": opened.stock.get("attention_dropout", 0.0),
        "rope_parameters": _rope(opened),
        "layer_types": [kinds[n in opened.linear] for n in range(layers)],
        "linear_conv_kernel_dim": TAPS,
        "linear_num_key_heads": sizes.heads,
        "linear_num_value_heads": sizes.heads,
        "linear_key_head_dim": sizes.head_dim,
        "linear_value_head_dim": sizes.head_dim,
        "mlp_only_layers": list(range(layers)),
        "num_experts": 0,
    }


def _rope(opened: Linearized) -> dict[str, Any]:
    """Return the rotary embedding in the form of today, of whole heads."""
    stock = opened.stock
    told = dict(stock.get("rope_parameters") or stock.get("rope_scaling") or {})
    if "type" in told:
        told.setdefault("rope_type", told.pop("type"))
    if "rope_theta" in stock:
        told.setdefault("rope_theta", stock["rope_theta"])
    if "rope_theta" not in told:
        fact = "does not tell the rope_theta of its rotary embedding"
        raise PlanError(opened.source.ref, fact, "write it into config.json")
    return {"rope_type": "default", **told, "partial_rotary_factor": 1.0}


def notes(_: Linearized) -> tuple[str, ...]:
    """Return what the user should know."""
    return (NOTE,)
