"""Add an adapter to a base: a view in the place of every weight that it changes."""

from collections.abc import Iterable

from surgery.checkpoint.adapted import Adapted, canonical, misfit
from surgery.checkpoint.adapters import FLOATS, MATRIX, Adapter, Factors
from surgery.checkpoint.fused import adapt_parameters
from surgery.checkpoint.header import TensorInfo, quoted
from surgery.checkpoint.lowrank import Change, raised, replaced, with_rows
from surgery.checkpoint.tying import (
    HEAD,
    changes_embedding,
    is_head,
    put_head,
    tied_embedding,
    trained_apart,
)
from surgery.checkpoint.view import make_view
from surgery.errors import CheckpointError

# Families whose linear layers are stored [in, out], and what those are called.
CONV1D = ("gpt2", "imagegpt", "decision_transformer", "openai-gpt", "ctrl")
CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")


def add_adapter(to: Adapted, adapter: Adapter) -> None:
    """Put views in the place of all that an adapter changes.

    Where head and embedding are tied and the adapter changes one of them only, they part ways:
    so does the model that peft runs. (peft's own merge adds the change to both.)

    Raises:
        CheckpointError: a module that the base lacks, or that has another shape there.
    """
    tied = tied_embedding(to)
    if tied is not None and changes_embedding(to, adapter, tied):
        put_head(to, tied)
    for name, tensor in adapter.whole.items():
        _replace(to, adapter, name, tensor, tied)
    for module, (tokens, rows) in adapter.tokens.items():
        _set_tokens(to, adapter, module, tokens, rows)
    for module, factors in _by_module(adapter.factors).items():
        if tied is not None and is_head(module):
            if adapter.config.get("ensure_weight_tying"):
                continue  # the embedding's own change, under its other name
            put_head(to, tied)
        if any(item.level for item in factors) or to.find(f"{module}.weight") is None:
            adapt_parameters(to, adapter, module, factors)
        else:
            _adapt(to, adapter, factors[0])
    _check_vocabulary(to, adapter)


def _by_module(factors: Iterable[Factors]) -> dict[str, list[Factors]]:
    found: dict[str, list[Factors]] = {}
    for item in factors:
        found.setdefault(item.module, []).append(item)
    return found


def _adapt(to: Adapted, adapter: Adapter, factors: Factors) -> None:
    weight = to.checked(adapter, f"{factors.module}.weight")
    swapped = _is_swapped(to, adapter, factors, weight)
    _check_magnitude(adapter, factors, weight, swapped=swapped)
    to.change(weight, Change(factors=factors, swapped=swapped))
    if factors.bias is None:
        return
    bias = to.checked(adapter, f"{factors.module}.bias")
    if factors.bias.shape != bias.shape:
        raise misfit(adapter, bias.name, list(factors.bias.shape), list(bias.shape))
    key = repr((factors.bias.name, factors.scale))
    to.put(bias, raised(bias, factors), (factors.bias,), why="adapt", key=key)


def _is_swapped(to: Adapted, adapter: Adapter, factors: Factors, weight: TensorInfo) -> bool:
    """Whether a weight is stored [in, out]; its shape tells, but for a square."""
    plain = (factors.b.shape[0], factors.a.shape[1])
    if factors.a.shape[0] != factors.rank or weight.shape not in (plain, plain[::-1]):
        raise misfit(adapter, weight.name, list(plain), list(weight.shape))
    if factors.embedding or plain[0] != plain[1]:
        return factors.embedding or weight.shape != plain
    if to.config is None:
        return bool(adapter.config.get("fan_in_fan_out"))
    leaf = factors.module.rpartition(".")[2]
    return to.config.get("model_type") in CONV1D and leaf in CONV1D_NAMES


def _check_magnitude(
    adapter: Adapter, factors: Factors, weight: TensorInfo, *, swapped: bool
) -> None:
    if factors.magnitude is None:
        if adapter.config.get("use_dora"):
            fact = f"is a DoRA without a magnitude for {quoted(factors.module)}"
            raise CheckpointError(adapter.file, fact, "copy the adapter again")
        return
    if swapped:
        fact = f"is a DoRA of {quoted(factors.module)}, which is stored [in, out]"
        raise CheckpointError(adapter.file, fact, "merge it by peft")
    if factors.magnitude.numel != weight.shape[0]:
        shape = f"{list(factors.magnitude.shape)} (magnitude)"
        raise misfit(adapter, weight.name, shape, list(weight.shape))


def _replace(
    to: Adapted, adapter: Adapter, name: str, tensor: TensorInfo, tied: TensorInfo | None
) -> None:
    if tied is not None and canonical(name) == (HEAD, "weight"):
        if not trained_apart(adapter, HEAD):
            return  # one parameter, which the adapter holds under both of its names
        put_head(to, tied)
    old = to.checked(adapter, name)
    if tensor.dtype not in FLOATS:
        fact = f"holds {quoted(name)} as {tensor.dtype}, the base as {old.dtype}"
        raise CheckpointError(adapter.file, fact, "save the adapter in bfloat16 or float32")
    if old.shape != tensor.shape:
        _resize(to, adapter, old, tensor)
    to.tensors[old.name] = make_view(
        old.name,
        dtype=old.dtype,
        shape=tensor.shape,
        stored=(tensor,),
        make=replaced(tensor),
        why="replace",
        key=str(adapter.file),
    )


def _resize(to: Adapted, adapter: Adapter, old: TensorInfo, new: TensorInfo) -> None:
    """Take an embedding with more or fewer tokens, and tell the config."""
    rows = to.text.get("vocab_size")
    sound = len(old.shape) == len(new.shape) == MATRIX and old.shape[1:] == new.shape[1:]
    if not sound or rows not in (old.shape[0], new.shape[0]):
        raise misfit(adapter, old.name, list(new.shape), list(old.shape))
    to.resized[old.name] = old.shape[0]
    if rows != new.shape[0]:
        to.text["vocab_size"] = new.shape[0]
        told = f"{adapter.name} resizes the vocabulary from {rows} to {new.shape[0]} rows"
        to.notes.append(f"{told}; the tokenizer is the base's")


def _check_vocabulary(to: Adapted, adapter: Adapter) -> None:
    """Refuse an adapter that resizes the embedding or the head and not the other."""
    resized = next((t for t in to.tensors.values() if t.name in to.resized), None)
    if resized is None:
        return
    left = (to.resized[resized.name], *resized.shape[1:])
    for name, tensor in to.tensors.items():
        if tensor.shape == left and not any(word.isdigit() for word in name.split(".")):
            raise misfit(adapter, name, list(resized.shape), list(left))


def _set_tokens(
    to: Adapted, adapter: Adapter, module: str, tokens: tuple[int, ...], rows: TensorInfo
) -> None:
    weight = to.checked(adapter, f"{module}.weight")
    if rows.shape[1:] != weight.shape[1:] or max(tokens, default=0) >= weight.shape[0]:
        shape = f"{list(rows.shape)} (tokens)"
        raise misfit(adapter, weight.name, shape, list(weight.shape))
    make = with_rows(weight, tokens, rows)
    to.put(weight, make, (rows,), why="new tokens", key=repr((rows.name, tokens)))
