"""Peak memory and time of losses on logits: in chunks, whole, and torch's own chunked form.

    python -m benchmarks.losses [--tokens N --width D --words V] [--dtype float32] [--device cuda]
                                [--page PAGE.md]

Every form runs in a process of its own: forward and backward pass, hidden states and head both
with gradients. Memory is what comes on top of inputs and weights: on a CPU the growth of the
resident high-water mark, on CUDA that of the allocator's. The value and the norms of the
gradients are printed beside it, so that forms can be seen to compute the same.
"""

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from benchmarks.machine import describe

FORMS = ("ce whole", "ce torch", "ce chunks", "kl whole", "kl chunks", "ce frozen", "kl top-64")
LIMIT = 900  # seconds of one form


def inputs(ask: argparse.Namespace) -> dict[str, Any]:
    """Return seeded states, weights and targets."""
    import torch

    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": getattr(torch, ask.dtype), "device": ask.device}
    n, d, v = ask.tokens, ask.width, ask.words
    return {
        "hidden": torch.randn(n, d, **kind).requires_grad_(),
        "weight": (torch.randn(v, d, **kind) / d**0.5).requires_grad_(),
        "theirs": torch.randn(n, d, **kind),
        "their_weight": torch.randn(v, d, **kind) / d**0.5,
        "targets": torch.randint(v, (n,), device=ask.device),
    }


def loss(form: str, given: dict[str, Any]) -> Any:  # noqa: ANN401 - torch is loaded late
    """Return the mean loss of one form."""
    import torch.nn.functional as F

    hidden, weight, targets = given["hidden"], given["weight"], given["targets"]
    if form == "ce torch":
        from torch.nn import LinearCrossEntropyOptions

        options = LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, weight, targets, options=options)
    if form == "ce whole":
        return F.cross_entropy((hidden @ weight.T).float(), targets)
    if form == "kl whole":
        mine = (hidden @ weight.T).float().log_softmax(-1)
        theirs = (given["theirs"] @ given["their_weight"].T).float().log_softmax(-1)
        return F.kl_div(mine, theirs, log_target=True, reduction="batchmean")
    return chunked(form, given)


def chunked(form: str, given: dict[str, Any]) -> Any:  # noqa: ANN401
    """Return the mean loss of one of our forms."""
    import torch

    from surgery.recover.heads import Head
    from surgery.recover.losses import Objective, TeacherHidden, TeacherTopK

    targets, teacher = given["targets"], None
    if form == "kl chunks":
        teacher = TeacherHidden(given["theirs"], Head(given["their_weight"]))
    if form == "kl top-64":
        words = given["weight"].shape[0]
        ids = torch.arange(64, device=targets.device).repeat(len(targets), 1) * (words // 64)
        logits = torch.zeros(ids.shape, device=targets.device)
        teacher = TeacherTopK(ids, logits, logits[:, 0] - 1)
    head = Head(given["weight"])
    head = head.detached() if form == "ce frozen" else head
    objective = Objective({form.split(maxsplit=1)[0]: 1.0})
    return objective(given["hidden"], head, targets, teacher).total / len(targets)


def once(form: str, ask: argparse.Namespace) -> dict[str, float]:
    """Run one form here, and return seconds, extra bytes and what it computed."""
    import torch

    given = inputs(ask)
    before = reset(ask.device)
    began = time.perf_counter()
    value = loss(form, given)
    value.backward()
    if ask.device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    extra = peak(ask.device) - before
    slopes = (given["hidden"].grad, given["weight"].grad)
    norms = [0.0 if s is None else float(s.double().norm()) for s in slopes]
    return {"seconds": took, "extra": extra, "loss": float(value.detach()),
            "hidden": norms[0], "head": norms[1]}  # fmt: skip


def reset(device: str) -> int:
    """Forget the high-water mark, and return the bytes held now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str) -> int:
    """Return the high-water mark in bytes."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def apart(form: str, options: list[str]) -> dict[str, float]:
    """Run one form in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.losses", *options, "--form", form]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def page(ask: argparse.Namespace, rows: dict[str, dict[str, float]]) -> str:
    """Return the table."""
    import torch

    whole = 4 * ask.tokens * ask.words / 1e6
    told = describe(Path(gettempdir()))
    kept = ("CPU", "cores", "RAM", "Python", "load at start (1, 5, 15 min)", "OMP_NUM_THREADS")
    where = [f"{key} {told[key]}" for key in kept if key in told]
    where += [torch.cuda.get_device_name()] if ask.device == "cuda" else []
    lines = [
        f"# Losses on logits, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"{ask.tokens} tokens, width {ask.width}, vocabulary {ask.words}, {ask.dtype}, on "
        f"{ask.device}; forward and backward. One matrix of logits in float32 is {whole:.0f} MB, "
        f"the gradient of the head {4 * ask.width * ask.words / 1e6:.0f} MB in float32.",
        "",
        f"{'; '.join(where)}; torch {torch.__version__}.",
        "",
        "Made by `python -m benchmarks.losses`.",
        "",
        "| form | extra peak, MB | seconds | loss | norm of dX | norm of dW |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {form} | {r['extra'] / 1e6:.0f} | {r['seconds']:.2f} | {r['loss']:.6f} "
        f"| {r['hidden']:.6g} | {r['head']:.6g} |"
        for form, r in rows.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one form, or all of them in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--words", type=int, default=65536)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--page", type=Path)
    ask = parser.parse_args()
    if ask.form:
        sys.stdout.write(json.dumps(once(ask.form, ask)) + "\n")
        return
    names = ("tokens", "width", "words", "dtype", "device")
    options = [word for name in names for word in (f"--{name}", str(getattr(ask, name)))]
    text = page(ask, {form: apart(form, options) for form in FORMS})
    sys.stdout.write(text)
    if ask.page:
        ask.page.write_text(text)


if __name__ == "__main__":
    main()
