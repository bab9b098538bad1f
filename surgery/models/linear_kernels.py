"""Triton kernels of flash-linear-attention, where they compute what the torch forms compute.

They run for tensors on CUDA, where the package is installed. Rows of several documents, padding in
the rows at hand, and float64 have the torch forms: their semantics are the kernels' for one
document a row.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, k feature width, v value width.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .linear_core import State
from .linear_core import linear_attention as torch_attention
from .linear_delta import delta_rule as torch_delta
from .linear_fla import Given, checked
from .linear_seen import KERNELS

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
DEVICES = ("cuda",)  # where kernels run


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    *,
    kernels: str,
    state: State | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run `linear_core.linear_attention`, or the kernel that computes it.

    Args:
        kernels: `torch` or `fla`.
        q_docs: None says that all keys are of one document, or padding.

    Raises:
        ValueError: the kernel differs from the torch form, or the package lacks it.
    """
    given = Given(q, k, v, gate, None)
    if kernels == "torch" or q_docs is not None or not _runs(given):
        return torch_attention(q, k, v, gate, state=state, q_docs=q_docs, k_docs=k_docs)
    doc = q.new_zeros(len(q), dtype=torch.long) if state is None else state.doc.clamp(min=0)
    if k_docs is not None:
        doc = k_docs.amax(1) if state is None else torch.maximum(state.doc, k_docs.amax(1))
        away = (k_docs < 0)[:, None, None, :, None]
        # What lies in padding may be infinite, and no zero would mend that.
        k, v = k.masked_fill(away, 0), v.masked_fill(away, 0)
        gate = None if gate is None else gate.masked_fill(away, 0)
        given = Given(q, k, v, gate, None)
    out, sums = checked(given)(given, None if state is None else state.sums)
    return out, State(sums, doc)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    beta: Tensor,
    *,
    kernels: str,
    state: State | None = None,
    docs: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run `linear_delta.delta_rule`, or the kernel that computes it.

    Args:
        kernels: `torch` or `fla`.
        docs: None says that all tokens are of one document.

    Raises:
        ValueError: the kernel differs from the torch form, or the package lacks it.
    """
    given = Given(q, k, v, gate, beta)
    if kernels == "torch" or docs is not None or not _runs(given):
        return torch_delta(q, k, v, gate, beta, state=state, docs=docs)
    out, sums = checked(given)(given, None if state is None else state.sums)
    doc = q.new_zeros(len(q), dtype=torch.long) if state is None else state.doc.clamp(min=0)
    return out, State(sums, doc)


def use_kernels(model: nn.Module, name: str) -> None:
    """Choose what sums in linear layers, in memory alone; the first pass checks it.

    Args:
        model: a linearized model, or what wraps one.
        name: `torch`, or `fla` for the kernels of flash-linear-attention.

    Raises:
        ValueError: there is no such choice here.
    """
    if name not in KERNELS:
        raise ValueError(f"kernels: {name} is none of {', '.join(KERNELS)}")
    # By what they have: code that came with a checkpoint has classes of its own.
    mixers: list[Any] = [m for m in model.modules() if {"spec", "kernels"} <= {*dir(m)}]
    if not mixers:
        raise ValueError("kernels: the model has no linear layer")
    if name != "torch":
        where = {p.device.type for p in model.parameters()}
        if not where <= set(DEVICES):
            raise ValueError(f"kernels: {name} runs on CUDA, and the model is on {min(where)}")
        if not installed():
            raise ValueError("kernels: flash-linear-attention is not installed: add [fla]")
    for mixer in mixers:
        mixer.spec = {**mixer.spec, "kernels": name}


@lru_cache
def installed() -> bool:
    """Whether the kernels can be imported; without triton the package is there, and empty."""
    return all(find_spec(name) is not None for name in ("triton", "fla"))


def _runs(given: Given) -> bool:
    tensors = [x for x in given if x is not None]
    there = all(x.device.type in DEVICES and x.dtype != torch.float64 for x in tensors)
    return there and installed()
