"""The transfer stage from beginning to end: layers learn what their softmax attention gave."""

from typing import Any

from surgery.linearize.transfer_ask import TransferAsk, TransferSettings, check_transfer
from surgery.recover.loop import Progress, Remark
from surgery.recover.run import Kind, Recovery, heal

__all__ = ["MODE", "TransferAsk", "TransferSettings", "transfer"]

MODE = "transfer"  # what the record calls it


def transfer(
    ask: TransferAsk,
    *,
    force: bool = False,
    progress: Progress | None = None,
    remark: Remark | None = None,
    **limits: Any,  # noqa: ANN401 - those of `surgery.run.run`
) -> Recovery:
    """Train what linearization added, layer by layer, on the outputs of softmax attention.

    All layers train in one pass: the teacher's activations feed the next layer, so that no layer
    sees another's error. Saved, resumed, stopped and written as a recovery is.

    Args:
        force: replace a model that stands at the output.
        progress: called with every step's figures; `layer.N` is the error of layer N.
        remark: called with what the user should know of checkpoints, and of space on disk.
        limits: memory, shard_size, workers of the writing.

    Raises:
        RecipeError, CheckpointError, PlanError: something does not fit; nothing has been trained.
        TrainError: a model does not load whole, the loss is out of bounds and stays so, or what
            was written does not compute what was trained.
    """
    full = check_transfer(ask, force=force)
    given: dict[str, Any] = {"force": force, "progress": progress, "remark": remark, **limits}
    if full.blocks is not None:
        from surgery.linearize.blockwise import transfer_blocks

        return transfer_blocks(full, **given)
    from surgery.linearize.objective import TransferGoal, keep_own_teacher

    kind = Kind(goal=TransferGoal, prepare=keep_own_teacher, mode=MODE)
    return heal(full, kind, **given)
