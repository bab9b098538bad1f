"""Tied heads: an adapter that changes one side of a tied pair makes two tensors of it."""

import re
from collections.abc import Iterable

from surgery.checkpoint.adapted import Adapted, canonical
from surgery.checkpoint.adapters import MATRIX, Adapter
from surgery.checkpoint.header import TensorInfo
from surgery.checkpoint.lowrank import replaced
from surgery.checkpoint.view import make_view

HEAD = "lm_head"
HEADED = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration")


def tied_embedding(to: Adapted) -> TensorInfo | None:
    """Return the embedding that is the output head too; None where the head is its own."""
    config, text = to.config or {}, to.text
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    headed = any(str(name).endswith(HEADED) for name in config.get("architectures") or ())
    if tied is False or not (headed or tied) or to.find(f"{HEAD}.weight"):
        return None
    rows = text.get("vocab_size")
    fitting = (t for t in to.tensors.values() if t.shape[:1] == (rows,) and len(t.shape) == MATRIX)
    return next(fitting, None)


def is_head(module: str) -> bool:
    """Whether a module is the output head."""
    return canonical(module) == (HEAD,)


def trained_apart(adapter: Adapter, module: str) -> bool:
    """Whether the adapter trained a tied module as one of its own."""
    saved: Iterable[object] = adapter.config.get("modules_to_save") or ()
    listed = any(re.fullmatch(rf"(.*\.)?{re.escape(str(name))}", module) for name in saved)
    return listed and not adapter.config.get("ensure_weight_tying")


def changes_embedding(to: Adapted, adapter: Adapter, embedding: TensorInfo) -> bool:
    """Whether an adapter changes the embedding and means the head to stay as it was."""
    if adapter.config.get("ensure_weight_tying"):
        return False
    if any(to.find(f"{item.module}.weight") == embedding.name for item in adapter.factors):
        return True
    module = embedding.name.removesuffix(".weight")
    whole = any(to.find(name) == embedding.name for name in adapter.whole)
    return whole and trained_apart(adapter, module)


def put_head(to: Adapted, embedding: TensorInfo) -> None:
    """Give the model a head of its own, which is the embedding as it was, and tell the config."""
    name = f"{HEAD}.weight"
    if name in to.tensors:
        return
    to.tensors[name] = make_view(
        name,
        dtype=embedding.dtype,
        shape=embedding.shape,
        stored=(embedding,),
        make=replaced(embedding),
        why="untie",
    )
    for section in (to.config or {}, to.text):
        if section is to.config or "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = False
    to.notes.append("the embedding and the output head part ways: the adapter changes only one")
