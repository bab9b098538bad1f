"""Whether a model keeps the documents of a packed row apart.

Axis letters: b rows, t tokens, v vocabulary.
"""

import inspect

from surgery.errors import TrainError
from surgery.evaluate.load import Loaded, first_line

_LENGTH = 8  # tokens of each of two documents
_MOVED = 1e-3  # of the largest logit; what leaks moves them by far more, rounding not at all


def keeps_apart(loaded: Loaded) -> bool:
    """Return whether the first document of a row leaves the logits of the second alone.

    Attention of transformers does so where positions start anew and no mask and no cache are
    given. Layers with a running state do not, nor do models that take no positions: give those
    rows of one document each.

    Raises:
        TrainError: the forward pass fails.
    """
    import torch

    if "position_ids" not in inspect.signature(loaded.model.forward).parameters:
        return False
    ids_bt = (torch.arange(2 * _LENGTH, device=loaded.device) % loaded.embeddings).repeat(2, 1)
    ids_bt[1, :_LENGTH] = ids_bt[1, :_LENGTH].flip(0)
    position_bt = (torch.arange(2 * _LENGTH, device=loaded.device) % _LENGTH).repeat(2, 1)
    try:
        with torch.no_grad():  # shards could not be trained after inference_mode
            given = {"input_ids": ids_bt, "position_ids": position_bt, "use_cache": False}
            logits_btv: torch.Tensor = loaded.model(**given).logits[:, _LENGTH:].float()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        fact = f"the forward pass fails ({first_line(error)})"
        raise TrainError(loaded.path, fact) from error
    moved = (logits_btv[0] - logits_btv[1]).abs().max()
    return bool(moved <= _MOVED * logits_btv.abs().max())
