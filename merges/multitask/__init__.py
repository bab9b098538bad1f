"""One set of weights and a mask of one bit a weight for each task, instead of a model each.

`build_store` writes a store from a base and models tuned from it, `restore_task` makes one task's
model again. Two rules give the masks: EMR and TALL.
"""

from merges.multitask.build import build_store
from merges.multitask.restore import restore_task
from merges.multitask.store import Store, read_store

__all__ = ["Store", "build_store", "read_store", "restore_task"]
