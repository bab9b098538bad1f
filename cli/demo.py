"""`surgery demo`: a complete tour on the small trained model that comes with the tool."""

import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Annotated

import typer

from cli import render
from surgery.errors import CheckpointError, PlanError, StepError

DATA = Path(__file__).parent / "demo_data"
MODELS = ("base", "uni", "arith", "v2")
TEXTS = ("mix", "uni", "arith")
MARK = ".surgery-demo"  # says that the folder is the tour's own
PROMPT = "for key, value in items:\n    if key"
NEW_TOKENS = 32
RANKS = ("4", "16", "64")
BLIND = ("1", "3")
LIBRARY = ("argparse", "subprocess", "tarfile")  # modules; the texts to measure on are from others
HEALING = ("--train", "full", "--lr", "1e-3", "--tokens", "50K", "--batch-tokens", "2048")

LINEAR = (
    *("--stage", "transfer,full", "--transfer-tokens", "20K", "--tokens", "20K"),
    *("--lr", "1e-3", "--batch-tokens", "1024"),
)


def command(
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The folder that the tour fills.")
    ] = Path("demo-out"),
) -> None:
    """Take a complete tour on small trained models; every command is printed to be repeated.

    Running it again replaces the models in the folder.
    """
    if not all((DATA / name / "config.json").exists() for name in MODELS):
        raise CheckpointError(DATA, "the demo's models were not installed", "reinstall surgery")
    _prepare(output)
    tour = _Tour()
    _grow(tour, output)
    _merge(tour, output)
    _reshape(tour, output)
    _heal(tour, output)
    _linearize(tour, output)
    tour.close(output)


def _grow(tour: "_Tour", output: Path) -> None:
    base, text = output / "base", output / "mix.jsonl"
    stacked, expanded = output / "base-stack2", output / "base-expand2"
    tour.say("A language model of 0.9 M parameters, trained on Python's own sources.")
    tour.run("inspect", base)
    tour.say("Stack it: the same layers twice, bytes copied. It must be trained on to be useful.")
    tour.run("stack", base, "--factor", "2", "-o", stacked, "--force")
    tour.say("Expand it: two new blocks that add nothing yet, so that nothing is forgotten.")
    tour.run("expand", base, "--blocks", "2", "-o", expanded, "--force")
    tour.say("Measure all three in bits per byte on text none of them has seen; lower is better.")
    tour.run("eval", base, stacked, expanded, "--text", text)
    tour.say("Load them in transformers, as anybody would, and let each go on with a function.")
    _generate([base, stacked, expanded])
    tour.say("Check the stacked model: sound, complete, loadable, and as its record says.")
    tour.run("verify", stacked)
    tour.say("Make the expanded model again from its record alone, and compare every tensor.")
    tour.run("reproduce", expanded)


def _merge(tour: "_Tour", output: Path) -> None:
    base, uni, arith, v2 = (output / name for name in MODELS)
    texts = [output / f"{name}.jsonl" for name in TEXTS]
    soup, negated, moved = output / "soup", output / "base-without-uni", output / "v2-with-uni"
    tour.say("Two experts were trained from the base: uni on the names of Unicode, arith on sums.")
    tour.say("Average them. The soup knows both domains, and each expert only its own.")
    tour.run("soup", uni, arith, "-o", soup, "--force")
    tour.say("Turn round what uni learnt (its task vector, times -0.5): the base without it.")
    negate = ("merge", "task_arithmetic", uni, "--base", base, "--weight", "-0.5")
    tour.run(*negate, "-o", negated, "--force")
    tour.say("v2 is the base trained on. Give it what uni learnt, with no training at all.")
    bases = ("--old-base", base, "--new-base", v2)
    tour.run("transfer", "--tuned", uni, *bases, "-o", moved, "--force")
    tour.say("Measure all of them on the three domains; below the parent is better.")
    tour.run("eval", base, uni, arith, soup, negated, v2, moved, "--text", *texts)


