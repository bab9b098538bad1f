"""Every option of a recovery, checked before anything is loaded."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from surgery.anatomy import TEXT_SECTIONS
from surgery.errors import RecipeError

Train = Literal["lora", "full", "norms", "new", "half"]
Schedule = Literal["wsd", "cosine", "linear", "constant", "infinite", "rex", "power"]
Optimizer = Literal["adamw", "muon", "adamw8bit"]
Precision = Literal["float32", "bfloat16"]
Selecting = Literal["paser"]
Kernels = Literal["liger"]
LOSSES = ("ce", "kl", "rkl", "jsd", "tvd", "hidden_mse", "hidden_cos", "early_exit")
LONGEST = 2048  # tokens of a row by default
EARLY_EXIT = 0.1  # of every loop but the last (arXiv 2410.20672)
NEEDS_TEACHER = frozenset(LOSSES) - {"ce", "early_exit"}
FREE = frozenset({
    "save_steps", "save_seconds", "keep", "eval_steps", "micro_tokens", "checkpointing", "compile",
})  # fmt: skip
# Full fine-tuning at 2e-5; LoRA takes ten times that ("LoRA Without Regret"), norms are few.
LEARNING_RATES: Mapping[str, float] = {
    "lora": 2e-4, "full": 2e-5, "norms": 1e-3, "new": 1e-4, "half": 2e-5,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is healed. Units: tokens where not said otherwise.

    Attributes:
        train: what is trained.
        rank, lora_alpha, lora_init: of LoRA; alpha is the rank by default.
        include, exclude: parts of module names that LoRA takes or leaves.
        losses: weight by name; {"kl": 1} with a teacher, {"ce": 1} without, by default.
        temperature: of teacher and student in losses on logits.
        tokens: how many to train on, in whole rows and steps.
        context: tokens of a row.
        batch_tokens: tokens of an optimiser step, over all processes.
        micro_tokens: tokens fed at once by a process.
        lr: peak; by default what fits `train`.
        schedule: how it runs; `warmup` and `decay` are shares of the steps.
        floor: last learning rate as a share of the peak.
        optimizer, betas, weight_decay, clip: as their papers have them.
        replay: share of rows from the replay sources.
        seed: of the order, initialisations, halves.
        precision: what is computed in; masters and moments are float32.
        checkpointing: recompute layers in the backward pass.
        compile: compile the decoder layers one by one; None does so in long runs on a GPU.
        kernels: of another package, checked on the first batch.
        correct_teacher: tokens that the teacher is trained on first, by itself.
        select, select_share: which share of the documents is taken, and how; all by default.
        save_steps, save_seconds: how often to save; 0 never by that measure.
        keep: checkpoints kept.
        eval_steps: steps between measurements on held-out text; 0 only at both ends.
        spike: a step whose loss is above this times the running mean is skipped; 0 for none.
    """

    train: Train = "lora"
    rank: int = 64
    lora_alpha: float | None = None
    lora_init: str = "default"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    losses: Mapping[str, float] = field(default_factory=lambda: {"ce": 1.0})
    temperature: float = 1.0
    tokens: int = 10_000_000
    context: int = 2048
    batch_tokens: int = 65_536
    micro_tokens: int = 8192
    lr: float | None = None
    schedule: Schedule = "wsd"
    warmup: float = 0.02
    decay: float = 0.2
    floor: float = 0.0
    optimizer: Optimizer = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    replay: float = 0.05
    seed: int = 0
    precision: Precision | None = None
    checkpointing: bool = False
    compile: bool | None = None
    kernels: Kernels | None = None
    correct_teacher: int = 0
    select: Selecting | None = None
    select_share: float = 0.2
    save_steps: int = 0
    save_seconds: float = 600.0
    keep: int = 2
    eval_steps: int = 0
    spike: float = 4.0

    def __post_init__(self) -> None:
        """Refuse values that make no sense.

        Raises:
            RecipeError: one of them does not.
        """
        self._check_choices()
        self._check_numbers()
        self._check_losses()

    @property
    def peak(self) -> float:
        """The peak learning rate."""
        return LEARNING_RATES[self.train] if self.lr is None else self.lr

    @property
    def batch_rows(self) -> int:
        """Rows of an optimiser step."""
        return max(self.batch_tokens // self.context, 1)

    @property
    def steps(self) -> int:
        """Optimiser steps, the last one whole."""
        return max(math.ceil(self.tokens / (self.batch_rows * self.context)), 1)

    @property
    def on_logits(self) -> bool:
        """Whether the losses are those of a recovery."""
        return True

    @property
    def free(self) -> frozenset[str]:
        """Names of what may change while a run stands still: none of it changes what comes out."""
        return FREE

    @property
    def needs_teacher(self) -> bool:
        """Whether a loss compares with a teacher."""
        return any(name in NEEDS_TEACHER and weight for name, weight in self.losses.items())

    def as_dict(self) -> dict[str, Any]:
        """Return a plain table that JSON holds."""
        told = asdict(self)
        return {**told, "losses": dict(self.losses), "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Settings":
        """Return the settings that `as_dict` told."""
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in told.items() if name in known}
        for name in ("include", "exclude", "betas"):
            given[name] = tuple(given[name])
        return cls(**given)

    def _check_choices(self) -> None:
        for name, kind in (("train", Train), ("schedule", Schedule), ("optimizer", Optimizer)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known:
                fact = f"is none of {', '.join(known)}"
                raise RecipeError(f"--{name} {value}", fact)

    def _check_numbers(self) -> None:
        at_least = {"rank": 1, "tokens": 1, "context": 8, "batch_tokens": 8, "micro_tokens": 8}
        at_least["seed"] = 0
        for name, least in at_least.items():
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')} {getattr(self, name)}"
                raise RecipeError(option, f"is below {least}")
        shares = ("warmup", "decay", "floor", "replay", "weight_decay")
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                option = f"--{name.replace('_', '-')} {getattr(self, name):g}"
                raise RecipeError(option, "is outside 0 to 1")
        if self.warmup + self.decay > 1:
            fact = f"together with --decay {self.decay:g} is above 1"
            raise RecipeError(f"--warmup {self.warmup:g}", fact, "they are shares of the steps")
        if not 0 < self.select_share <= 1:
            fact = f"{self.select_share:g} of the documents is outside 0 to 1"
            raise RecipeError("--select-share", fact, "for instance 0.2")
        for name in ("save_steps", "save_seconds", "eval_steps", "correct_teacher"):
            if not getattr(self, name) >= 0:
                option = f"--{name.replace('_', '-')} {getattr(self, name):g}"
                raise RecipeError(option, "is below 0")
        if self.spike and not 1 < self.spike < math.inf:
            fact = "would skip steps that are not above the mean"
            raise RecipeError(f"--spike {self.spike:g}", fact, "give more than 1, or 0 for none")
        for name in ("lr", "lora_alpha", "temperature", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                option = f"--{name.replace('_', '-')} {value:g}"
                raise RecipeError(option, "is not a positive number")

    def _check_losses(self) -> None:
        for name, weight in self.losses.items():
            if name not in LOSSES:
                fact = f"is no loss; there are {', '.join(LOSSES)}"
                raise RecipeError(f"--loss {name}", fact)
            if not (weight >= 0 and math.isfinite(weight)):
                raise RecipeError(f"--loss {name}={weight:g}", "needs a weight of zero or more")
        if not any(self.losses.values()):
            raise RecipeError("--loss", "names no loss", "for instance kl=1 or ce=1")


def longest_context(config: Mapping[str, Any] | None) -> int | None:
    """Return how many tokens a model says that it reads; None where it does not say."""
    table = config or {}
    told = next((table[key] for key in TEXT_SECTIONS if isinstance(table.get(key), dict)), table)
    limit = told.get("max_position_embeddings")
    return limit if type(limit) is int and limit > 0 else None


def default_context(config: Mapping[str, Any] | None) -> int:
    """Return the tokens of a row where nobody says: what the model reads, at most 2048."""
    return min(longest_context(config) or LONGEST, LONGEST)


def parse_losses(text: str) -> dict[str, float]:
    """Parse `kl=1,hidden_cos=0.5`; a name alone counts 1, `early_exit` 0.1.

    Raises:
        RecipeError: a weight is no number.
    """
    found: dict[str, float] = {}
    for item in text.split(","):
        name, equals, number = item.strip().partition("=")
        try:
            plain = name.replace("-", "_")
            found[plain] = float(number) if equals else EARLY_EXIT if plain == "early_exit" else 1.0
        except ValueError as error:
            fact = f"{number!r} is not a number"
            raise RecipeError(f"--loss {item.strip()}", fact, "for instance kl=1") from error
    return found
