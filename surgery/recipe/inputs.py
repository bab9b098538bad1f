"""The models of a recipe, opened, and what each is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError, PlanError, SurgeryError

Open = Callable[[str], Checkpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An opened model.

    Attributes:
        parts: None where it has no one stack of layers, with the reason in `shapeless`.
        tensors: those that are merged, a tied head aside.
        tied: the name under which others hold a head of their own; None where this one does too,
            or has none.
    """

    ref: str
    checkpoint: Checkpoint
    parts: Anatomy | None
    tensors: Mapping[str, TensorInfo]
    shapeless: SurgeryError | None = None

    @property
    def anatomy(self) -> Anatomy:
        """The parts of a model whose layers are asked for.

        Raises:
            CheckpointError: it has no one stack of layers.
        """
        if self.parts is None:
            assert self.shapeless is not None  # noqa: S101 - one of the two is there
            raise self.shapeless
        return self.parts

    def find(self, name: str) -> TensorInfo | None:
        """Return a tensor; the embedding for the head of a model that ties it."""
        found = self.tensors.get(name)
        if found is None and self.parts and self.parts.tied and self.parts.embedding:
            from surgery.anatomy import HEAD

            return self.tensors.get(self.parts.embedding) if HEAD.search(name) else None
        return found


def open_models(refs: Sequence[str], open_one: Open) -> dict[str, Model]:
    """Open every model once, in order.

    Raises:
        CheckpointError: one is missing, broken or quantised.
    """
    return {ref: _model(ref, open_one(ref)) for ref in refs}


def _model(ref: str, checkpoint: Checkpoint) -> Model:
    checkpoint = _dequantised(checkpoint)
    parts, shapeless = None, None
    try:
        parts = anatomy(checkpoint)
    except CheckpointError as error:
        shapeless = error
    if parts and parts.lost_head:
        fact = "does not tie the output head to the embedding, but there is no head"
        remedy = "set tie_word_embeddings to true if it is tied, or restore the missing tensor"
        raise PlanError(checkpoint.root / "config.json", fact, remedy)
    return Model(
        ref=ref,
        checkpoint=checkpoint,
        parts=parts,
        tensors=dict(checkpoint.tensors),
        shapeless=shapeless,
    )


def _dequantised(checkpoint: Checkpoint) -> Checkpoint:
    told = (checkpoint.config or {}).get("quantization_config")
    if told is None:
        return checkpoint
    method = told.get("quant_method", "unknown") if isinstance(told, dict) else "unknown"
    fact = f"is quantised ({method}), which is not merged"
    raise CheckpointError(checkpoint.ref, fact, "name the original, unquantised checkpoint")
