"""Tell a plan in figures, before it is run."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.plan import Plan
from surgery.preflight import Preflight


def describe(plan: Plan, out: Path, found: Preflight) -> dict[str, Any]:
    """Return what `--dry-run` shows, as a plain table."""
    work: dict[str, dict[str, int]] = {}
    for step in plan.steps:
        group = work.setdefault(step.why, {"steps": 0, "bytes_in": 0, "bytes_out": 0})
        group["steps"] += 1
        group["bytes_in"] += step.bytes_in
        group["bytes_out"] += step.bytes_out
    return {
        "operation": plan.operation,
        "parameters": dict(plan.parameters),
        "inputs": [source.ref for source in plan.sources],
        "output": str(out),
        "tensors": len(plan.order),
        "shards": len(found.layout.shards),
        "layer_map": ranges(plan.facts.get("layer_map", ())),
        "work": work,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "peak_memory": found.memory,
        "computes": any(not step.is_copy for step in plan.steps if step.inputs),
        "disk_needed": found.disk,
        "disk_free": found.free,
        "dropped": dict(Counter(plan.dropped.values())),
        "facts": dict(plan.facts),
        "notes": list(plan.notes),
    }


def ranges(layers: Sequence[int]) -> str:
    """Write layer numbers as ranges: 0-3,0-3."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
