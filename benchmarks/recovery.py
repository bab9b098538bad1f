"""What training on after surgery gives on the trained fixtures: three questions, several seeds.

    PYTHONPATH=. python -m benchmarks.recovery --work DIR [--seeds 3] [--only stack,teacher,modes]

stack: does a stacked model that is trained on beat its depth from scratch at equal FLOPs?
teacher: does a damaged model recover more with its parent as the teacher, at equal tokens?
modes: what do norms, LoRA, full and half recover, at equal tokens?

Every model is made and trained by the product's own functions, one after the other on one thread.
Each way to train takes its learning rate from a sweep of the same size, on the first seed, by
text that the table does not show. Every figure is kept in DIR as soon as it is there; the same
command goes on.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.effects import BASE, TEXT
from benchmarks.recovery_arms import CONTEXT, DAMAGED, STEP, Arm, Found, arms
from benchmarks.recovery_page import write_page
from benchmarks.stack import HERE, say
from surgery.errors import Exit


@cache
def documents() -> tuple[list[str], list[str]]:
    """Return the base's documents to train on, and those held out."""
    from fixtures.text import mix

    split = mix()
    return split.train, split.heldout


@dataclass(frozen=True, slots=True)
class Bench:
    """The folder that holds models, texts and figures."""

    work: Path

    def text(self, arm: Arm, seed: int) -> Path:
        """Write documents drawn by the seed."""
        path = self.work / "text.jsonl"
        drawn, size = [], 0
        order = list(documents()[0])
        random.Random(seed).shuffle(order)
        for one in order:
            if size < arm.text_bytes:
                drawn.append(one)
                size += len(one.encode())
        path.write_text("".join(json.dumps({"text": one}) + "\n" for one in drawn))
        return path

    def choosing(self) -> Path:
        """Write 64 pieces of held-out files, to choose learning rates by."""
        path = self.work / "choosing.jsonl"
        held, chance = "".join(documents()[1]), random.Random(0)
        starts = [chance.randrange(len(held) - 400) for _ in range(64)]
        path.write_text("".join(json.dumps({"text": held[at : at + 350]}) + "\n" for at in starts))
        return path

    def student(self, arm: Arm, seed: int) -> Path:
        """Make what an arm begins with."""
        if arm.student.isdecimal():
            return new_model(self.work / f"new{arm.student}", layers=int(arm.student), seed=seed)
        return self.damaged(arm.student)

    def damaged(self, name: str) -> Path:
        """Make a damaged model from the base, or find it."""
        verb, *words = DAMAGED[name]
        out = self.work / name
        if not out.exists():
            by_command(*verb.split(), str(BASE), *words, "-o", str(out))
        return out

    def cell(self, arm: Arm, rate: float, seed: int) -> dict[str, float]:
        """Return the figures of one training, made now or kept from before."""
        name = f"{arm.experiment} {arm.name} {rate:g} {seed}.json".replace(" ", "-")
        kept = self.work / "figures" / name
        if not kept.exists():
            found = self.trained(arm, rate, seed)
            kept.parent.mkdir(exist_ok=True)
            kept.with_suffix(".part").write_text(json.dumps(found))
            kept.with_suffix(".part").replace(kept)
            say(f"{arm.experiment}: {arm.name}, {rate:g}, seed {seed}: {found['bits']:.4f}")
        told: dict[str, float] = json.loads(kept.read_text())
        return told

    def trained(self, arm: Arm, rate: float, seed: int) -> dict[str, float]:
        """Train, measure, and throw the model away."""
        from surgery.evaluate import evaluate

        began = time.process_time()
        model, text, trained = self.student(arm, seed), self.text(arm, seed), 0
        for number, steps in enumerate(arm.steps):
            if number:
                twice = self.work / "twice"
                by_command("stack", str(model), "--factor", "2", "-o", str(twice), "--force")
                model = twice
            out = self.work / f"trained{number}"
            order = seed + 1000 * number  # what comes after the stacking is not what was before
            settings = {"tokens": steps * STEP, "lr": rate, "seed": order, **arm.options}
            trained = heal(model, out, text, taught=arm.taught, **settings)
            model = out
        texts = [TEXT, self.choosing()]
        shown, choosing = evaluate([model], texts).models[0].domains
        assert shown.bits_per_byte is not None
        assert choosing.bits_per_byte is not None
        return {
            "bits": shown.bits_per_byte,
            "choosing": choosing.bits_per_byte,
            "parameters": trained,
            "seconds": time.process_time() - began,
        }

    def before(self) -> dict[str, float]:
        """Return bits per byte of the parent and the damaged models, untrained."""
        from surgery.evaluate import evaluate

        models = [BASE, *(self.damaged(name) for name in DAMAGED)]
        told = evaluate(models, [TEXT]).models
        bits = [model.overall.bits_per_byte for model in told]
        return dict(zip(("base", *DAMAGED), (b for b in bits if b is not None), strict=True))

    def found(self, arm: Arm, seeds: int) -> Found:
        """Choose the learning rate, and train on every seed with it (and a mode's default)."""
        swept = {rate: self.cell(arm, rate, 0)["choosing"] for rate in arm.rates}
        chosen = {min(swept, key=swept.__getitem__)}
        chosen |= {arm.rates[0]} if arm.experiment == "modes" else set()
        cells = {r: [self.cell(arm, r, seed) for seed in range(seeds)] for r in sorted(chosen)}
        every = [cell for cells_ in cells.values() for cell in cells_]
        return Found(
            arm=arm,
            swept=swept,
            bits={rate: [cell["bits"] for cell in row] for rate, row in cells.items()},
            trained=int(every[0]["parameters"]),
            seconds=sum(cell["seconds"] for cell in every) / len(every),
        )


def heal(student: Path, out: Path, text: Path, *, taught: bool, **options: Any) -> int:  # noqa: ANN401
    """Train a model; return how many parameters of it."""
    from surgery.recover.ask import Ask
    from surgery.recover.run import recover
    from surgery.recover.settings import Settings
    from surgery.recover.sources import Source

    common: dict[str, Any] = {"context": CONTEXT, "batch_tokens": STEP, "micro_tokens": STEP}
    losses = {"kl": 1.0} if taught else {"ce": 1.0}
    settings = Settings(losses=losses, precision="bfloat16", **common, **options)
    ask = Ask(
        student=str(student),
        data=(Source(text),),
        out=out,
        settings=settings,
        teacher=str(BASE) if taught else None,
        resume=False,
    )
    found = recover(ask, force=True)
    if found.out is None:
        sys.exit(Exit.INTERRUPTED)
    return int(found.told["parameters_trained"])


def new_model(out: Path, *, layers: int, seed: int) -> Path:
    """Write a model of the base's sizes with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(BASE)
    config.num_hidden_layers = layers
    shutil.rmtree(out, ignore_errors=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(out)
    return out


def by_command(*words: str) -> None:
    """Run the product's command."""
    subprocess.run([sys.executable, "-m", "surgery", *words], check=True, capture_output=True)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="stack,teacher,modes")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = [arm for arm in arms() if arm.experiment in args.only.split(",")]
    bench = Bench(args.work)
    found = [bench.found(arm, args.seeds) for arm in chosen]
    say(str(write_page(args.results, found, bench.before(), seeds=args.seeds)))


if __name__ == "__main__":
    main()
