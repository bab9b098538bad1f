"""The `surgery` command: finds the command's file, runs it, turns errors into one sentence."""

import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

import typer
import typer.core
import typer.main

from surgery.errors import Exit, RecipeError, SurgeryError, printable

# Command: file in cli/, and the line that `surgery --help` shows (no file is loaded for it).
LOOK = "Look"
SHAPE = "Change the shape"
COMBINE = "Merge and transfer"
HEAL = "Heal"
MEASURE = "Measure and repeat"
COMMANDS = {
    "inspect": ("inspect", LOOK, "Show what a checkpoint is made of."),
    "diff": ("diff", LOOK, "Compare two checkpoints, tensor by tensor and layer by layer."),
    "verify": ("verify", LOOK, "Check that a checkpoint is whole, loads, and matches its record."),
    "stack": ("stack", SHAPE, "Repeat layers: G_stack, depth up-scaling, any layer map."),
    "expand": ("expand", SHAPE, "Insert identity blocks that change nothing until trained."),
    "prune": ("prune", SHAPE, "Drop layers, by number or by what they do."),
    "sparsify": ("sparsify", SHAPE, "Set weights to zero: magnitude, Wanda, SparseGPT, 2:4."),
    "factor": ("factor", SHAPE, "Make linear maps products of smaller ones: SVD, Monarch."),
    "widen": ("widen", SHAPE, "Multiply the width exactly, or grow it to a size."),
    "recurse": ("recurse", SHAPE, "Tie layers into a loop, with low-rank factors for each depth."),
    "upcycle": ("upcycle", SHAPE, "Make a mixture of experts of a dense model."),
    "moe": ("moe", SHAPE, "Make dense models the experts of one mixture."),
    "coalesce": ("levels", SHAPE, "Halve a model in width and depth, by averaging pairs."),
    "decoalesce": ("levels", SHAPE, "Give a coalesced model the sizes that it had."),
    "interpolate": ("levels", SHAPE, "Move a model a share of the way to a de-coalesced one."),
    "tleg": ("tleg", SHAPE, "Fit layers by a line over depth, and make any number of them."),
    "lesa": ("lesa", SHAPE, "Insert layers that a small network predicts from their neighbours."),
    "stages": ("stages", SHAPE, "Write a pipeline that grows a model's depth in stages."),
    "vocab": ("vocab", SHAPE, "Add, trim or exchange tokens, pad the table of tokens."),
    "linearize": ("linearize", SHAPE, "Give layers linear attention, and measure what it costs."),
    "context": ("context", SHAPE, "Let a model read further: linear, NTK, YaRN, a window."),
    "export": ("export", SHAPE, "Write a linearized model in the layout of fla or Qwen3-Next."),
    "align": ("align", SHAPE, "Move a model's units to where a like model has its own."),
    "convert": ("convert", SHAPE, "Turn a pickle checkpoint into safetensors."),
    "merge": ("merge", COMBINE, "Merge models by any of the methods."),
    "soup": ("soup", COMBINE, "Average models, all of them or chosen greedily."),
    "transfer": ("transfer", COMBINE, "Move what fine-tuning changed onto another base."),
    "lora": ("lora", COMBINE, "Fuse LoRA adapters, extract one from a model, merge several."),
    "emr": ("emr", COMBINE, "Keep many models as one, with a mask of bits for each task."),
    "tall": ("tall", COMBINE, "Keep many models as one task vector, with a mask for each."),
    "run": ("run", COMBINE, "Carry out a recipe, ours or mergekit's, or a pipeline."),
    "recover": ("recover", HEAL, "Train a model on after surgery, with its parent as the teacher."),
    "calibrate": ("calibrate", MEASURE, "Run a model over text, and keep what it shows for plans."),
    "teacher": ("teacher", HEAL, "Keep a teacher's answers on disk for recoveries."),
    "eval": ("eval", MEASURE, "Measure bits per byte, and how far a model is from its parent."),
    "report": ("report_page", MEASURE, "Show evaluations, recoveries and lineage on one page."),
    "ablate": ("ablate", MEASURE, "Measure every average of parts that were trained apart."),
    "reproduce": ("reproduce", MEASURE, "Make a checkpoint again from its record, and compare."),
    "demo": ("demo", MEASURE, "Take a complete tour on small trained models."),
}
TYPERS_INTERRUPT = 130  # what typer makes of a KeyboardInterrupt that no command has caught
UsageError: Any = typer.BadParameter.__base__
ClickException: Any = UsageError.__base__


