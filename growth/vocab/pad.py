"""Rows that no token stands for, up to a multiple that hardware likes."""

import numpy as np

from growth.vocab.choices import Init
from growth.vocab.newrows import NewRows
from growth.vocab.rebuild import vocabulary_plan
from surgery.checkpoint import Checkpoint
from surgery.errors import RecipeError
from surgery.plan import Plan
from surgery.vocabulary.config import resized
from surgery.vocabulary.tables import section, table_rows

MOST = 1 << 20  # rows that a multiple may ask for


def pad(base: Checkpoint, *, multiple: int, init: Init = "mean", seed: int = 0) -> Plan:
    """Append rows to embedding and head until their number is a multiple of `multiple`.

    The mean of all rows is the default: its logit is the mean of all logits, which is never above
    the largest, so that a greedy choice stays what it was. The tokenizer is not touched.

    Raises:
        RecipeError: the multiple is no number of rows, or there is nothing to append.
    """
    rows = table_rows(base)
    if not 1 <= multiple <= MOST:
        fact = f"is outside 1 to {MOST}"
        raise RecipeError(f"--multiple {multiple}", fact, "for instance --multiple 64")
    size = -(-rows // multiple) * multiple
    if size == rows:
        fact = f"divides the {rows} rows that there are, so nothing is to be done"
        raise RecipeError(f"--multiple {multiple}", fact, "choose a multiple above")
    copy = np.concatenate([np.arange(rows), np.full(size - rows, -1)])
    new = NewRows(copy=copy, pieces={}, rest=init, known=rows, seed=seed)
    config = base.config and resized(base.config, section(base.config), size)
    return vocabulary_plan(
        base,
        new,
        operation="vocab pad",
        parameters={"multiple": multiple, "init": init, "seed": seed},
        config=config,
        carried=base.carried,
        facts={"rows_before": rows},
    )
