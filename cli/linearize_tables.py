"""What `surgery linearize` prints: the plan, and what the linearization cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import render
from surgery.checkpoint import open_checkpoint
from surgery.linearize.ask import TRANSFER, Ask
from surgery.linearize.table import BASELINE, TEACHER, UNTRAINED, from_dicts
from surgery.linearize.telling import NOT_TRAINED
from surgery.plan import Plan

if TYPE_CHECKING:
    from surgery.linearize.stages import Outcome

HEADINGS = (
    "model", "bits/byte", "more than the teacher", "KL, nats", "same top token",
    f"closed of {BASELINE}", f"closed of {UNTRAINED}",
)  # fmt: skip
NOT_MEASURED = "nothing was measured: name text that nothing trains on with --held-out"


def show_outcome(found: "Outcome", ask: Ask, *, as_json: bool) -> None:
    """Print what came out: losses, layers, the table, the state."""
    if as_json:
        render.print_json({"output": str(found.out), **found.told})
        return
    for told in found.told["stages"]:
        losses = [loss for _, loss in told.get("losses", ()) if loss is not None]
        if losses:
            render.line(f"{told['stage']:<9} loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    chosen = found.told.get("chosen")
    if chosen:
        layers = ", ".join(map(str, chosen["layers"]))
        render.line(f"kept      softmax attention in {layers}, which cost most")
    _show_table(found.told.get("table"))
    _show_state(found.told)
    render.line(f"{found.out}  {ask.method}, {', '.join(ask.stages) or 'not trained'}")


def _show_table(told: Mapping[str, Any] | None) -> None:
    if told is None:
        render.line(NOT_MEASURED, "dim")
        return
    rows = [
        (
            f"{row.name} ({Path(told['model']).name})" if row.name == TEACHER else row.name,
            f"{row.bits_per_byte:.4f}",
            _between(row.more, row.low, row.high, "+.4f"),
            _number(row.kl, ".4f"),
            _number(row.agreement, ".1%"),
            *(
                _between(s.share, s.low, s.high, ".0%") if (s := row.closed.get(start)) else "-"
                for start in (BASELINE, UNTRAINED)
            ),
        )
        for row in from_dicts(told["rows"])
    ]
    render.table(HEADINGS, rows, numbers=range(1, len(HEADINGS)))
    texts = ", ".join(Path(text).name for text in told["texts"])
    render.line(f"on {texts}; 95% intervals, paired over documents", "dim")


def _between(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if low is None or high is None:
        return _number(value, form)
    return f"{_number(value, form)} [{low:{form}}, {high:{form}}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _show_state(told: Mapping[str, Any]) -> None:
    render.line(
        f"state     {render.size(told['state_bytes'])} a row, however long; softmax attention kept "
        f"{render.size(told['kv_bytes_per_token'])} a token: less from {told['break_even']} tokens"
    )


def show_ask(ask: Ask, plan: Plan, *, as_json: bool) -> None:
    """Print what would be done: layers, new parameters, bytes, state, stages."""
    config = open_checkpoint(ask.model).config
    stages = [{"stage": s, **_stage_told(ask.settings(s, config), ask, s)} for s in ask.stages]
    if as_json:
        told = {"output": str(ask.out), "run": str(ask.folder), "stages": stages}
        render.print_json(
            {**told, "tensors": len(plan.order), "bytes": plan.bytes_out, **plan.facts}
        )
        return
    facts = plan.facts
    render.line(f"output    {ask.out}" + (f", the stages in {ask.folder}" if stages else ""))
    linear = ", ".join(map(str, facts["linear_layers"]))
    render.line(f"layers    {linear} become linear ({ask.method})")
    if ask.measured:
        render.line(f"          but the {ask.measured} of them that cost most, measured then")
    render.line(f"writes    {len(plan.order)} tensors, {render.size(plan.bytes_out)}")
    for told in stages:
        size = f"{told['steps']} steps of {told['rows']} rows of {told['context']}"
        trains = f"trains {told['trains']}, learning rate {told['lr']:g}"
        render.line(f"{told['stage']:<9} {size}, {trains}")
    for note in plan.notes:
        if not stages or note != NOT_TRAINED:
            render.line(f"note      {note}")
    if not ask.held_out:
        render.line(NOT_MEASURED.replace("was", "will be"), "dim")
    render.line("nothing was written (--dry-run)", "dim")


def _stage_told(settings: Any, ask: Ask, stage: str) -> dict[str, Any]:  # noqa: ANN401
    trains = "what is new" if stage == TRANSFER else settings.train
    if settings.train == "lora":
        names = ", ".join(settings.include)
        trains = f"LoRA of rank {settings.rank}, alpha {settings.lora_alpha:g}, on {names}"
    return {
        "trains": trains,
        "lr": settings.peak,
        "steps": settings.steps,
        "rows": settings.batch_rows,
        "context": settings.context,
        "teacher": ask.model if stage in {TRANSFER, "kd"} else None,
    }
