"""Find the units of each layer that may change places: hidden units and attention heads.

A layer is taken only where every tensor of its module is known: what is not known may depend on
the order of the units.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.alignment.slots import Group, Slot
from surgery.checkpoint import TensorInfo

# Linear maps into hidden units, with how many of the units' roles they hold, and out of them.
INTO = {
    "gate_proj": 1, "up_proj": 1, "w1": 1, "w3": 1, "c_fc": 1, "fc1": 1, "dense_h_to_4h": 1,
    "gate_up_proj": 2,
}  # fmt: skip
OUT = ("down_proj", "w2", "c_proj", "fc2", "dense_4h_to_h")
OUTPUTS = ("o_proj", "out_proj", "dense")
# Tensors of attention that do not depend on the order of heads.
APART = {"rotary_emb.inv_freq", "q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"}
INPUTS_FIRST = {"gpt2", "openai-gpt", "imagegpt"}  # linear maps stored as [inputs, outputs]
# Fused maps whose order of rows is known: others use the same names for another order.
GATE_ABOVE_UP = {"phi3", "glm", "glm4"}
QUERY_KEY_VALUE = {"phi3": "qkv_proj", "gpt_neox": "query_key_value"}

Parts = Mapping[str, tuple[TensorInfo, TensorInfo]]  # by name in the module: model's, reference's


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What a config says of attention.

    Attributes:
        family: `model_type`.
        shared: other layers read a layer's keys and values, or positions differ by head.
        latent: widths of a head's keys without and with rotation, and of its values (DeepSeek).
    """

    family: str
    hidden: int | None
    queries: int
    keys: int
    width: int
    shared: bool
    latent: tuple[int, int, int]


