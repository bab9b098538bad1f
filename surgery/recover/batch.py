"""Rows as tensors on a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surgery.recover.data import IGNORED

if TYPE_CHECKING:
    import torch

    from surgery.recover.data import Rows


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that are fed at once; n = b * t.

    Attributes:
        indices: their numbers, for a teacher's cache.
        ids, positions: [b, t]; positions begin anew with every document, so that transformers
            lets none look into another.
        targets: [n], the next token, or -100 where nothing is predicted.
        tokens: how many are predicted.
        fills: [b], tokens of each row before its padding.
    """

    indices: tuple[int, ...]
    ids: "torch.Tensor"
    positions: "torch.Tensor"
    targets: "torch.Tensor"
    tokens: int
    fills: "torch.Tensor"

    @classmethod
    def of(
        cls, rows: "Rows", indices: Sequence[int], device: "torch.device", *, empty: bool = False
    ) -> "Batch":
        """Return rows by number; `empty` ones predict nothing, and only keep others company."""
        import torch

        found = [rows.row(index) for index in indices]
        targets = np.concatenate([row.targets for row in found])
        if empty:
            targets = np.full_like(targets, IGNORED)
        return cls(
            tuple(indices),
            torch.from_numpy(np.stack([row.ids for row in found])).to(device),
            torch.from_numpy(np.stack([row.positions for row in found])).to(device),
            torch.from_numpy(targets).to(device),
            int((targets != IGNORED).sum()),
            torch.tensor([row.fill for row in found], device=device),
        )

    def inputs(self, model: "torch.nn.Module") -> "dict[str, torch.Tensor]":
        """Return what a model takes of it."""
        from surgery.recover.heads import accepts_positions

        positions = {"position_ids": self.positions} if accepts_positions(model) else {}
        return {"input_ids": self.ids, **positions}
