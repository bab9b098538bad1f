"""How those who proposed a method recovered it: what `surgery linearize` does unless it is told.

The transfer stage has its own, in `surgery.linearize.transfer_ask`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from surgery.recover.settings import Schedule

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
TOKENS = 20_000_000  # of each stage: two epochs of 50,000 instructions
KD_RATE, FULL_RATE = 1e-5, 1e-5  # RADLADS, arXiv 2505.03005, steps 2 and 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Settings of a method's stages.

    Attributes:
        stages: what is done by default.
        transfers: whether something is there to transfer.
        lr: peak of LoRA.
        rank, alpha, targets: of LoRA, and the projections that it acts on.
        context, rows: tokens of a row, and rows of a step.
        schedule, warmup: of the learning rate; warm-up as a share of the steps.
        source: where it is from.
    """

    stages: tuple[str, ...] = ("transfer", "lora")
    transfers: bool = True
    lr: float = 1e-4
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = PROJECTIONS
    context: int = 1024
    rows: int = 8
    schedule: Schedule = "wsd"
    warmup: float = 0.0
    source: str


LOLCATS = "LoLCATs, arXiv 2410.10254, its code at 375df84"
# Deviations: the rate of LoLCATs falls by ten at a plateau of a held-out loss; here it is held and
# falls over the last fifth (wsd). AdamW's moments are (0.9, 0.95) in every recovery.
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "lolcats": Recipe(source=LOLCATS),
        "hedgehog": Recipe(source=f"as in {LOLCATS}"),
        "t2r": Recipe(source=f"as in {LOLCATS}"),
        "based": Recipe(source="ours, those of LoLCATs: Based was trained from random weights"),
        "liger": Recipe(
            stages=("lora",),
            transfers=False,
            lr=1e-3,
            alpha=8.0,
            targets=PROJECTIONS[:3],
            source="Liger, arXiv 2503.01496, its code at 0b364eb",
        ),
        "lizard": Recipe(
            lr=5e-4,
            targets=PROJECTIONS[:3],
            context=2048,
            schedule="cosine",
            warmup=0.1,
            source="Lizard, arXiv 2507.09025, section 5",
        ),
        "gla": Recipe(context=512, rows=32, source="RADLADS, step 1; LoRA ours"),
        "gated-delta": Recipe(context=512, rows=32, source="RADLADS, step 1; LoRA ours"),
        "swa-sink": Recipe(
            stages=(), transfers=False, source="arXiv 2608.28444: nothing is trained"
        ),
    }
)
