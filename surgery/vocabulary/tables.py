"""The tensors that have a row (or column) for every token: embeddings, heads and their biases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.anatomy import EMBEDDING, OTHER_TOWERS, TEXT_SECTIONS
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError

# Names of tables; each must have as many rows as the embedding.
HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|head|decoder|predictions(\.decoder)?)"
    r"\.(weight|bias)$"
)
COLUMNS = re.compile(r"(^|\.)final_logits_bias$")  # [1, tokens], of BART and its kin
NOT_TOKENS = re.compile(r"position|token_type|(^|\.)wpe(\.|$)|norm|embed_dim", re.IGNORECASE)
PER_LAYER = re.compile(r"(^|\.)embed_tokens_per_layer\.weight$")
MATRIX = 2  # axes


@dataclass(frozen=True, slots=True)
class Table:
    """A tensor with an axis of tokens.

    Attributes:
        axis: which one, 0 or 1.
        head: it belongs to the output head, and is the embedding where that is tied.
    """

    tensor: TensorInfo
    axis: int = 0
    head: bool = False


def section(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys that lead to the part of a config that describes the language model."""
    return next(((key,) for key in TEXT_SECTIONS if isinstance(config.get(key), dict)), ())


def embedding(checkpoint: Checkpoint) -> TensorInfo:
    """Return the token embedding.

    Raises:
        CheckpointError: there is none.
    """
    config = checkpoint.config or {}
    keys = section(config)
    told = (config[keys[0]] if keys else config).get("vocab_size")
    named = [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == MATRIX and _is_embedding(name)
    ]
    fitting = [tensor for tensor in named if tensor.shape[0] == told] or named
    if not fitting:
        fact = "has no token embedding that its name would tell"
        raise CheckpointError(checkpoint.ref, fact, "its vocabulary cannot be changed")
    return max(fitting, key=lambda tensor: tensor.shape[0])


def table_rows(checkpoint: Checkpoint) -> int:
    """Return the rows of the token embedding."""
    return embedding(checkpoint).shape[0]


def _is_embedding(name: str) -> bool:
    others = (OTHER_TOWERS, NOT_TOKENS, PER_LAYER, HEAD)
    return EMBEDDING.search(name) is not None and not any(p.search(name) for p in others)


def find_tables(checkpoint: Checkpoint) -> dict[str, Table]:
    """Return every tensor with a row for each token, by name: the embedding is the first.

    Raises:
        CheckpointError: there is no embedding.
    """
    first = embedding(checkpoint)
    found = {first.name: Table(first)}
    for name, tensor in checkpoint.tensors.items():
        table = _table(name, tensor, first.shape[0])
        if table is not None:
            found.setdefault(name, table)
    return found


def _table(name: str, tensor: TensorInfo, rows: int) -> Table | None:
    if COLUMNS.search(name) and tensor.shape == (1, rows):
        return Table(tensor, axis=1, head=True)
    if not tensor.shape or tensor.shape[0] != rows or OTHER_TOWERS.search(name):
        return None
    if HEAD.search(name):
        return Table(tensor, head=True)
    is_matrix = len(tensor.shape) == MATRIX and name.endswith(".weight")
    return Table(tensor) if is_matrix and _is_embedding(name) else None


def unknown_tables(checkpoint: Checkpoint) -> list[str]:
    """Return tensors with as many rows or columns as there are tokens that are no known table.

    Those inside numbered layers are left out: there such a size is a coincidence.
    """
    known, rows = find_tables(checkpoint), table_rows(checkpoint)
    return [
        name
        for name, tensor in checkpoint.tensors.items()
        if name not in known and rows in tensor.shape and not re.search(r"\.\d+\.", name)
    ]


def refuse_tables_per_layer(checkpoint: Checkpoint) -> None:
    """Refuse to change the ids of a model that has further tables inside its layers.

    Raises:
        CheckpointError: it has (Gemma 3n).
    """
    found = next((name for name in checkpoint.tensors if PER_LAYER.search(name)), None)
    if found is not None:
        fact = f"{found} has a row per token for every layer, and fewer than the embedding"
        raise CheckpointError(checkpoint.ref, fact, "take this model's own tokenizer")
