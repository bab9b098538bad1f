"""A page for every merge method, from its signature and docstring."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

from surgery.method import find_method, method_names

if TYPE_CHECKING:
    from surgery.method import Method, Parameter

MARK = "<!-- Written by docs/generate.py from the code; `make docs` renews it. -->"
# What mergekit 0.1.5 has under the same name.
PEER = frozenset(
    {
        *("linear", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "passthrough"),
        *("task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear"),
        *("breadcrumbs", "breadcrumbs_ties", "sce", "model_stock", "arcee_fusion"),
        *("ram", "ramplus_tl"),
    }
)
SECTIONS = {"Shapes": "Shapes", "Raises": "Errors", "Source": "Source", "Args": "Arguments"}
DIFFERENCES = ("Deviation", "Differs", "Differences", "Variants")
COST = {
    "elementwise": "One reading of every input, in slices: memory does not depend on the tensor.",
    "passes": "A few readings of every input, in slices: memory does not depend on the tensor.",
    "blocks": "Reads blocks of every input, as often as it needs, with one worker for a tensor; "
    "`--dry-run` tells what it holds under the budget of `--memory`.",
    "whole": "Holds a tensor of every input at once, under the budget of `--memory`.",
}


def pages() -> dict[str, str]:
    """Return file name and text of the index and of every method's page."""
    found = {name: find_method(name) for name in method_names()}
    texts = {f"{name}.md": page(method) for name, method in found.items()}
    return {"README.md": index(found), **texts}


def index(methods: dict[str, Method]) -> str:
    """Return the table of all methods."""
    rows = [f"| [{name}]({name}.md) | {m.summary} | {takes(m)} |" for name, m in methods.items()]
    head = ["| Method | What it does | Takes |", "|---|---|---|"]
    return "\n".join(["# Merge methods", "", MARK, "", *head, *rows, ""])


def page(method: Method) -> str:
    """Return a method's page."""
    parts = [f"# {method.name}", MARK, *body(method)]
    parts += ["## Parameters", parameters(method)]
    parts += ["## Takes", f"{takes(method).capitalize()}."]
    parts += ["## Cost", cost(method)]
    parts += ["## Example", f"```bash\n{' '.join(example(method))}\n```"]
    if method.name in PEER:
        told = (
            "mergekit 0.1.5 has a method of this name, and its recipes run as they are. Here the "
            "arithmetic is in float32 or wider with one rounding at the end, whatever `dtype` says."
        )
        parts += ["## mergekit", told]
    return "\n\n".join(parts) + "\n"


def body(method: Method) -> list[str]:
    """Return the docstring's paragraphs under headings."""
    found: list[str] = []
    for text in re.split(r"\n\n+", inspect.getdoc(method.fn) or ""):
        word, _, rest = text.partition(":")
        if word in SECTIONS:
            found += [f"## {SECTIONS[word]}", inspect.cleandoc(rest)]
        elif text.startswith(DIFFERENCES):
            found += ["## How it differs", text]
        else:
            found.append(text)
    return [*found, f"<{method.source}>"]


def parameters(method: Method) -> str:
    """Return the table of parameters."""
    if not method.parameters:
        return "None."
    lines = ["| Name | Meaning | Values | Default |", "|---|---|---|---|"]
    for p in method.parameters.values():
        each = ", one per model" if p.per_model else ""
        lines.append(f"| `{p.name}` | {p.bounds.help} | {values(p)}{each} | {default(p)} |")
    return "\n".join(lines)


def values(parameter: Parameter) -> str:
    """Return the values that a parameter takes, in words."""
    kinds = {float: "any number", int: "whole number", bool: "true or false", str: "word"}
    return parameter.range or kinds[parameter.kind]


def default(parameter: Parameter) -> str:
    """Return the default, as YAML has it."""
    if parameter.required:
        return "required"
    value = parameter.default
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    )


def takes(method: Method) -> str:
    """Return what a method merges."""
    if method.most:
        models = "one model" if method.most == 1 else f"{method.most} models"
    else:
        models = f"{method.least} or more models" if method.least > 1 else "any number of models"
    return (
        models
        + {"required": " and a base", "optional": ", and a base if wanted", "none": ""}[method.base]
    )


def cost(method: Method) -> str:
    """Return how much a method reads and holds."""
    told = COST["blocks" if method.holds else method.kind]
    return told + (" Random masks come from `--seed`." if method.is_random else "")


def example(method: Method) -> list[str]:
    """Return a command that runs on the repository's own models."""
    models = ["fixtures/uni", "fixtures/arith", "fixtures/v2"]
    count = method.most or max(method.least, 2)
    words = ["surgery", "merge", method.name, *models[:count]]
    if method.base == "required":
        words += ["--base", "fixtures/base"]
    for p in method.parameters.values():
        if p.required:
            words += [f"--{p.name.replace('_', '-')}", "0.5" if p.kind is float else "1"]
    return [*words, "-o", "merged"]
