"""Pairs of tiny bare checkpoints, how to compare them, and what the figures of a pair must be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cli.main import main
from surgery.checkpoint import open_checkpoint
from surgery.comparing import compare

FIGURES = ("relative_l2", "cosine", "sign_agreement", "norm_ratio", "max_abs", "equal")


def write(path, tensors):
    """A bare checkpoint; `tensors` by name."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


def differ(a, b, **options):
    return compare(open_checkpoint(a), open_checkpoint(b), **options)


def naive(a, b):
    """The definitions, in float64, over whole tensors."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    norm_x, norm_y = np.sqrt(np.sum(x * x)), np.sqrt(np.sum(y * y))
    return {
        "relative_l2": np.sqrt(np.sum((y - x) ** 2)) / norm_x,
        "cosine": np.sum(x * y) / (norm_x * norm_y),
        "sign_agreement": np.mean(np.sign(x) == np.sign(y)),
        "norm_ratio": norm_y / norm_x,
        "max_abs": np.max(np.abs(y - x)),
        "equal": np.mean(x == y),
    }


def assert_close(figures, expected):
    for name in FIGURES:
        assert getattr(figures, name) == pytest.approx(expected[name], rel=1e-12, abs=1e-14), name


def layered(seed=0, *, layers=3, noise=0.0, dtype=torch.float32):
    """A tiny model with two modules a layer, an embedding and a norm."""
    rng, jitter = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    made = {"model.embed_tokens.weight": torch.randn(8, 4, generator=rng)}
    for n in range(layers):
        made[f"model.layers.{n}.self_attn.q_proj.weight"] = torch.randn(4, 4, generator=rng)
        made[f"model.layers.{n}.mlp.experts.0.up.weight"] = torch.randn(6, 4, generator=rng)
        made[f"model.layers.{n}.mlp.experts.1.up.weight"] = torch.randn(6, 4, generator=rng)
    made["model.norm.weight"] = torch.ones(4)
    return {name: _moved(name, tensor, noise, jitter).to(dtype) for name, tensor in made.items()}


def _moved(name, tensor, noise, jitter):
    moves = "layers.1." in name or "embed" in name
    return tensor + noise * torch.randn(tensor.shape, generator=jitter) if moves else tensor


def parent_and_child(tmp_path):
    """A model, and one in which the embedding and layer 1 have moved."""
    a = write(tmp_path / "parent.safetensors", layered())
    return a, write(tmp_path / "child.safetensors", layered(noise=0.1))


def make_strangers(tmp_path):
    """Two files that share little: other layers, another shape, another dtype, integers, NaN."""
    a, b = layered(layers=2), layered(layers=60)
    a |= {"count": torch.tensor([1]), "wild": torch.tensor([float("nan")])}
    b |= {
        "count": torch.tensor([2]),
        "wild": torch.tensor([1.0]),
        "model.norm.weight": torch.ones(5),
    }
    a["lm_head.weight"], b["lm_head.weight"] = torch.ones(8, 4), torch.ones(8, 4).bfloat16() * 2
    b |= {f"extra{n}": torch.zeros(1) for n in range(30)}
    paths = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    return write(paths[0], a), write(paths[1], b)


def shown(capsys, *arguments):
    """What a successful command prints."""
    capsys.readouterr()
    assert main(["diff", *map(str, arguments)]) == 0
    return capsys.readouterr().out
