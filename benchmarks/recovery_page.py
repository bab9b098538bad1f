"""The dated page of the recovery benchmark; what was lost is on it too."""

import datetime
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

from benchmarks.machine import describe
from benchmarks.recovery_arms import CONTEXT, HEALED_STEPS, ROWS, STEP, Found, token_flops
from benchmarks.report import table
from benchmarks.stack import commit

# 97.5% quantiles of Student's t, by degrees of freedom from 1.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
KEPT = ("CPU", "cores", "RAM", "kernel", "Python", "load at start (1, 5, 15 min)")
PACKAGES = ("torch", "transformers", "peft", "numpy")
Before = Mapping[str, float]


def difference(mine: Sequence[float], other: Sequence[float]) -> str:
    """Return the mean of paired differences with its 95% t-interval."""
    pairs = [a - b for a, b in zip(mine, other, strict=True)]
    mean, freedom = statistics.fmean(pairs), len(pairs) - 1
    if not 1 <= freedom <= len(QUANTILES):
        return f"{mean:+.4f}"
    half = QUANTILES[freedom - 1] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f})"


def values(bits: Sequence[float]) -> list[str]:
    """Return the mean, and the values by seed."""
    return [f"{statistics.fmean(bits):.4f}", " ".join(f"{one:.4f}" for one in bits)]


def write_page(folder: Path, found: Sequence[Found], before: Before, *, seeds: int) -> Path:
    """Write the page and return where it is."""
    today = datetime.datetime.now(tz=datetime.UTC).date()
    page = folder / f"{today}-recovery.md"
    parts = {"stack": stack_part, "teacher": teacher_part, "modes": modes_part}
    told = [head(today, seeds)]
    for name, part in parts.items():
        chosen = [one for one in found if one.arm.experiment == name]
        if chosen:
            told.append(part(chosen, before))
    told.append(sweep_part(found))
    page.write_text("\n\n".join(told) + "\n")
    return page


def head(today: datetime.date, seeds: int) -> str:
    """Return what was run, and on what."""
    machine = describe(Path.cwd())
    where = "; ".join(f"{key} {machine[key]}" for key in KEPT if key in machine)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"""# Recovery on the trained fixtures, {today}

`PYTHONPATH=. python -m benchmarks.recovery --work DIR --seeds {seeds}` at {commit()}. {where};
{packages}; one thread, bfloat16 autocast. The load was others' work: seconds are of CPU.

Bits per byte of fixtures/heldout/mix (64 documents that no model has seen), lower is better.
Trained on files of Python's standard library (the training split of fixtures/text.py), drawn and
ordered by the seed; steps of {ROWS} rows of {CONTEXT} tokens. A seed also sets random starts, LoRA
factors and halves; the damaged models, and the parent, are the same for all seeds. Intervals: 95%,
Student's t over paired differences by seed. Each line's learning rate is the best of a sweep on
seed 0, the same number of values for each line of a table, judged by other held-out text."""


def stack_part(found: Sequence[Found], _: Before) -> str:
    """Return the table of growing."""
    rows = []
    for one in found:
        depths = [int(one.arm.student) * 2**number for number in range(len(one.arm.steps))]
        flops = sum(
            3 * STEP * n * token_flops(d) for n, d in zip(one.arm.steps, depths, strict=True)
        )
        steps = " + ".join(f"{n} of {d} layers" for n, d in zip(one.arm.steps, depths, strict=True))
        name, bits = one.arm.name, one.bits[one.best]
        rows.append([name, steps, f"{flops / 1e12:.2f}", f"{one.best:g}", *values(bits)])
    stacked, *others = found
    lines = [
        f"- stacked - {other.arm.name}: "
        f"{difference(stacked.bits[stacked.best], other.bits[other.best])}"
        for other in others
    ]
    titles = ("model", "steps", "TFLOP", "learning rate", "mean", "by seed")
    return "\n\n".join(
        [
            "## Stacked and trained on, against the same depth from scratch",
            "Equal training FLOPs: three times the forward pass, attention and head counted. "
            "Random starts, not the fixtures' own. Cosine to 10%, warm-up 10% in each training, "
            "weight decay 0.1. The last line is the control: the shallow model on the same budget.",
            "\n".join(table(titles, rows)).rstrip(),
            "\n".join(lines),
        ]
    )


def teacher_part(found: Sequence[Found], before: Before) -> str:
    """Return the table of healing with and without the parent."""
    rows = []
    for taught, alone in zip(found[::2], found[1::2], strict=True):
        with_, without = (one.bits[one.best] for one in (taught, alone))
        name = taught.arm.student
        rows.append(
            [
                f"{name}",
                f"{before[name]:.4f}",
                f"{taught.best:g}",
                *values(with_),
                f"{alone.best:g}",
                *values(without),
                difference(with_, without),
            ]
        )
    titles = (
        "model", "before", "rate", "with teacher", "by seed", "rate", "without", "by seed",
        "with - without",
    )  # fmt: skip
    tokens = HEALED_STEPS * STEP
    return "\n\n".join(
        [
            "## With the teacher and without, at equal tokens",
            f"{tokens:,} tokens, `--train lora` (rank 64, norms too), the default schedule. The "
            f"parent, fixtures/base, has {before['base']:.4f}. With: KL to the parent. Without: "
            "cross-entropy on the same text. The teacher's forward pass comes on top.",
            "\n".join(table(titles, rows)).rstrip(),
        ]
    )


def modes_part(found: Sequence[Found], before: Before) -> str:
    """Return the tables of modes."""
    rows = []
    for one in found:
        default = one.arm.rates[0]
        rows.append(
            [
                one.arm.name,
                f"{one.trained:,}",
                f"{default:g}",
                *values(one.bits[default]),
                f"{one.best:g}",
                *values(one.bits[one.best]),
                f"{one.seconds:.0f}",
            ]
        )
    lines = [
        f"- {a.arm.name} - {b.arm.name}: at the defaults "
        f"{difference(a.bits[a.arm.rates[0]], b.bits[b.arm.rates[0]])}, "
        f"at the best {difference(a.bits[a.best], b.bits[b.best])}"
        for a, b in combinations(found, 2)
    ]
    titles = (
        "mode", "numbers trained", "default rate", "mean", "by seed", "best rate", "mean",
        "by seed", "CPU s",
    )  # fmt: skip
    student = found[0].arm.student
    return "\n\n".join(
        [
            "## What trains: norms, LoRA, full, half",
            f"The {student} model ({before[student]:.4f} before, the parent {before['base']:.4f}), "
            f"with the teacher, {HEALED_STEPS * STEP:,} tokens. LoRA has rank 64, with norms.",
            "\n".join(table(titles, rows)).rstrip(),
            "\n".join(lines),
        ]
    )


def sweep_part(found: Iterable[Found]) -> str:
    """Return every learning rate that was tried."""
    lines = [
        f"- {one.arm.experiment}, {one.arm.name}: "
        + ", ".join(f"{rate:g} {bits:.4f}" for rate, bits in sorted(one.swept.items()))
        for one in found
    ]
    title = "## The sweeps (seed 0, bits per byte of the text that rates were chosen by)"
    return "\n\n".join([title, "\n".join(lines)])
