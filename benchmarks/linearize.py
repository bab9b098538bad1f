"""What linearization keeps of the trained base: every method, several seeds, beside a bare window.

    PYTHONPATH=. python -m benchmarks.linearize --work DIR [--seeds 3] [--only lolcats,liger]

Each cell is `surgery linearize` by its Python API: convert fixtures/base with a window of 16
tokens, transfer, recover with LoRA, measure on held-out text, and probe recall: the tokens of
held-out documents that repeat one more than 64 tokens back, four windows away. Every figure is kept
in DIR as soon as it is there; the same command goes on. One thread.
"""

import argparse
import datetime
import json
import math
import random
import re
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.effects import BASE, TEXT
from benchmarks.machine import describe
from benchmarks.recovery_page import KEPT, difference
from benchmarks.report import table
from benchmarks.stack import HERE, commit, say

CONTEXT, ROWS, STEPS = 128, 16, 80
TOKENS = CONTEXT * ROWS * STEPS
WINDOW = 16
RATES = {"lr": 1e-3, "rank": 64}  # of LoRA on a model of a million parameters, in 80 steps
DOCUMENTS = 3000
WINDOWED = ("lolcats", "liger", "lizard", "based", "swa-sink")
RECALL = HERE.parent / "fixtures" / "heldout" / "recall.safetensors"


@dataclass(frozen=True, slots=True)
class Arm:
    """A line of the table: a method, and which layers stay as they are."""

    method: str
    keep: str | None = None

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.method}, softmax in {self.keep}" if self.keep else self.method

    @property
    def options(self) -> dict[str, int]:
        """Of the conversion."""
        return {"window": WINDOW} if self.method in WINDOWED else {}


ARMS = (
    *(Arm(name) for name in ("lolcats", "hedgehog", "t2r", "based", "lizard", "liger")),
    *(Arm(name) for name in ("gla", "gated-delta")),
    Arm("swa-sink"),
    *(Arm(name, "every:4") for name in ("swa-sink", "lolcats", "gated-delta")),
    Arm("lolcats", "kl:1"),
)


