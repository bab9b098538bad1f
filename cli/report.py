"""What is told of a run behind it: the plan's notes, what its steps found out, figures of all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from cli import render

Told = Mapping[str, Mapping[str, float]]
# Makes figures of the whole of what steps told; a list of rows is shown as a table.
InAll = Callable[[Told], Mapping[str, Any]]
WARNING = "warning: "  # notes that begin so stand out
LABELS = {"energy": "share kept (energy)"}
# Figures of which a negative one is bad news, and what it means.
BELOW_ZERO = {"explained": "there the prediction is worse than a guess of zero"}
BEHIND = (".weight", ".lora_A", ".lora_B")
BEFORE = "base_model.model."  # of every tensor in an adapter of peft's


def remarks(notes: Sequence[str], told: Told, *, of: str = "") -> None:
    """Print notes and figures on stderr, the warnings first.

    Args:
        of: a step's name, before each of them.
    """
    for note in sorted(notes, key=lambda note: not note.startswith(WARNING)):
        remark(note, of=of)
    for line in figures(told):
        render.remark(f"{of}{line}")


def remark(note: str, *, of: str = "") -> None:
    """Print a note on stderr, a warning so that it is seen."""
    if note.startswith(WARNING):
        render.warn(f"{of}{note}")
    else:
        render.remark(f"{of}note: {note}")


def totals(found: Mapping[str, Any]) -> None:
    """Print figures of the whole."""
    for name, value in found.items():
        if isinstance(value, list):
            _table(value)
        else:
            render.line(f"{_label(name)}: {value:.4g}")


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    headings = list(rows[0])
    cells = [
        [f"{value:.4g}" if isinstance(value, float) else value for value in row.values()]
        for row in rows
    ]
    numbers = [i for i, value in enumerate(rows[0].values()) if isinstance(value, float)]
    render.table([_label(heading) for heading in headings], cells, numbers=numbers)


def _label(name: str) -> str:
    if name.endswith("_in_all"):
        return f"{_label(name.removesuffix('_in_all'))} in all"
    return LABELS.get(name, name.replace("_", " "))


def figures(told: Told) -> Iterator[str]:
    """Sum up what steps told of their tensors: a line for each figure, but those named `_...`."""
    every = dict.fromkeys(name for figures in told.values() for name in figures)
    for name in (name for name in every if not name.startswith("_")):
        values = {tensor: figures[name] for tensor, figures in told.items() if name in figures}
        least, most = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        ends = [f"{values[least]:.3g}", f"{values[most]:.3g}"]
        label = _label(name)
        if len(values) == 1:
            yield f"{label}: {ends[0]} ({_module(least)})"
        elif ends[0] == ends[1]:
            yield f"{label}: {ends[0]} in each of {len(values)} tensors"
        else:
            middle = f"median {median(values.values()):.3g} of {len(values)} tensors"
            low, high = _module(least), _module(most)
            yield f"{label}: {middle}, {ends[0]} ({low}) to {ends[1]} ({high})"
        below = sum(value < 0 for value in values.values())
        if name in BELOW_ZERO and below:
            yield f"{label} below 0 in {below} of {len(values)}: {BELOW_ZERO[name]}"


def _module(tensor: str) -> str:
    """Shorten the name of an adapter's tensor to the module's; others stay as they are."""
    if not tensor.startswith(BEFORE):
        return tensor
    name = tensor.removeprefix(BEFORE)
    for end in BEHIND:
        name = name.removesuffix(end)
    return name
