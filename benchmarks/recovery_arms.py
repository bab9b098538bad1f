"""The ways to train that the recovery benchmark compares, and what became of them."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.effects import BASE, FIXTURES

CONTEXT, ROWS = 128, 16
STEP = CONTEXT * ROWS  # tokens
GROWN_STEPS, HEALED_STEPS = 150, 48
GROWN_RATES, HEALED_RATES = (1e-3, 2e-3, 4e-3), (3e-4, 1e-3, 3e-3)
MULTIPLES = (1, 10, 50)  # of a mode's default
GROWN: Mapping[str, Any] = {
    "train": "full", "schedule": "cosine", "floor": 0.1, "warmup": 0.1, "weight_decay": 0.1,
}  # fmt: skip
CALIBRATED = ("--calibration", str(FIXTURES / "heldout" / "recall.jsonl"))
DAMAGED: Mapping[str, tuple[str, ...]] = {
    "pruned": ("prune", "--method", "block-influence", "--layers", "1", *CALIBRATED),
    "tied": ("recurse tie", "--blocks", "2", "--init", "average"),
    "relaxed": ("recurse relax", "--blocks", "2", "--rank", "16"),
    "sparse": ("sparsify", "--method", "magnitude", "--sparsity", "0.6"),
}
MODES = ("norms", "lora", "full", "half")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train.

    Attributes:
        student: of DAMAGED, or a number of layers with random weights.
        steps: of one training, or of two with a stacking to twice the depth between them.
        rates: peak learning rates to choose from.
        taught: by the base, with KL; else cross-entropy on the text.
        options: further settings of the recovery.
    """

    experiment: str
    name: str
    student: str
    steps: tuple[int, ...]
    rates: tuple[float, ...]
    taught: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text_bytes(self) -> int:
        """Text that there is to train on: hardly any row comes twice."""
        return 3 * STEP * sum(self.steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What became of an arm.

    Attributes:
        swept: bits per byte of the text to choose by, for each learning rate, on the first seed.
        bits: bits per byte of the held-out text, for each learning rate that was taken, by seed.
    """

    arm: Arm
    swept: dict[float, float]
    bits: dict[float, list[float]]
    trained: int
    seconds: float

    @property
    def best(self) -> float:
        """The learning rate that was chosen."""
        return min(self.swept, key=self.swept.__getitem__)


def arms() -> Iterator[Arm]:
    """Yield every way to train."""
    grown: dict[str, Any] = {"experiment": "stack", "rates": GROWN_RATES, "options": GROWN}
    scratch, alone = equal_steps()
    yield Arm(name="stacked", student="2", steps=(GROWN_STEPS, GROWN_STEPS), **grown)
    yield Arm(name="from scratch", student="4", steps=(scratch,), **grown)
    yield Arm(name="shallow alone", student="2", steps=(alone,), **grown)
    for student in DAMAGED:
        for taught in (True, False):
            name = f"{student}, {'with' if taught else 'without'} teacher"
            yield Arm(
                experiment="teacher",
                name=name,
                student=student,
                steps=(HEALED_STEPS,),
                rates=HEALED_RATES,
                taught=taught,
            )
    from surgery.recover.settings import LEARNING_RATES

    for mode in MODES:
        yield Arm(
            experiment="modes",
            name=mode,
            student="sparse",
            steps=(HEALED_STEPS,),
            rates=tuple(LEARNING_RATES[mode] * n for n in MULTIPLES),
            taught=True,
            options={"train": mode},
        )


def token_flops(layers: int) -> int:
    """Return operations of a token's forward pass: matrices, attention over a whole row, head."""
    config = json.loads((BASE / "config.json").read_text())
    width, inner = config["hidden_size"], config["intermediate_size"]
    layer = 2 * (4 * width * width + 3 * width * inner) + 4 * CONTEXT * width
    return layers * layer + 2 * width * int(config["vocab_size"])


def equal_steps() -> tuple[int, int]:
    """Return steps of four layers, and of two, that cost what the stacked model costs."""
    budget = GROWN_STEPS * (token_flops(2) + token_flops(4))
    return round(budget / token_flops(4)), round(budget / token_flops(2))