def heads_of(text: Mapping[str, Any], hidden: int | None) -> Heads:
    """Read the numbers of heads; `hidden` is the model's width where the config has none."""

    def number(*keys: str) -> int:
        found = (text.get(key) for key in keys)
        return next((value for value in found if type(value) is int and value > 0), 0)

    hidden = number("hidden_size", "n_embd", "d_model") or hidden
    queries = number("num_attention_heads", "n_head")
    return Heads(
        family=str(text.get("model_type")),
        hidden=hidden,
        queries=queries,
        keys=number("num_key_value_heads") or queries,
        width=number("head_dim") or ((hidden or 0) // queries if queries else 0),
        shared=bool(text.get("alibi")) or number("num_kv_shared_layers") > 0,
        latent=(number("qk_nope_head_dim"), number("qk_rope_head_dim"), number("v_head_dim")),
    )


def find_groups(layer: str, parts: Parts, heads: Heads) -> tuple[list[Group], list[str]]:
    """Return a layer's groups, and what is left alone, with the reason.

    Args:
        layer: its number, to tell the user.
        parts: by the name inside the layer; experts of a mixture left out.
    """
    groups, alone = [], []
    for module, own in _modules(parts).items():
        kind = _kind(own)
        if kind is None:
            continue
        found = kind(own, heads)
        if isinstance(found, str):
            alone.append(f"{module} {found}")
        else:
            groups.append(Group(name=f"{layer}.{module}", **found))
    return groups, alone


def _modules(parts: Parts) -> dict[str, Parts]:
    """Group the tensors of a layer by the module whose linear maps they are."""
    known = {*INTO, *OUT, *OUTPUTS}
    split = [name.rsplit(".", 2) for name in parts if name.count(".") > 1]
    homes = {home: len(home) for home, role, _ in split if role in known}
    found: dict[str, dict[str, tuple[TensorInfo, TensorInfo]]] = {}
    for name, pair in parts.items():
        inside = [home for home in homes if name.startswith(f"{home}.")]
        if inside:
            home = max(inside, key=len)
            found.setdefault(home, {})[name[len(home) + 1 :]] = pair
    return {**found}


Found = dict[str, Any] | str


def _kind(own: Parts) -> "Callable[[Parts, Heads], Found] | None":
    names = {name.removesuffix(".weight") for name in own}
    if names & set(OUT) and names & set(INTO):
        return _feed_forward
    return _attention if names & set(OUTPUTS) else None


def _feed_forward(own: Parts, heads: Heads) -> Found:
    out = next(name for name in OUT if f"{name}.weight" in own)
    shape = own[f"{out}.weight"][0].shape
    strange = next((n for n in own if not _follows(n, out, heads.family)), None)
    if strange is not None:
        return f"has {strange}, which is not known to follow its units"
    if heads.family in INPUTS_FIRST or len(shape) != 2 or shape[0] != heads.hidden:  # noqa: PLR2004
        return "is not stored as [outputs, inputs]"
    units = shape[1]
    slots = [_slot(own[f"{out}.weight"], axis=1)]
    for name, pair in own.items():
        role, _, what = name.partition(".")
        if role == out:
            continue
        count, size = INTO[role], pair[0].shape
        if size != (count * units, *((heads.hidden,) if what == "weight" else ())):
            return f"has {name} of shape {list(size)}, which does not fit its {units} units"
        slots += [_slot(pair, offset=n * units) for n in range(count)]
    return {"outer": 1, "inner": units, "fine": tuple(slots)}


def _follows(name: str, out: str, family: str) -> bool:
    role, _, what = name.partition(".")
    if what not in {"weight", "bias"}:
        return False
    return role == out or INTO.get(role) == 1 or (role in INTO and family in GATE_ABOVE_UP)


def _slot(pair: tuple[TensorInfo, TensorInfo], **place: int) -> Slot:
    if "width" in place:
        place.setdefault("stride", place["width"])
    return Slot(tensor=pair[0], other=pair[1], **place)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Rows of a tensor that belong to heads: of queries (fine) or of keys and values."""

    coarse: bool
    offset: int
    width: int


def _attention(own: Parts, heads: Heads) -> Found:
    if heads.shared:
        return "shares keys and values between layers, or tells heads apart by position"
    if not heads.queries or not heads.width or heads.queries % heads.keys:
        return "has a number of heads that the config does not tell"
    out = next(name for name in OUTPUTS if f"{name}.weight" in own)
    known = _rows_of_heads(own, heads)
    value = heads.latent[2] if "kv_b_proj" in known else heads.width
    if not known or own[f"{out}.weight"][0].shape != (heads.hidden, heads.queries * value):
        return "is of a kind whose heads are not known"
    slots: dict[bool, list[Slot]] = {True: [], False: []}  # by whether they are coarse
    slots[False].append(_slot(own[f"{out}.weight"], axis=1, width=value))
    for name, pair in own.items():
        runs = [] if name.startswith(f"{out}.") else _runs(name, pair[0].shape, known, heads)
        if runs is None:
            return f"has {name}, which is not known to follow its heads"
        for run in runs:
            slots[run.coarse].append(_slot(pair, offset=run.offset, width=run.width))
    outer = heads.keys if slots[True] else heads.queries
    inner = heads.queries // outer
    return {
        "outer": outer,
        "inner": inner,
        "fine": tuple(slots[False]),
        "coarse": tuple(slots[True]),
    }


def _runs(
    name: str, shape: tuple[int, ...], known: Mapping[str, list[_Run]], heads: Heads
) -> list[_Run] | None:
    """Return which rows of a tensor belong to heads; None where that is not known."""
    role = name.removesuffix(".weight").removesuffix(".bias")
    if role in APART:
        return []
    if role not in known:
        return _per_head(name, shape, heads)
    return known[role] if _fits(shape, known[role], heads) else None


def _fits(shape: tuple[int, ...], runs: Iterable[_Run], heads: Heads) -> bool:
    counts = ((heads.keys if run.coarse else heads.queries) * run.width for run in runs)
    return shape[0] == sum(counts)


def _rows_of_heads(own: Parts, heads: Heads) -> dict[str, list[_Run]]:
    """Return which rows of each linear map belong to heads; nothing where its kind is unknown."""
    names = {name.removesuffix(".weight") for name in own}
    width, query = heads.width, heads.queries * heads.width
    if {"q_proj", "k_proj", "v_proj"} <= names:
        single = _Run(coarse=False, offset=0, width=width)
        shared = _Run(coarse=True, offset=0, width=width)
        return {"q_proj": [single], "k_proj": [shared], "v_proj": [shared]}
    fused = QUERY_KEY_VALUE.get(heads.family)
    if fused == "qkv_proj" and fused in names:
        starts = ((False, 0), (True, query), (True, query + heads.keys * width))
        return {fused: [_Run(coarse=c, offset=at, width=width) for c, at in starts]}
    if fused and fused in names:
        return {fused: [_Run(coarse=False, offset=0, width=3 * width)]}
    if "kv_b_proj" in names and names & {"q_proj", "q_b_proj"} and all(heads.latent):
        plain, rotary, value = heads.latent
        wide = _Run(coarse=False, offset=0, width=plain + rotary)
        keys = _Run(coarse=False, offset=0, width=plain + value)
        return {"q_proj": [wide], "q_b_proj": [wide], "kv_b_proj": [keys]}
    return {}


def _per_head(name: str, shape: tuple[int, ...], heads: Heads) -> list[_Run] | None:
    """Return the rows of what is stored per head beside the linear maps; [] where heads share it.

    A norm over one head has the head's width; one over all heads moves with them.
    """
    coarse = name.startswith("k_")
    count = heads.keys if coarse else heads.queries
    if name in {"q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight"}:
        if shape == (heads.width,):
            return []
        per = {(count * heads.width,): heads.width, (count, heads.width): 1}.get(shape)
        return None if per is None else [_Run(coarse=coarse, offset=0, width=per)]
    if name == "sinks" and shape == (heads.queries,):
        return [_Run(coarse=False, offset=0, width=1)]
    return None
