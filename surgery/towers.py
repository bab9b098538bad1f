"""Name a text model's tensors as a model with further towers names its own."""

from dataclasses import replace

from surgery.anatomy import Anatomy, anatomy
from surgery.checkpoint import Checkpoint


def named_like(checkpoint: Checkpoint, *, like: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its text tower named as in another checkpoint.

    `model.layers.0.mlp.up_proj.weight` of a text model is
    `model.language_model.layers.0.mlp.up_proj.weight` in a vision-language model: what stands
    before the layers is exchanged, and embedding and head take the other's names. What has no
    counterpart, such as a vision tower, keeps its name. A checkpoint whose names agree comes back
    as it is.

    Raises:
        CheckpointError: one of the two has no one stack of layers.
    """
    ours, theirs = anatomy(checkpoint), anatomy(like)
    if ours.stack.prefix == theirs.stack.prefix:
        return checkpoint
    ends = {ours.embedding: theirs.embedding, ours.head: theirs.head}
    here, there = _before(ours), _before(theirs)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        end = ends.get(name)
        moved = there + name[len(here) :] if name.startswith(here) else name
        new = end or (moved if moved in like.tensors else name)
        tensors[new] = tensor if new == name else replace(tensor, name=new)
    note = f"{ours.stack.prefix} is read as {theirs.stack.prefix}"
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _before(parts: Anatomy) -> str:
    """Return what stands before `layers` in the names of layers, the dot included."""
    prefix = parts.stack.prefix
    return prefix[: prefix.rfind(".") + 1]
