"""What a factored map is made of: its kind, its rank, and the tensors that it is stored as."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from growth.linears import Linear
from surgery.errors import CheckpointError
from surgery.plan import TensorSpec

Kind = Literal["low-rank", "sparse-low-rank", "monarch"]
Method = Literal["svd", "svd-llm", "monarch", "sparse-low-rank"]
KINDS: Mapping[Method, Kind] = {
    "svd": "low-rank",
    "svd-llm": "low-rank",
    "monarch": "monarch",
    "sparse-low-rank": "sparse-low-rank",
}
FACTORS = ("factor_A", "factor_B")
SPARSE = ("sparse_places", "sparse_values")
INT32 = 1 << 31  # more places need wider numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A factored map with m inputs and n outputs.

    Attributes:
        entries: of a sparse-low-rank map, how many weights stand beside the product.
        blocks: of a monarch map, of inputs and of outputs.
    """

    kind: Kind
    outputs: int
    inputs: int
    rank: int
    entries: int = 0
    blocks: tuple[int, int] = (1, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.outputs, self.inputs

    @property
    def most(self) -> int:
        """The rank at which every map of this shape is met exactly."""
        first, second = self.blocks
        return min(self.outputs // second, self.inputs // first)

    @property
    def numbers(self) -> int:
        """How many weights it has; the places of sparse ones are none."""
        return self.rank * self.per_rank + self.entries

    @property
    def per_rank(self) -> int:
        """How many weights a rank takes: m + n, or K n + J m for K by J blocks."""
        first, second = self.blocks
        return first * self.outputs + second * self.inputs

    def told(self) -> dict[str, Any]:
        """Return the entry of the config."""
        found: dict[str, Any] = {"kind": self.kind, "rank": self.rank}
        if self.kind == "sparse-low-rank":
            found["entries"] = self.entries
        if self.kind == "monarch":
            found["blocks"] = list(self.blocks)
        return found

    def specs(self, dtype: str) -> dict[str, TensorSpec]:
        """Return the tensors by their name in the module."""
        n, m, rank = self.outputs, self.inputs, self.rank
        first, second = self.blocks
        shapes: tuple[tuple[int, ...], ...] = (rank, m), (n, rank)
        if self.kind == "monarch":
            shapes = (first, second * rank, m // first), (second, n // second, first * rank)
        found = {name: TensorSpec(dtype, s) for name, s in zip(FACTORS, shapes, strict=True)}
        if self.kind == "sparse-low-rank":
            whole = "I32" if n * m < INT32 else "I64"
            found["sparse_places"] = TensorSpec(whole, (self.entries,))
            found["sparse_values"] = TensorSpec(dtype, (self.entries,))
        return found


def read_form(name: str, told: object, shapes: Mapping[str, tuple[int, ...]]) -> Form:
    """Return the form that a config tells of a module, after a look at its tensors' shapes.

    Raises:
        CheckpointError: the two do not fit, or a tensor is missing.
    """
    told = told if isinstance(told, dict) else {}
    rank, kind, blocks = told.get("rank"), told.get("kind"), told.get("blocks", [1, 1])
    names = FACTORS + (SPARSE if kind == "sparse-low-rank" else ())
    gone = next((part for part in names if part not in shapes), None)
    if gone is not None:
        raise CheckpointError(f"{name}.{gone}", "is missing", "copy the checkpoint again")
    whole = isinstance(blocks, list) and len(blocks) == 2 and all(_above(b) for b in blocks)  # noqa: PLR2004
    a, b = (shapes[part] for part in FACTORS)
    kinds = [known for known in KINDS.values() if known == kind]
    if kinds and type(rank) is int and rank > 0 and whole and len(a) == len(b) > 1:
        n, m = (b[0] * b[1], a[0] * a[2]) if len(a) > 2 else (b[0], a[1])  # noqa: PLR2004
        entries = shapes.get("sparse_values", (0,))[0]
        pair = blocks[0], blocks[1]
        form = Form(kind=kinds[0], outputs=n, inputs=m, rank=rank, entries=entries, blocks=pair)
        if {part: spec.shape for part, spec in form.specs("F32").items()} == dict(shapes):
            return form
    fact = f"has tensors that are not the {kind} map of rank {rank} which the config tells of"
    raise CheckpointError(name, fact, "restore the config, or copy the checkpoint again")


def _above(number: object) -> bool:
    return type(number) is int and number > 0


def form_of(linear: Linear, kind: Kind, rank: int, density: float) -> Form:
    """Return the form of a map; its rank may still be too large.

    A monarch map has as many blocks of inputs as the greatest divisor of their number that is not
    above its root, and so for the outputs.
    """
    n, m = linear.outputs, linear.inputs
    sparse, monarch = kind == "sparse-low-rank", kind == "monarch"
    return Form(
        kind=kind,
        outputs=n,
        inputs=m,
        rank=rank,
        entries=max(round(density * n * m), 1) if sparse else 0,
        blocks=(middle(m), middle(n)) if monarch else (1, 1),
    )


def middle(size: int) -> int:
    """Return the greatest divisor of a number that is not above its root."""
    return next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
