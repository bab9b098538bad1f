"""Quantise tensors the slow and obvious way, and what the result stands for in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from surgery.checkpoint import read_rows, rows_of
from surgery.compute import stored_reader
from surgery.plan import Plan, Step, TensorSpec
from surgery.slices import Sources

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def spread(scale, shape, block=(1, 1)):
    """Repeat scales until they cover a matrix, in float64."""
    rows, columns = shape
    high, wide = (-(-rows // scale.shape[0]), -(-columns // scale.shape[1]))
    high, wide = (block[0] or high), (block[1] or wide)
    full = np.repeat(np.repeat(scale, high, axis=0), wide, axis=1)
    return full[:rows, :columns]


def pack_bits(values, bits):
    """Pack unsigned integers of a matrix into 32-bit words along the rows, lowest bits first."""
    rows, columns = values.shape
    words = -(-columns * bits // 32)
    packed = np.zeros((rows, words), dtype=np.uint32)
    for row in range(rows):
        for column in range(columns):
            word, at = divmod(column * bits, 32)
            packed[row, word] |= np.uint32(int(values[row, column]) << at)
    return torch.from_numpy(packed.view(np.int32).copy())


def fp4_of(nibbles):
    """The numbers that nibbles stand for."""
    table = np.array(FP4 + [-value for value in FP4])
    return table[nibbles]


def pack_nibbles(nibbles):
    """Two nibbles a byte along the last axis, the lower one first."""
    return torch.from_numpy((nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).astype(np.uint8))


def checkpoint_of(folder: Path, tensors, quantisation=None, **config):
    """A directory with these tensors and a config that tells of their quantisation."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"model_type": "llama", "num_hidden_layers": 1, **config}
    if quantisation is not None:
        whole["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(whole))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def read_all(checkpoint, *, step: int | None = None):
    """Every tensor of a checkpoint as it is read, in runs of `step` rows."""
    found = {}
    with Sources([checkpoint]) as sources:
        read = stored_reader(sources)
        for name, tensor in checkpoint.tensors.items():
            rows = rows_of(tensor)
            size = step or max(rows, 1)
            parts = [
                read_rows(read, tensor, at, min(size, rows - at)) for at in range(0, rows, size)
            ]
            found[name] = torch.cat(parts).reshape(tensor.shape)
    return found


def writing_plan(checkpoint):
    """The plan that writes a checkpoint out as it is."""
    steps = tuple(
        Step(
            inputs=(tensor,),
            outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),),
            why="write",
        )
        for name, tensor in checkpoint.tensors.items()
    )
    return Plan(
        operation="test",
        parameters={},
        sources=(checkpoint,),
        steps=steps,
        order=tuple(checkpoint.tensors),
        config=checkpoint.config,
        carried=checkpoint.carried,
    )
