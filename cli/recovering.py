"""What `surgery recover` shows: its ask, and a live line of figures."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cli import render
from surgery.recover.ask import Ask


def show_ask(ask: Ask, *, as_json: bool) -> None:
    """Tell what a recovery would do."""
    settings = ask.settings
    told = {
        "output": str(ask.out),
        "run": str(ask.folder),
        "steps": settings.steps,
        "rows_per_step": settings.batch_rows,
        "settings": {**settings.as_dict(), "lr": settings.peak},
    }
    if as_json:
        render.print_json(told)
        return
    losses = ", ".join(f"{weight:g} {name}" for name, weight in settings.losses.items())
    render.line(f"output    {ask.out}, the run in {ask.folder}")
    render.line(f"trains    {settings.train}, learning rate {settings.peak:g}, {settings.schedule}")
    render.line(f"loss      {losses}" + (f" from {ask.teacher}" if ask.teacher else ""))
    render.line(f"steps     {settings.steps} of {settings.batch_rows} rows of {settings.context}")
    render.line("nothing was trained (--dry-run)", "dim")


@contextmanager
def live_line() -> Iterator[Any]:
    """Give what draws one live line of figures on stderr; nothing where nobody looks."""
    if not render.is_watched(stderr=True) or os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), Left())
    with Progress(*columns, console=render.err(), transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(told: Mapping[str, Any]) -> None:
            mfu = f", MFU {told['mfu']:.1%}" if "mfu" in told else ""
            text = (
                f"loss {told['loss']:.4f}  lr {told['lr']:.2g}  "
                f"{told['tokens_per_second']:,.0f} tokens/s{mfu}"
            )
            bar.update(task, completed=told["step"] + 1, total=told["steps"], description=text)

        yield report