class LazyGroup(typer.core.TyperGroup):
    """A group that imports a command's file only when that command runs."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401, ARG002 - click's own type
        """Return all names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401, ARG002
        """Load one command, or a stand-in with its help line while all are listed."""
        if cmd_name not in COMMANDS:
            close = get_close_matches(cmd_name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else "see surgery --help"
            raise RecipeError(printable(cmd_name), "is no command", hint)
        module, panel, line = COMMANDS[cmd_name]
        if self.listing:
            return typer.core.TyperCommand(cmd_name, help=line, rich_help_panel=panel)
        loaded = import_module(f"cli.{module}")
        if hasattr(loaded, "build"):  # a group with commands of its own
            return loaded.build(cmd_name)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name)(loaded.command)
        found = typer.main.get_command(single)
        found.name = cmd_name
        return found

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """Write the help without loading any command."""
        self.listing = True
        super().format_help(ctx, formatter)
        self.listing = False


def get_command() -> Any:  # noqa: ANN401 - click's own type
    """Return the root command, for the generated reference."""
    app = typer.Typer(
        cls=LazyGroup,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(root)
    return typer.main.get_command(app)


def _print_version(*, wanted: bool) -> None:
    if wanted:
        from surgery.provenance import tool_version

        typer.echo(f"surgery {tool_version()}")
        raise typer.Exit


def root(
    *,
    version: bool = typer.Option(
        False,
        "--version",
        help="Print the version and stop.",
        is_eager=True,
        callback=lambda wanted: _print_version(wanted=wanted),
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show tracebacks; works after a command too."
    ),
) -> None:
    """Change a trained model's weights instead of training a new one."""
    del version, debug  # the one is answered, the other taken out before parsing


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("SURGERY_DEBUG"))
    words = [word for word in words if word != "--debug"]
    if argv is None:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = get_command().main(args=words, prog_name="surgery", standalone_mode=False)
    except SurgeryError as error:
        if debug:
            raise
        return _say(str(error), error.exit_code)
    except ClickException as error:
        return _say(_usage(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = TYPERS_INTERRUPT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read the output has enough
        return Exit.DONE
    except Exception as error:
        if debug:
            raise
        text = printable(f"{type(error).__name__}: {error}")[:300]
        return _say(f"a fault in surgery itself ({text}); --debug shows where", Exit.FAILED)
    if code == TYPERS_INTERRUPT:
        return _say("interrupted", Exit.INTERRUPTED)
    return code if isinstance(code, int) else Exit.DONE


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _usage(error: Any) -> str:  # noqa: ANN401 - click's own type
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    command = error.ctx.command_path if getattr(error, "ctx", None) else "surgery"
    told = error.format_message().strip().replace("Value error, ", "")  # pydantic's own words
    return f"{command}: {printable(' '.join(told.split()))}"


def _say(text: str, code: int) -> int:
    sys.stdout.flush()
    sys.stderr.write(
        f"surgery: {text}\n" if not text.startswith(("surgery", "Usage")) else f"{text}\n"
    )
    return int(code)


def entry() -> NoReturn:
    """Run as a program: what threads of an interrupted run, or of gloo, still do must not matter.

    Under torchrun, gloo's threads abort the process now and then while Python ends.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code == Exit.INTERRUPTED or os.environ.get("WORLD_SIZE", "1") != "1":
        os._exit(code)
    sys.exit(code)
