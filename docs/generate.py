"""Write docs/reference from the code, or say what is out of date with --check."""

from __future__ import annotations

import difflib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import methods

from cli.main import get_command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typer import Context
    from typer.core import TyperCommand, TyperGroup

    Command = TyperCommand | TyperGroup

# Typer shows its own two differently in each shell.
NOT_OURS = ("help", "install_completion", "show_completion")
REFERENCE = Path(__file__).resolve().parent / "reference"
HEAD = """# Command line

<!-- Written by docs/generate.py from the code; `make docs` renews it. -->
"""


def main() -> int:
    """Write the pages, or compare them."""
    wanted = {f"methods/{name}": text for name, text in methods.pages().items()}
    wanted["cli.md"] = command_line()
    if "--check" not in sys.argv[1:]:
        write(wanted)
        return 0
    stale = {str(p.relative_to(REFERENCE)) for p in REFERENCE.rglob("*.md")} - set(wanted)
    return sum(differs(name, wanted.get(name, "")) for name in sorted({*wanted, *stale})) and 1


def write(wanted: dict[str, str]) -> None:
    """Write the pages, and take away those of methods that are gone."""
    for page in REFERENCE.rglob("*.md"):
        if str(page.relative_to(REFERENCE)) not in wanted:
            page.unlink()
    for name, text in wanted.items():
        page = REFERENCE / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)


def differs(name: str, wanted: str) -> bool:
    """Say how a page differs from what the code says."""
    page = REFERENCE / name
    found = page.read_text() if page.exists() else ""
    sys.stderr.writelines(
        difflib.unified_diff(
            found.splitlines(keepends=True),
            wanted.splitlines(keepends=True),
            name,
            "what the code says; run `make docs`",
        )
    )
    return found != wanted


def command_line() -> str:
    """Every command with its usage, help, arguments and options."""
    root = get_command()
    sections = [HEAD]
    for command, context in walk(root, root.context_class(root, info_name="surgery")):
        sections.append(section(command, context))
    return "\n".join(sections)


def walk(command: Command, context: Context) -> Iterator[tuple[Command, Context]]:
    """The command, then those below it in the order that help shows."""
    yield command, context
    if not hasattr(command, "list_commands"):
        return
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        if not below.hidden:
            yield from walk(below, below.context_class(below, info_name=name, parent=context))


def section(command: Command, context: Context) -> str:
    """One command as Markdown."""
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    parts = [
        f"## {context.command_path}",
        f"```text\n{usage}\n```",
        inspect.cleandoc(command.help or "").partition("\f")[0].rstrip(),
        table("Argument", rows(command, context, kind="argument")),
        table("Option", rows(command, context, kind="option")),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def rows(command: Command, context: Context, *, kind: str) -> list[tuple[str, str]]:
    """Names and help of our own parameters of one kind."""
    records = [
        parameter.get_help_record(context)
        for parameter in command.get_params(context)
        if parameter.param_type_name == kind and parameter.name not in NOT_OURS
    ]
    return [record for record in records if record]


def table(title: str, records: list[tuple[str, str]]) -> str:
    """A two-column table, or nothing."""
    if not records:
        return ""
    lines = [f"| {title} | Meaning |", "|---|---|"]
    lines += [f"| `{cell(names)}` | {cell(help_text)} |" for names, help_text in records]
    return "\n".join(lines)


def cell(text: str) -> str:
    """Text that cannot end a table cell early."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