def write_text(path: Path, seed: int) -> None:
    """Write documents to train on: the base's own kinds, a third of them to recall."""
    from transformers import AutoTokenizer

    from fixtures.text import RECALL_KINDS, Recall, mix

    documents = mix().train
    found = AutoTokenizer.from_pretrained(BASE).get_vocab()
    words = sorted(t[1:] for t in found if re.fullmatch("Ġ[A-Za-z]{2,}", t))
    recall, chance = Recall(documents, words, seed=seed), random.Random(seed)
    with path.open("w") as file:
        for n in range(DOCUMENTS):
            if n % 3:
                one = chance.choice(documents)
                start = chance.randrange(max(len(one) - 400, 1))
                text = one[start : start + 400]
            else:
                text = recall.document(RECALL_KINDS[n // 3 % 3], gap_bytes=(0, 160)).text
            file.write(json.dumps({"text": text}) + "\n")


def recalled(model: Any) -> float:  # noqa: ANN401
    """Return the share of answers that rank first."""
    import torch
    from safetensors.torch import load_file

    held = load_file(RECALL)
    rows = held["rows"].long()
    with torch.inference_mode():
        best = model(rows[:, :-1], use_cache=False).logits.argmax(-1)
    asked = held["answers"][:, 1:].bool()
    return float((best == rows[:, 1:])[asked].float().mean())


def load(path: Path) -> Any:  # noqa: ANN401
    """Load with the installed class."""
    import torch
    from transformers import AutoModelForCausalLM

    from surgery.models.modeling_linearized import LinearizedForCausalLM

    stock = "mixer" not in json.loads((path / "config.json").read_text())
    kind: Any = AutoModelForCausalLM if stock else LinearizedForCausalLM
    return kind.from_pretrained(path, dtype=torch.float32).eval()


def run_cell(work: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """Linearize once; return the rows of its table, and what every model recalls."""
    from surgery.linearize.ask import Ask, Training, parse_stages
    from surgery.linearize.stages import linearize_in_stages
    from surgery.models.modeling_linearized import ablate
    from surgery.recover.sources import Source

    text, out = work / "text.jsonl", work / "out"
    write_text(text, seed)
    stages = parse_stages(None, arm.method)
    training = Training(
        tokens=TOKENS,
        transfer_tokens=TOKENS,
        context=CONTEXT,
        batch_tokens=CONTEXT * ROWS,
        **RATES,  # type: ignore[arg-type]
    )
    ask = Ask(
        model=str(BASE),
        out=out,
        method=arm.method,
        stages=stages,
        data=(Source(text),) if stages else (),
        keep_softmax=arm.keep,
        options=arm.options,
        training=training,
        held_out=(TEXT,),
        seed=seed,
        resume=False,
        keep_stages=True,
    )
    shutil.rmtree(ask.folder, ignore_errors=True)
    began = time.process_time()
    found = linearize_in_stages(ask, force=True)
    seconds = time.process_time() - began
    chosen = (ask.folder / "chosen.json").exists()  # the layers: transferred before that
    places = {"teacher": BASE, "untrained": ask.folder / ("untrained" if chosen else "converted")}
    places |= {stage: ask.folder / stage for stage in stages}
    if chosen:
        places["transfer"] = ask.folder / "kept"
    recall = {name: recalled(load(place)) for name, place in places.items()}
    final = load(out)
    ablate(final, linear_branch=False)
    recall["no linear branch"] = recalled(final)
    return {"rows": found.told["table"]["rows"], "recall": recall, "seconds": seconds}


def cells(work: Path, arm: Arm, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield the figures of every seed, made now or kept from before."""
    for seed in range(seeds):
        kept = work / "figures" / f"{arm.name} {seed}.json".replace(" ", "-").replace(",", "")
        if not kept.exists():
            found = run_cell(work, arm, seed)
            kept.parent.mkdir(exist_ok=True)
            kept.with_suffix(".part").write_text(json.dumps(found))
            kept.with_suffix(".part").replace(kept)
            told = {row["name"]: round(row["bits_per_byte"], 4) for row in found["rows"]}
            say(f"{arm.name}, seed {seed}, {found['seconds']:.0f} s: {told} {found['recall']}")
        yield json.loads(kept.read_text())


def bits(cell: dict[str, Any], name: str) -> float:
    """Return a row's bits per byte; a stage that there is not is what came before."""
    found = {row["name"]: row["bits_per_byte"] for row in cell["rows"]}
    order = ("untrained", "transfer", "lora")
    if name in order:
        came = [one for one in ("swa-sink", *order[: order.index(name) + 1]) if one in found]
        name = came[-1]
    return float(found.get(name, math.nan))


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Return a mean, a dash for nothing."""
    told = statistics.fmean(values)
    return "" if math.isnan(told) else f"{told:.{digits}f}"


def closed(cell: dict[str, Any], start: str) -> float:
    """Return the share of the gap between a row and the teacher that recovery closed."""
    teacher, begin = bits(cell, "teacher"), bits(cell, start)
    return (begin - bits(cell, "lora")) / (begin - teacher)


def write_page(folder: Path, found: dict[str, list[dict[str, Any]]], seeds: int) -> Path:
    """Write the dated page and return where it is."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    machine = describe(Path.cwd())
    where = "; ".join(f"{key} {machine[key]}" for key in KEPT if key in machine)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    names = ("untrained", "transfer", "lora", "no linear branch", "swa-sink")
    rows, recall, lines = [], [], []
    for name, row in found.items():
        cost = [[bits(cell, one) for cell in row] for one in names]
        shares = [mean([closed(cell, start) for cell in row], 2) for start in names[:1]]
        rows.append([name, *map(mean, cost), *shares, f"{row[0]['seconds']:.0f}"])
        probes = ("teacher", *names[:-1])
        kept = [[cell["recall"].get(one, math.nan) for cell in row] for one in probes]
        recall.append([name, *(mean(values, 2) for values in kept)])
        steps = [("transfer", "untrained"), ("lora", "transfer"), ("lora", "no linear branch")]
        steps.append(("lora", "swa-sink"))
        told = (
            f"{a} - {b} {difference(*([bits(cell, x) for cell in row] for x in (a, b)))}"
            for a, b in steps
            if {a, b} <= {one["name"] for one in row[0]["rows"]}
        )
        lines.append(f"- {name}: {'; '.join(told) or 'nothing is trained'}")
    first = next(iter(found.values()))[0]
    parts = [
        f"# Linearization of the trained base, {today}",
        f"`PYTHONPATH=. python -m benchmarks.linearize --work DIR --seeds {seeds}` at {commit()}. "
        f"{where}; {packages}; one thread, float32.",
        f"fixtures/base: 4 layers, contexts of {CONTEXT}, {bits(first, 'teacher'):.3f} bits per "
        f"byte on fixtures/heldout/mix, which nobody trained on. A window of {WINDOW} tokens "
        "(sinks among them) where the method has one. "
        f"Each stage: {TOKENS:,} tokens of the base's own kinds of text, LoRA of rank "
        f"{RATES['rank']} at {RATES['lr']:g}; a seed sets the text, its order and the random "
        "starts. Bits per byte, means over seeds, lower is better. `swa-sink` is the same window "
        "with 4 sinks, without any training, in the same layers; where the method has no window it "
        "is one of 64, half of what these texts have.",
        "\n".join(
            table(("method", *names, "of the untrained gap closed", "CPU s, seed 0"), rows)
        ).rstrip(),
        "## Differences by seed, with 95% t-intervals",
        "\n".join(lines),
        "## Recall: share of answers beyond 64 tokens that rank first",
        "\n".join(table(("method", "teacher", *names[:-1]), recall)).rstrip(),
    ]
    page = folder / f"{today}-linearize.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def main() -> None:
    """Linearize, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default=",".join(dict.fromkeys(arm.method for arm in ARMS)))
    parser.add_argument("--results", type=Path, default=HERE / "results")
    args = parser.parse_args()
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = [arm for arm in ARMS if arm.method in args.only.split(",")]
    found = {arm.name: list(cells(args.work, arm, args.seeds)) for arm in chosen}
    say(str(write_page(args.results, found, args.seeds)))


if __name__ == "__main__":
    main()