def _reshape(tour: "_Tour", output: Path) -> None:
    base, text = output / "base", output / "mix.jsonl"
    tour.say("Tie the four layers into two that are run twice: half the weights, and a heavy loss.")
    tied = output / "base-tied"
    tour.run("recurse", "tie", base, "--blocks", "2", "-o", tied, "--force")
    tour.say("Relax the loop: each depth gets low-rank differences of its own, by SVD.")
    relaxed = [output / f"base-relaxed{rank}" for rank in RANKS]
    for rank, out in zip(RANKS, relaxed, strict=True):
        ask = ("--blocks", "2", "--rank", rank)
        tour.run("recurse", "relax", base, *ask, "-o", out, "--force")
    tour.say("Drop the layer that does least on text, and beside it layers without looking.")
    chosen = output / "base-pruned"
    choice = ("--method", "block-influence", "--layers", "1", "--calibration", text)
    tour.run("prune", base, *choice, "-o", chosen, "--force")
    blind = [output / f"base-without{layer}" for layer in BLIND]
    for layer, out in zip(BLIND, blind, strict=True):
        tour.run("prune", base, "--layers", layer, "-o", out, "--force")
    tour.say("Double the width: twice the channels and heads, and the same function.")
    wide = output / "base-wide"
    tour.run("widen", base, "--factor", "2", "-o", wide, "--force")
    tour.say("The more rank, the less is lost; the layer that was chosen costs least.")
    tour.run("eval", base, tied, *relaxed, chosen, *blind, wide, "--text", text)


def _heal(tour: "_Tour", output: Path) -> None:
    base, pruned, healed = (output / name for name in ("base", "base-pruned", "base-healed"))
    library = Path(sysconfig.get_path("stdlib"))
    data = [word for name in LIBRARY for word in ("--data", library / f"{name}.py")]
    tour.say("Heal the model that lost a layer: for some seconds its parent teaches it.")
    ask = ("--teacher", base, *data, *HEALING)
    tour.run("recover", pruned, *ask, "-o", healed, "--force", "--fresh")
    tour.say("The parent, the model without the layer, and the same model healed.")
    tour.run("eval", base, pruned, healed, "--text", output / "mix.jsonl")


def _linearize(tour: "_Tour", output: Path) -> None:
    base, fast = output / "base", output / "base-linear"
    library = Path(sysconfig.get_path("stdlib"))
    data = [word for name in LIBRARY for word in ("--data", library / f"{name}.py")]
    tour.say("Give three of four layers linear attention: what they keep of a text does not grow.")
    ask = ("--method", "lolcats", "--window", "16", "--keep-softmax", "every:4")
    more = (*data, "--held-out", output / "mix.jsonl", *LINEAR)
    tour.run("linearize", base, *ask, *more, "-o", fast, "--force", "--fresh")
    tour.say("Two rows keep it honest: a window that took no training, and no linear branch.")


def _prepare(output: Path) -> None:
    if output.is_dir() and not (output / MARK).exists() and any(output.iterdir()):
        fact = "holds files that no tour has left there"
        raise PlanError(output, fact, "choose another folder with -o")
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / MARK).touch()
        for name in MODELS:
            shutil.copytree(DATA / name, output / name, dirs_exist_ok=True)
        for name in TEXTS:
            shutil.copyfile(DATA / f"{name}.jsonl", output / f"{name}.jsonl")
    except OSError as error:
        raise StepError(output, f"cannot be written ({error.strerror})") from error


class _Tour:
    """Runs commands as if they were typed, and remembers them."""

    def __init__(self) -> None:
        self.typed: list[str] = []

    def say(self, text: str) -> None:
        render.line()
        render.line(text, "bold")

    def run(self, *words: object) -> None:
        from cli.main import main

        line = shlex.join(["surgery", *(str(word) for word in words)])
        self.typed.append(line)
        render.line(f"$ {line}", "cyan")
        code = main([str(word) for word in words])
        if code:
            raise typer.Exit(code)

    def close(self, output: Path) -> None:
        self.say(f"All of it is in {output}/. The commands, to repeat any step:")
        for line in self.typed:
            render.line(f"  {line}")


def _generate(models: list[Path]) -> None:
    """Print what each model writes, greedily, and whether it is what the first writes."""
    from surgery.evaluate.sample import greedy

    texts = [greedy(model, PROMPT, new_tokens=NEW_TOKENS) for model in models]
    rows = [
        (model.name, text, "the parent" if i == 0 else _relation(text, texts[0]))
        for i, (model, text) in enumerate(zip(models, texts, strict=True))
    ]
    for line in PROMPT.splitlines():
        render.line(line, "dim")
    for name, text, relation in rows:
        render.line(f"{name} ({relation})", "bold")
        for line in (PROMPT.splitlines()[-1] + text).splitlines():
            render.line(f"  {line}")


def _relation(text: str, parent: str) -> str:
    return "word for word as its parent" if text == parent else "not what its parent writes"
