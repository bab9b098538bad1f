"""`surgery merge`: one command for each merge method, made from its signature."""

from collections.abc import Callable
from difflib import get_close_matches
from inspect import Parameter as Argument
from inspect import Signature
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from cli.flags import parse_flag
from cli.recipes import MERGING, make_recipe
from cli.writing import Writing, writing_options
from surgery.errors import RecipeError, printable
from surgery.method import Method, Parameter, find_method, method_names
from surgery.recipe import merge_models

MODELS = Annotated[
    list[str],
    typer.Argument(metavar="MODELS...", help="Directories, .safetensors files, or org/name[@rev]."),
]
EXPRESSION = "expr"
VALUES = (
    "VALUE is a number for all models, or one for each: 0.3,0.7. [0,0.5,1] is a gradient from the "
    "first layer to the last. NAME=VALUE is for tensors with NAME in their name (glob:PATTERN= and "
    "regex:PATTERN= too); the first that fits decides, so give the option several times."
)


class MethodGroup(typer.core.TyperGroup):
    """A group with one command a method, each loaded when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002 - click's own type
        """Return the names of all methods, and `expr`."""
        return sorted((*method_names(), EXPRESSION))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401, ARG002
        """Return the command of one method, or that of expressions."""
        if cmd_name == EXPRESSION:
            return expression_command()
        if cmd_name not in method_names():
            close = get_close_matches(cmd_name.replace("-", "_"), method_names(), n=1)
            hint = f"did you mean {close[0]}?" if close else "see surgery merge --help"
            raise RecipeError(printable(cmd_name), "is no merge method", hint)
        return method_command(find_method(cmd_name))


def build(name: str) -> Any:  # noqa: ANN401 - click's own type
    """Return the group under the name of the command."""
    app = typer.Typer(cls=MethodGroup, add_completion=False, rich_markup_mode=None)
    app.callback(no_args_is_help=True)(command)
    found = typer.main.get_command(app)
    found.name = name
    return found


def command() -> None:
    """Merge models by arithmetic on their weights, without training.

    Each method has its own options: surgery merge ties --help.
    """


def expression_command() -> Any:  # noqa: ANN401 - click's own type
    """Return the command that computes an expression, which is no method."""
    from cli import expr

    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(EXPRESSION, short_help=expr.SUMMARY)(expr.command)
    found = typer.main.get_command(single)
    found.name = EXPRESSION
    return found


def method_command(method: Method) -> Any:  # noqa: ANN401 - click's own type
    """Return the command of a method, with an option for each of its parameters."""
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(method.name, help=_help(method), short_help=method.summary)(_function(method))
    found = typer.main.get_command(single)
    found.name = method.name
    return found


def _help(method: Method) -> str:
    wanted = str(method.most) if method.most else f"{method.least} or more"
    base = {"required": ", and --base", "optional": "; --base may be given", "none": ""}[
        method.base
    ]
    takes = f"Takes {wanted} model(s){base}."
    values = VALUES if method.parameters else ""
    return "\n\n".join(part for part in (method.summary, takes, values, method.source) if part)


def _function(method: Method) -> Callable[..., None]:
    def run(models: list[str], *, writing: Writing, **given: Any) -> None:  # noqa: ANN401
        merging = {name: given.pop(name) for name in MERGING if name in given}
        explain = bool(merging.pop("explain"))
        flags = {p.name: option_of(p) for p in method.parameters.values()}
        parameters = {
            p.keyword: parse_flag(given[p.keyword], p, flags[p.name])
            for p in method.parameters.values()
            if given[p.keyword] not in (None, [], ())
        }
        recipe = merge_models(
            method.name, models, base=given.get("base"), flags=flags, **merging, **parameters
        )
        make_recipe(recipe, writing, explain=explain)

    own = [_argument("models", MODELS, Argument.empty)]
    if method.base != "none":
        own.append(_argument("base", *_base(method)))
    own += [_argument(p.keyword, _annotation(p), None) for p in method.parameters.values()]
    shared = {n: kept for n, kept in MERGING.items() if n != "seed" or method.is_random}
    own += [_argument(name, note, default) for name, (note, default) in shared.items()]
    own.append(Argument("writing", Argument.KEYWORD_ONLY, annotation=Writing))
    run.__signature__ = Signature(own)  # type: ignore[attr-defined]
    return writing_options(run)


def _argument(name: str, annotation: Any, default: Any) -> Argument:  # noqa: ANN401
    return Argument(name, Argument.KEYWORD_ONLY, annotation=annotation, default=default)


def _base(method: Method) -> tuple[Any, Any]:
    told = "The model that the others were trained from."
    option = typer.Option("--base", metavar="MODEL", help=told)
    if method.base == "required":
        return Annotated[str, option], Argument.empty
    return Annotated[str | None, option], None


def option_of(parameter: Parameter) -> str:
    """Return the option of a parameter, such as --nuslerp-flatten."""
    return "--" + parameter.name.replace("_", "-")


def _annotation(parameter: Parameter) -> Any:  # noqa: ANN401 - what typer reads
    told = parameter.bounds.help or parameter.name
    told = told[0].upper() + told[1:]
    facts = [parameter.range] if parameter.range else []
    facts.append("required" if parameter.required else f"default: {_shown(parameter.default)}")
    if parameter.per_model:
        facts.append("per model")
    told += f".  [{'; '.join(facts)}]"
    if parameter.kind is bool:
        off = option_of(parameter).replace("--", "--no-", 1)
        names = f"{option_of(parameter)}/{off}"
        return Annotated[bool | None, typer.Option(names, help=told, show_default=False)]
    option = typer.Option(option_of(parameter), metavar="VALUE", help=told, show_default=False)
    return Annotated[list[str] | None, option]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
