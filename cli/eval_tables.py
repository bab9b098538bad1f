"""What `surgery eval` prints: a table of texts, then what was asked for beyond it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.evaluate import Difference, Divergence, Evaluation, Figures, ModelFigures
    from surgery.evaluate.tasks import Task, TaskFigures

_COLUMNS = (
    *("text", "model", "bits/byte", "change", "95% interval", "verdict"),
    *("KL mean", "KL p99", "top-1"),
)
_NUMBERS = (2, 3, 4, 6, 7, 8)
_BESIDE = (
    *("child", "parent", "ppl", "change", "95% interval", "verdict"),
    *("KL median", "KL p95", "KL p99", "logit RMS", "top-1"),
)
_SPEED = (
    *("model", "prefill tokens/s", "decode tokens/s", "prefill peak", "decode peak"),
    *("cache per token", "state"),
)
_TASKS = ("task", "metric", "model", "value", "change", "95% interval", "p (Holm)", "verdict")


def show(found: Evaluation, *, documents: bool) -> None:
    """Print the tables of an evaluation, and what a reader has to know to read them right."""
    render.table(_COLUMNS, _rows(found, documents=documents), numbers=_NUMBERS)
    for note in _notes(found):
        render.line(note, "dim")
    refs = [model.ref for model in found.models]
    names = dict(zip(refs, _short(refs), strict=True))
    for section in (_show_beside, _show_maps, _show_tasks, _show_speed, _show_samples, _show_gates):
        section(found, names)


def _rows(found: Evaluation, *, documents: bool) -> list[tuple[str, ...]]:
    """Return the cells of the table: one text after the other, the models in each."""
    by_model = [[*m.domains, *([m.overall] if m.domains[1:] else [])] for m in found.models]
    rows = _section(found, by_model)
    if documents:
        return _section(found, [m.per_document for m in found.models]) + rows
    return rows


def _section(found: Evaluation, by_model: Sequence[Sequence[Figures]]) -> list[tuple[str, ...]]:
    models = _short([model.ref for model in found.models])
    texts = _short([figures.name for figures in by_model[0]])
    return [
        ("" if number else text, name, *_cells(figures, parent=model.parent))
        for text, group in zip(texts, zip(*by_model, strict=True), strict=True)
        for number, (name, model, figures) in enumerate(
            zip(models, found.models, group, strict=True)
        )
    ]


def _cells(figures: Figures, *, parent: bool) -> tuple[str, ...]:
    bits = "-" if figures.bits_per_byte is None else f"{figures.bits_per_byte:.4f}"
    told = ("", "", "parent") if parent else _difference(figures.difference)
    return (bits, *told, *_divergence(figures.divergence))


def _difference(found: Difference | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    change = f"{found.bits_per_byte:+.4f}"
    return change, _interval(found.low, found.high), found.verdict


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{low:+.4f} {high:+.4f}"


def _divergence(found: Divergence | None) -> tuple[str, ...]:
    if found is None:
        return ("",) * 3
    return (_nats(found.mean), _nats(found.p99), f"{found.agreement:.1%}")


def _nats(value: float) -> str:
    return f"{value:.1e}" if 0 < value < 0.001 else f"{value:.4f}"  # noqa: PLR2004


def _notes(found: Evaluation) -> list[str]:
    """Return what a reader has to know to read the figures right."""
    overall = found.models[0].overall
    dtypes = ", ".join(dict.fromkeys(model.dtype for model in found.models))
    notes = [
        f"context {found.context}, stride {found.stride}, {dtypes} on {found.device}; "
        f"{overall.documents} document{'s'[: overall.documents > 1]}, {overall.bytes} bytes; "
        "KL in nats per token"
    ]
    said: dict[str, list[str]] = {}
    for model, name in zip(found.models, _short([m.ref for m in found.models]), strict=True):
        for note in _model_notes(model):
            said.setdefault(note, []).append(name)
    notes += [f"{', '.join(names)}: {note}" for note, names in said.items()]
    if any(d.difference and d.difference.low is None for m in found.models for d in m.domains):
        notes.append(f"a text of fewer than {_fewest()} documents has no interval")
    return notes


def _model_notes(model: ModelFigures) -> list[str]:
    notes = []
    if model.not_compared is not None:
        notes.append(f"no KL and top-1, {model.not_compared}")
    if model.mark == "none":
        notes.append("no beginning-of-sequence token, so a document's first token is not scored")
    if model.overall.unknown:
        lost, tokens = model.overall.unknown, model.overall.tokens
        notes.append(f"{lost} of {tokens} tokens are unknown ones, which flatters bits per byte")
    return notes


def _show_beside(found: Evaluation, names: dict[str, str]) -> None:
    """Print every child beside every parent, on all texts together."""
    rows = []
    for model in found.models:
        for against in model.against:
            ppl = model.overall.perplexity
            told = _difference(against.overall.difference)
            perplexity = "-" if ppl is None else f"{ppl:.4g}"
            seen = _apart(against.overall.divergence)
            rows.append((names[model.ref], names[against.ref], perplexity, *told, *seen))
    if rows:
        render.gap()
        render.table(_BESIDE, rows, numbers=(2, 3, 4, 6, 7, 8, 9, 10))


def _apart(found: Divergence | None) -> tuple[str, ...]:
    if found is None:
        return ("",) * 5
    nats = map(_nats, (found.median, found.p95, found.p99, found.logit_rms))
    return (*nats, f"{found.agreement:.1%}")


def _show_maps(found: Evaluation, names: dict[str, str]) -> None:
    """Print how far each layer is from that of the same number in the parent."""
    for model in found.models:
        for against in model.against:
            if against.weights is None:
                continue
            alike = against.similarity.diagonal if against.similarity else ()
            layers = {layer["layer"]: layer for layer in against.weights["layers"]}
            last = max([*layers, len(alike) - 2], default=-1)
            rows = [
                (number, *_weights(layers.get(number)), _cka(alike, number + 1))
                for number in range(last + 1)
            ]
            render.gap()
            title = f"{names[model.ref]} beside {names[against.ref]}, layer by layer"
            columns = ("layer", "relative L2", "cosine", "signs", "CKA")
            render.table(columns, rows, numbers=range(5), title=title)


def _weights(layer: dict[str, float | None] | None) -> tuple[str, ...]:
    keys = ("relative_l2", "cosine", "sign_agreement")
    values = [None if layer is None else layer[key] for key in keys]
    return tuple("-" if value is None else f"{value:.4f}" for value in values)


def _cka(alike: Sequence[float | None], place: int) -> str:
    value = alike[place] if place < len(alike) else None
    return "-" if value is None else f"{value:.4f}"


def _show_tasks(found: Evaluation, names: dict[str, str]) -> None:
    rows = [row for task in found.tasks for row in _task_rows(task, names)]
    if rows:
        render.gap()
        render.table(_TASKS, rows, numbers=(3, 4, 5, 6))


def _task_rows(task: Task, names: dict[str, str]) -> list[tuple[str, ...]]:
    rows = [_task_row(task, names[each.model], each) for each in task.models]
    for each in task.differences:
        p = "" if each.p_holm is None else f"{each.p_holm:.3g}"
        interval = _interval(each.low, each.high)
        title = f"{names[each.child]} - {names[each.parent]}"
        rows.append(("", "", title, "", f"{each.difference:+.4f}", interval, p, each.verdict))
    return [(task.name if i == 0 else "", *row[1:]) for i, row in enumerate(rows)]


def _task_row(task: Task, name: str, found: TaskFigures) -> tuple[str, ...]:
    interval = "" if found.low is None else f"{found.low:.4f} {found.high:.4f}"
    return (task.name, task.metric, name, f"{found.value:.4f}", "", interval, "", "")


def _show_speed(found: Evaluation, names: dict[str, str]) -> None:
    rows = []
    for model in found.models:
        if (s := model.speed) is not None:
            decode = "-" if s.decode_per_second is None else f"{s.decode_per_second:.1f}"
            sizes = (s.prefill_peak, s.decode_peak, s.cache_per_token, s.state_bytes)
            told = ["-" if size is None else render.size(size) for size in sizes]
            rows.append((names[model.ref], f"{s.prefill_per_second:.1f}", decode, *told))
    if rows:
        render.gap()
        render.table(_SPEED, rows, numbers=range(1, 7))


def _show_samples(found: Evaluation, names: dict[str, str]) -> None:
    """Print what each model writes behind one and the same prompt, one under the other."""
    for place, prompt in enumerate(found.models[0].samples):
        render.gap()
        render.line(f"{prompt.document}: {_one_line(prompt.prompt)}", "bold")
        told = [(names[m.ref], m.samples[place]) for m in found.models]
        render.pairs(
            [
                (name, f"{_repeats(sample.repetition)}  {_one_line(sample.text)}")
                for name, sample in told
            ]
        )


def _repeats(share: float | None) -> str:
    return "repeats -" if share is None else f"repeats {share:.0%}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_gates(found: Evaluation, _: dict[str, str]) -> None:
    if found.gates:
        render.gap()
    for each in found.gates:
        render.line(each.sentence)


def _short(names: Sequence[str]) -> list[str]:
    """Return last parts of paths where they tell them apart, else the paths as they are."""
    last = [Path(name).name or name for name in names]
    return [
        short if last.count(short) == 1 else name for short, name in zip(last, names, strict=True)
    ]


def _fewest() -> int:
    from surgery.evaluate.statistics import FEWEST_DOCUMENTS

    return FEWEST_DOCUMENTS
