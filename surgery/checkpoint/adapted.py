"""A base that adapters are being added to: names found, shapes checked, views put in place."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from surgery.checkpoint.adapters import FLOATS, Adapter
from surgery.checkpoint.header import TensorInfo, quoted
from surgery.checkpoint.lowrank import Change, Kept, added, held_bytes
from surgery.checkpoint.view import MakeRows, make_view
from surgery.errors import CheckpointError

# Modules around the layers, which files leave out or spell differently from models in memory.
WRAPPERS = ("model", "language_model", "transformer", "base_model")
SPELLINGS = {"block_sparse_moe": "mlp"}  # Mixtral: on disk, in memory
OTHER_BASE = "name the base that the adapter was trained on"


@dataclass(slots=True)
class Adapted:
    """What becomes of a base, adapter by adapter.

    Attributes:
        tensors: by name, views where an adapter changes them.
        config: the base's, changed where an adapter changes the vocabulary or unties the head.
        notes: what a user should know.
        resized: by name, the rows that an embedding or head had before.
        kept: the factors that views share.
    """

    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None
    notes: list[str] = field(default_factory=list)
    resized: dict[str, int] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    _names: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.tensors:
            self._names.setdefault(canonical(name), []).append(name)

    @property
    def text(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        config = self.config or {}
        sections = (
            v
            for k, v in config.items()
            if isinstance(v, dict) and k.startswith(("text", "lang", "llm"))
        )
        return next(sections, config)

    def find(self, name: str) -> str | None:
        """Return the stored name of a parameter that is told by its name in memory."""
        if name in self.tensors:
            return name
        found = self._names.get(canonical(name), ())
        return found[0] if len(found) == 1 else None

    def checked(self, adapter: Adapter, name: str) -> TensorInfo:
        """Return the tensor of a parameter that an adapter changes.

        Raises:
            CheckpointError: there is none, or it is not stored as plain numbers.
        """
        found = self.find(name)
        if found is None:
            fact = f"changes {quoted(name)}, which the base does not hold"
            raise CheckpointError(adapter.file, fact, OTHER_BASE)
        tensor = self.tensors[found]
        if tensor.dtype not in FLOATS:
            fact = f"is stored as {tensor.dtype}, to which an adapter cannot be added"
            raise CheckpointError(found, fact, "use the base in bfloat16, float16 or float32")
        return tensor

    def put(
        self,
        tensor: TensorInfo,
        make: MakeRows,
        more: Iterable[TensorInfo],
        *,
        why: str,
        key: str,
        held: int = 0,
    ) -> None:
        """Put a view in the place of a tensor, made from it and more."""
        self.tensors[tensor.name] = make_view(
            tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            stored=(tensor, *more),
            make=make,
            why=why,
            key=key,
            held=held,
        )

    def change(self, tensor: TensorInfo, change: Change) -> None:
        """Add a low-rank change to a tensor."""
        factors = change.factors
        stored = tuple(t for t in (factors.a, factors.b, factors.magnitude) if t is not None)
        make = added(tensor, change, self.kept)
        held = held_bytes(change, tensor.dtype)
        self.put(tensor, make, stored, why="adapt", key=change.told(), held=held)


def canonical(name: str) -> tuple[str, ...]:
    """Return what files and memory agree on of a name."""
    return tuple(SPELLINGS.get(word, word) for word in name.split(".") if word not in WRAPPERS)


def misfit(adapter: Adapter, name: str, has: object, wants: object) -> CheckpointError:
    """Return the error for a change of another shape than its tensor."""
    fact = f"is for {quoted(name)} of shape {has}, the base has {wants}"
    return CheckpointError(adapter.file, fact, OTHER_BASE)
