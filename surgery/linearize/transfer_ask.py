"""What a transfer is asked for; nothing heavy is loaded to check it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError
from surgery.linearize.config import check_config, is_linearized
from surgery.linearize.methods import Method, method_of
from surgery.recover.ask import Ask, check_ask
from surgery.recover.settings import FREE, Schedule, Settings, Train

TRANSFER, ATTENTION = "transfer", "attention"
WEIGHTED = ("lolcats", "hedgehog", "t2r")  # outputs are sums of values with weights that sum to 1
# LoLCATs for feature maps; Lizard where gates, or projections of the base, train.
LEARNING_RATES: Mapping[str, float] = {"lizard": 1e-3, "gla": 1e-3, "gated-delta": 1e-3}
FEATURES = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSettings(Settings):
    """How a transfer is run; the fields are those of a recovery.

    Batches are scaled by their own variance, so that `micro_tokens` counts for
    what comes out. By default 20 million tokens in rows of 1024, 8 rows a step (LoLCATs), AdamW,
    cosine after a tenth of the steps (Lizard), clipped in each layer by itself.
    """

    train: Train = "new"
    losses: Mapping[str, float] = field(default_factory=lambda: {TRANSFER: 1.0})
    tokens: int = 20_000_000
    context: int = 1024
    batch_tokens: int = 8192
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    compile: bool | None = False

    @property
    def on_logits(self) -> bool:
        """No: on the outputs of attention."""
        return False

    @property
    def free(self) -> frozenset[str]:
        """What may change while a run stands still."""
        return FREE - {"micro_tokens"}

    @property
    def attention_weight(self) -> float:
        """Of the cross-entropy of attention weights."""
        return self.losses.get(ATTENTION, 0.0)

    @classmethod
    def of(cls, told: Settings, *, rate: float, attention_weight: float) -> "TransferSettings":
        """Return settings whose steps are made as others tell.

        Args:
            rate: the peak where they name none.
        """
        losses = {TRANSFER: 1.0, **({ATTENTION: attention_weight} if attention_weight else {})}
        given = {f.name: getattr(told, f.name) for f in fields(told)}
        own = {"train": "new", "losses": losses, "checkpointing": False, "compile": False}
        return cls(**(given | own | {"lr": rate if told.lr is None else told.lr}))

    def _check_losses(self) -> None:
        """Nothing to check: `of` makes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferAsk(Ask):
    """What is to be transferred: from softmax attention to the mixers of the same layers.

    Attributes:
        student: a linearized checkpoint, untrained. It holds its own teacher: the projections.
        settings: what trains and the losses are those of a transfer, whatever these say; without
            `lr` the method's own is taken.
        attention_weight: of the cross-entropy of attention weights beside the relative error.
        blocks: layers in memory at once, hidden states between them on disk; None for all.
    """

    settings: Settings = field(default_factory=TransferSettings)
    attention_weight: float = 0.0
    blocks: int | None = None


def check_transfer(ask: TransferAsk, *, force: bool = False) -> TransferAsk:
    """Refuse an ask that cannot be met, before torch is loaded; return it with settings in full.

    Args:
        force: a model that stands at the output may be replaced.

    Raises:
        RecipeError, CheckpointError, PlanError: as `check_ask`; the student is not linearized, or
            has nothing to transfer.
    """
    if ask.blocks is not None and ask.blocks < 1:
        raise RecipeError(f"--blocks {ask.blocks}", "is below 1", "it counts layers")
    if ask.blocks is not None and os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("--blocks", "runs in one process", "leave torchrun out, or --blocks")
    if ask.teacher is not None or ask.cache is not None:
        fact = "is not asked: a linearized model holds the attention that it had"
        raise RecipeError("--teacher", fact, "leave it out")
    method = transferable(open_checkpoint(ask.student))
    weight = ask.attention_weight
    if not 0 <= weight < math.inf:
        raise RecipeError(f"--attention-weight {weight:g}", "is no weight", "give zero or more")
    if weight and method.name not in WEIGHTED:
        fact = f"compares attention weights, and those of {method.name} are not defined"
        raise RecipeError("--attention-weight", fact, f"only {', '.join(WEIGHTED)} have them")
    rate = LEARNING_RATES.get(method.name, FEATURES)
    settings = TransferSettings.of(ask.settings, rate=rate, attention_weight=weight)
    full = replace(ask, settings=settings)
    check_ask(full, force=force)
    return full


def transferable(student: Checkpoint) -> Method:
    """Return the method of a linearized checkpoint that has something to train.

    Raises:
        RecipeError: it is no linearized one, or its method trains nothing in the transfer stage.
        CheckpointError: its config is broken.
    """
    if not is_linearized(student):
        fact = "is not linearized, so that there is nothing to transfer to"
        raise RecipeError(student.ref, fact, "convert it first: surgery linearize --stage none")
    method = method_of(str(check_config(student)["mixer"].get("method")))
    found = any(".self_attn.mixer." in name for name in student.tensors)
    if not found and not method.projections:
        fact = f"has no parameters that a transfer would train: {method.name} adds none"
        raise RecipeError(student.ref, fact, "go on with --stage lora or full")
    return method
