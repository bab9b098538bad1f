"""The dated page of `benchmarks.gpu_recovery`."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import table
from surgery.recover.meter import peak_of

Told = Mapping[str, Any]
NAMES = {"surgery": "surgery recover", "trainer": "Hugging Face Trainer", "trl": "TRL SFTTrainer"}
HEAD = ("settings", "tokens/s", "MFU, 4 N", "MFU, 6 N", "TFLOP/s, as done", "peak GB")


def page(
    day: str,
    machine: Mapping[str, str],
    shapes: Mapping[str, Told],
    results: Mapping[str, Sequence[Told]],
    *,
    missing: Sequence[str],
    steps: int,
) -> str:
    """Return the page; settings that failed are on it too."""
    said = "; ".join(f"{key} {value}" for key, value in machine.items())
    lines = [
        f"# Recovery on a GPU, {day}",
        "",
        f"{said}. Made by `python -m benchmarks.gpu_recovery`.",
    ]
    if machine["GPU"] == "none":
        lines += ["", "**No GPU: these numbers only show that the script works.**"]
    if missing:
        lines += ["", f"Not installed, and so left out: {', '.join(missing)}."]
    lines += [
        "",
        f"Tokens a second: rows times context over the median of {steps} steps, after the first "
        "ones. MFU is over the dense bfloat16 peak of the device, attention left out, with 4 N "
        "operations a token (frozen weights have no gradients) and with 6 N; N leaves out an "
        "embedding that is only looked up. Ours trains the norms beside LoRA.",
    ]
    for name, runs in results.items():
        lines += ["", f"## {name}", "", *_part(shapes[name], runs, machine["GPU"])]
    return "\n".join(lines) + "\n"


def _part(shape: Told, runs: Sequence[Told], gpu: str) -> list[str]:
    done = [run for run in runs if "failed" not in run]
    lines = [
        f"Llama of {shape['layers']} layers, width {shape['hidden']}, vocabulary "
        f"{shape['vocabulary']}, {shape['train']}; {shape['rows']} rows of {shape['context']} "
        "tokens a step.",
        "",
    ]
    best = {tool: max((r for r in done if r["tool"] == tool), key=lambda r: _speed(shape, r))
            for tool in NAMES if any(r["tool"] == tool for r in done)}  # fmt: skip
    rows = [
        (f"**{NAMES[tool]}** ({_settings(run)})", *_figures(shape, run, gpu))
        for tool, run in best.items()
    ]
    lines += ["Each tool at its best:", "", *table(HEAD, rows), ""]
    lines += _verdict(shape, best, gpu)
    every = [(f"{NAMES[r['tool']]}: {_settings(r)}", *_figures(shape, r, gpu)) for r in done]
    lines += ["", "All that was tried:", "", *table(HEAD, every)]
    lines += [
        f"- {NAMES[r['tool']]}, {_settings(r)}: failed ({r['failed']})"
        for r in runs
        if r not in done
    ]
    return lines


def _verdict(shape: Told, best: Mapping[str, Told], gpu: str) -> list[str]:
    if "surgery" not in best:
        return ["surgery recover did not run."]
    mine = _speed(shape, best["surgery"])
    said = [
        f"{mine / _speed(shape, run):.2f} times {NAMES[tool]}"
        for tool, run in best.items()
        if tool != "surgery"
    ]
    lines = [f"surgery recover: {', '.join(said)}."] if said else ["No peer was installed."]
    if shape["goal"] and peak_of(gpu):
        reached = _share(shape, best["surgery"], gpu, 4 if shape["train"] == "lora" else 6)
        lines[0] += f" Aimed at an MFU of {shape['goal']:.0%}, reached {reached:.1%}"
        fast = (
            f"; aimed at {shape['speed']:,.0f} tokens/s, reached {mine:,.0f}"
            if shape["speed"]
            else ""
        )
        lines[0] += f"{fast}."
    return lines


def _settings(run: Told) -> str:
    said = [f"{run['rows']} rows at once"]
    said += [name for name in ("compile", "liger", "checkpointing") if run[name]]
    return ", ".join(said)


def _speed(shape: Told, run: Told) -> float:
    tokens: float = shape["rows"] * shape["context"]
    return tokens / statistics.median(run["seconds"])


def _share(shape: Told, run: Told, gpu: str, each: int) -> float:
    peak = peak_of(gpu)
    assert peak is not None
    share: float = each * run["parameters"] * _speed(shape, run) / (peak * 1e12)
    return share


def _figures(shape: Told, run: Told, gpu: str) -> tuple[str, ...]:
    speed = _speed(shape, run)
    known = peak_of(gpu) is not None
    shares = [f"{_share(shape, run, gpu, each):.1%}" if known else "-" for each in (4, 6)]
    done = (4 if shape["train"] == "lora" else 6) * run["parameters"] * speed / 1e12
    return f"{speed:,.0f}", *shares, f"{done:.3g}", f"{run['peak_bytes'] / 1e9:.2f}"
