"""The models of a recipe, opened, and what each is made of."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from surgery.anatomy import HEAD, Anatomy, anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import CheckpointError, PlanError, SurgeryError
from surgery.quantised import dequantised
from surgery.towers import named_like

Open = Callable[[str], Checkpoint]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An opened model.

    Attributes:
        parts: None where it has no one stack of layers, with the reason in `shapeless`.
    """

    ref: str
    checkpoint: Checkpoint
    parts: Anatomy | None = None
    shapeless: SurgeryError | None = None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What is stored, or made of it when it is read."""
        return self.checkpoint.tensors

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

    @property
    def head(self) -> str | None:
        """The name of a head of its own."""
        return self.parts.head if self.parts else None

    @property
    def says_tied(self) -> bool:
        """Whether its config ties the head to the embedding, stored or not."""
        config = self.checkpoint.config or {}
        text = config
        for key in self.parts.section if self.parts else ():
            text = text[key]
        return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings")))

    def layer_of(self, name: str) -> int | None:
        """Return the layer that a tensor belongs to; None outside, and behind the last."""
        inside = self.parts.locate(name) if self.parts else None
        return inside[0] if self.parts and inside and inside[0] < self.parts.layers else None

    def find(self, name: str) -> TensorInfo | None:
        """Return the tensor of a name; where the head is tied, the embedding stands for it."""
        found = self.tensors.get(name)
        if found is None and self.parts and self.parts.tied and HEAD.search(name):
            return self.tensors.get(self.parts.embedding or "")
        return found


def open_models(refs: Sequence[str], open_one: Open) -> dict[str, Model]:
    """Open every model once, in order; text models are named as the first's text tower is.

    Raises:
        CheckpointError: one is missing, broken or stored in a way that is not read.
        PlanError: two names lead to the same files.
    """
    found = {ref: _model(ref, open_one(ref)) for ref in refs}
    _refuse_same(found)
    return {ref: _named(model, found[refs[0]]) for ref, model in found.items()}


def _named(model: Model, donor: Model) -> Model:
    if model.parts is None or donor.parts is None:
        return model
    checkpoint = named_like(model.checkpoint, like=donor.checkpoint)
    if checkpoint is model.checkpoint:
        return model
    return replace(model, checkpoint=checkpoint, parts=anatomy(checkpoint))


def _refuse_same(models: Mapping[str, Model]) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for ref, model in models.items():
        if "+" in ref:  # the same base with another adapter
            continue
        files = tuple(str(path.resolve()) for path in model.checkpoint.files)
        if files in seen:
            fact = f"is the same model as {seen[files]}"
            raise PlanError(ref, fact, "name it once, and in one way")
        seen[files] = ref


def _model(ref: str, checkpoint: Checkpoint) -> Model:
    if checkpoint.config is None and not checkpoint.bare:
        fact = "holds no config.json, so the result could not be loaded"
        remedy = "restore it, or name the .safetensors file itself for a bare result"
        raise CheckpointError(checkpoint.root, fact, remedy)
    checkpoint = dequantised(checkpoint)
    try:
        parts = anatomy(checkpoint)
    except CheckpointError as error:
        return Model(ref=ref, checkpoint=checkpoint, shapeless=error)
    if parts.lost_head:
        fact = "does not tie the output head to the embedding, but there is no head"
        remedy = "set tie_word_embeddings to true if it is tied, or restore the missing tensor"
        raise PlanError(checkpoint.root / "config.json", fact, remedy)
    return Model(ref=ref, checkpoint=checkpoint, parts=parts)


def with_checkpoints(
    models: Mapping[str, Model], checkpoints: Sequence[Checkpoint]
) -> dict[str, Model]:
    """Return the models with other tensors of the same names."""
    pairs: Iterator[tuple[tuple[str, Model], Checkpoint]]
    pairs = zip(models.items(), checkpoints, strict=True)
    return {ref: replace(model, checkpoint=c) for (ref, model), c in pairs}
