"""Steps in order, each skipped when nothing that it depends on has changed.

from growth.stack import stack
from surgery.pipeline import Pipeline

with Pipeline("build") as build:
    deep = build.make("deep", stack, "base", factor=2)
    build.make("deeper", stack, deep, factor=2)
"""

from surgery.pipeline.folder import Folder
from surgery.pipeline.graph import check_order
from surgery.pipeline.script import Pipeline
from surgery.pipeline.task import Outcome, Outlook, Planned, Task, is_ahead
from surgery.pipeline.work import carry_out, survey

__all__ = [
    "Folder",
    "Outcome",
    "Outlook",
    "Pipeline",
    "Planned",
    "Task",
    "carry_out",
    "check_order",
    "is_ahead",
    "survey",
]
