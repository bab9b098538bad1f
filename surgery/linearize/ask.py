"""What a linearization is asked for; nothing heavy is loaded to check it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError
from surgery.linearize.convert import linearize
from surgery.linearize.keep import measured_layers
from surgery.linearize.methods import check_options, method_of
from surgery.linearize.numbers import check_context, check_numbers
from surgery.linearize.published import FULL_RATE, KD_RATE, RECIPES, TOKENS, Recipe
from surgery.linearize.transfer_ask import (
    ATTENTION,
    FEATURES,
    LEARNING_RATES,
    WEIGHTED,
    TransferSettings,
)
from surgery.plan import Plan
from surgery.preflight import check_place
from surgery.recover.readable import check_readable
from surgery.recover.settings import Precision, Settings, default_context
from surgery.recover.sources import Source

Stage = Literal["transfer", "lora", "full", "kd"]
Kd = Literal["full", "lora"]
TRANSFER: Stage = "transfer"
NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the stages train; None is what was published for the method (`RECIPES`).

    Attributes:
        tokens, transfer_tokens, kd_tokens: of a stage; `tokens` of lora or full.
        lr, transfer_lr, kd_lr: peaks.
        context: tokens of a row, at most what the model reads by default.
        batch_tokens, micro_tokens: tokens of a step, and tokens fed at once.
        rank, lora_alpha: of LoRA.
        kd: what distillation trains.
        attention_weight: of the cross-entropy of attention weights beside the transfer's error.
        blocks: layers that the transfer stage trains at a time, hidden states kept on disk; None
            for all at once.
        save_steps: saves between those by time; 0 for none.
    """

    tokens: int = TOKENS
    transfer_tokens: int = TOKENS
    kd_tokens: int = TOKENS
    lr: float | None = None
    transfer_lr: float | None = None
    kd_lr: float = KD_RATE
    context: int | None = None
    batch_tokens: int | None = None
    micro_tokens: int = 8192
    rank: int | None = None
    lora_alpha: float | None = None
    kd: Kd = "full"
    attention_weight: float = 0.0
    blocks: int | None = None
    precision: Precision | None = None
    checkpointing: bool = False
    save_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is linearized, how, and with what it is trained.

    Attributes:
        model: a checkpoint with softmax attention.
        out: where the result goes; `OUT.surgery-run` beside it holds the stages.
        stages: in their order; none leaves the converted model.
        keep_softmax: see `surgery.linearize.keep`, or `kl:N`.
        options: of the method and its conversion: window, sinks, feature_dim, feature_map, sliding.
        held_out: text that is only measured.
        resume: go on where a stage stopped.
        keep_stages: keep the models between the stages.
    """

    model: str
    out: Path
    method: str
    stages: tuple[Stage, ...] = ()
    data: tuple[Source, ...] = ()
    keep_softmax: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Training = Training()
    held_out: tuple[Path, ...] = ()
    device: str = "cpu"
    seed: int = 0
    resume: bool = True
    keep_stages: bool = False

    @property
    def folder(self) -> Path:
        """Where the stages run."""
        return self.out.with_name(f"{self.out.name}.surgery-run")

    @property
    def recipe(self) -> Recipe:
        """What was published for the method."""
        return RECIPES[self.method]

    @property
    def measured(self) -> int | None:
        """How many layers are chosen by what their conversion costs; None where they are told."""
        return measured_layers(self.keep_softmax)

    def conversion(self, keep: str | None) -> dict[str, Any]:
        """Return what `linearize` is given beside the model."""
        asked = {"method": self.method, "keep_softmax": keep, "seed": self.seed}
        return asked | dict(self.options)

    def convert(self, base: Checkpoint) -> Plan:
        """Plan the model before it is trained; every layer is converted where they are measured."""
        keep = None if self.measured is not None else self.keep_softmax
        return linearize(base, **self.conversion(keep))

    def settings(self, stage: Stage, config: Mapping[str, Any] | None) -> Settings:
        """Return how a stage trains.

        Args:
            config: of the model, which says how much it reads.

        Raises:
            RecipeError: a setting makes no sense.
        """
        asked, recipe = self.training, self.recipe
        context = asked.context or min(recipe.context, default_context(config))
        common: dict[str, Any] = {
            "context": context,
            "batch_tokens": asked.batch_tokens or recipe.rows * context,
            "micro_tokens": asked.micro_tokens,
            "seed": self.seed,
            "precision": asked.precision,
            "save_steps": asked.save_steps,
        }
        if stage == TRANSFER:
            return self._transfer(common)
        lora = stage == "lora" or (stage == "kd" and asked.kd == "lora")
        rates = {"lora": asked.lr or recipe.lr, "full": asked.lr or FULL_RATE, "kd": asked.kd_lr}
        return Settings(
            train="lora" if lora else "full",
            rank=asked.rank or recipe.rank,
            lora_alpha=self._alpha if lora else None,
            include=recipe.targets if lora else (),
            losses={"kl": 1.0} if stage == "kd" else {"ce": 1.0},
            tokens=asked.kd_tokens if stage == "kd" else asked.tokens,
            lr=rates[stage],
            schedule=recipe.schedule,
            warmup=recipe.warmup,
            checkpointing=asked.checkpointing,
            **common,
        )

    def _transfer(self, common: Mapping[str, Any]) -> TransferSettings:
        asked, weight = self.training, self.training.attention_weight
        return TransferSettings(
            losses={TRANSFER: 1.0, **({ATTENTION: weight} if weight else {})},
            tokens=asked.transfer_tokens,
            lr=asked.transfer_lr or LEARNING_RATES.get(self.method, FEATURES),
            **common,
        )

    @property
    def _alpha(self) -> float:
        """The published ratio of alpha to rank, whatever the rank."""
        asked, recipe = self.training, self.recipe
        if asked.lora_alpha is not None:
            return asked.lora_alpha
        return recipe.alpha / recipe.rank * (asked.rank or recipe.rank)


def parse_stages(text: str | None, method: str) -> tuple[Stage, ...]:
    """Parse `transfer,lora`, `none`; None is what was published for the method.

    Raises:
        RecipeError: a stage that there is not, twice, out of order, or that the method cannot have.
    """
    recipe = RECIPES[method_of(method).name]
    if text is None:
        return recipe.stages  # type: ignore[return-value]
    named = [part.strip() for part in text.split(",")]
    if named == [NONE]:
        return ()
    known = get_args(Stage)
    place = f"--stage {text}"
    strange = next((name for name in named if name not in known), None)
    if strange is not None:
        fact = f"names {strange!r}, which is none of {', '.join(known)}"
        raise RecipeError(place, fact, "or none alone: --stage none")
    if [name for name in known if name in named] != named:
        fact = f"is not in the order of {', '.join(known)}, each once"
        raise RecipeError(place, fact, "for instance transfer,lora")
    if {"lora", "full"} <= set(named):
        raise RecipeError(place, "recovers twice, by lora and by full", "take one of them")
    if TRANSFER in named and not recipe.transfers:
        fact = f"has nothing to transfer: --method {method} has no new parameters"
        raise RecipeError(place, fact, "leave the transfer out")
    return tuple(named)  # type: ignore[arg-type]


def check_ask(ask: Ask, *, force: bool = False) -> Plan:
    """Refuse an ask that cannot be met, before torch is loaded; return the untrained model's plan.

    Args:
        force: a model that stands at the output may be replaced.

    Raises:
        RecipeError, PlanError, CheckpointError: with the reason.
    """
    check_options(method_of(ask.method), _own_options(ask))
    _check_stages(ask)
    check_numbers(ask.training)
    base = open_checkpoint(ask.model)
    plan = ask.convert(base)
    _check_measured(ask, plan)
    check_context(ask.training, ask.model, base.config)
    for stage in ask.stages:
        ask.settings(stage, base.config)
    check_place(ask.out, plan.sources, bare=False, force=force)
    check_readable(ask.data, ask.held_out)
    return plan


def _own_options(ask: Ask) -> dict[str, Any]:
    return {name: value for name, value in ask.options.items() if name != "sliding"}


def _check_stages(ask: Ask) -> None:
    if ask.stages and not ask.data:
        fact = f"trains ({', '.join(ask.stages)}), and there is no text to train on"
        remedy = "name it with --data, or convert alone with --stage none"
        raise RecipeError("surgery linearize", fact, remedy)
    if not ask.stages and ask.data:
        raise RecipeError("--data", "is read by no stage", "leave it out, or name a --stage")
    if ask.measured is not None and TRANSFER not in ask.stages:
        fact = "measures layers after the transfer stage, and there is none"
        remedy = "list the layers, or add it: --stage transfer"
        raise RecipeError(f"--keep-softmax {ask.keep_softmax}", fact, remedy)
    told = ask.training
    if TRANSFER not in ask.stages:
        if told.blocks is not None:
            raise RecipeError("--blocks", "is of the transfer stage, and there is none")
        if told.attention_weight:
            raise RecipeError("--attention-weight", "is of the transfer stage, and there is none")
    if told.blocks is not None and told.blocks < 1:
        raise RecipeError(f"--blocks {told.blocks}", "is no number of layers", "for instance 9")
    if told.attention_weight and ask.method not in WEIGHTED:
        fact = f"compares attention weights, and those of {ask.method} are not defined"
        raise RecipeError("--attention-weight", fact, f"only {', '.join(WEIGHTED)} have them")
    if not 0 <= told.attention_weight < float("inf"):
        place = f"--attention-weight {told.attention_weight:g}"
        raise RecipeError(place, "is no weight", "give zero or more")
    if ask.stages and os.environ.get("WORLD_SIZE", "1") != "1":
        fact = "runs its stages in one process"
        remedy = "transfer alone, then run surgery recover under torchrun"
        raise RecipeError("surgery linearize", fact, remedy)


def _check_measured(ask: Ask, plan: Plan) -> None:
    """Refuse to keep no layer, or all of those that are converted."""
    if ask.measured is None:
        return
    layers = len(plan.facts["linear_layers"])
    if not 0 < ask.measured < layers:
        fact = f"keeps {ask.measured} of the {layers} layers that are converted"
        raise RecipeError(f"--keep-softmax {ask.keep_softmax}", fact, f"1 to {layers - 1} can be")
