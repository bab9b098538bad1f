"""Write a synthetic Llama checkpoint of any depth: finite bf16 noise, the same bytes every time.

The default (hidden 2048, 16 layers, vocabulary 32000) has 701.6 M parameters, 1.403 GB in 3 shards.
"""

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20
Table = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of the model."""

    layers: int = 16
    hidden: int = 2048
    inner: int = 3072
    vocabulary: int = 32000
    heads: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """Which random bytes: `seed` makes the base, `tuned` (if any) moves it by N(0, sigma)."""

    seed: int = 0
    tuned: int | None = None
    sigma: float = 1e-3


def layer_tensors(shape: Shape, layer: int) -> Table:
    """Return names and shapes of one decoder layer."""
    prefix, h, i = f"model.layers.{layer}.", shape.hidden, shape.inner
    attention: Table = {f"self_attn.{p}_proj.weight": (h, h) for p in "qkvo"}
    mlp: Table = {"mlp.gate_proj.weight": (i, h), "mlp.up_proj.weight": (i, h)}
    norms: Table = {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}
    parts = attention | mlp | {"mlp.down_proj.weight": (h, i)} | norms
    return {prefix + name: size for name, size in parts.items()}


def tensors(shape: Shape) -> Table:
    """Return names and shapes of the whole model in layer order."""
    table: Table = {"model.embed_tokens.weight": (shape.vocabulary, shape.hidden)}
    for layer in range(shape.layers):
        table |= layer_tensors(shape, layer)
    table["model.norm.weight"] = (shape.hidden,)
    table["lm_head.weight"] = (shape.vocabulary, shape.hidden)
    return table


def nbytes(size: tuple[int, ...]) -> int:
    """Return the stored bytes of a bf16 tensor."""
    return 2 * int(np.prod(size, dtype=np.int64))


def checkpoint_bytes(shape: Shape) -> int:
    """Return the bytes of all tensors, headers left out."""
    return sum(map(nbytes, tensors(shape).values()))


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bf16, ties to even; inputs are finite."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(x: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widen bf16 bits to float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def values(name: str, count: int, noise: Noise) -> Iterator[NDArray[np.uint16]]:
    """Yield the bf16 bits of one tensor in chunks; they depend on name and seeds alone."""
    key = zlib.crc32(name.encode())
    base = np.random.default_rng([noise.seed, key])
    move = None if noise.tuned is None else np.random.default_rng([noise.tuned, key, 1])
    centre = np.float32("norm" in name)
    for start in range(0, count, CHUNK):
        n = min(CHUNK, count - start)
        bits = to_bf16(base.standard_normal(n, np.float32) * np.float32(0.02) + centre)
        if move is not None:
            step = move.standard_normal(n, np.float32) * np.float32(noise.sigma)
            bits = to_bf16(from_bf16(bits) + step)
        yield bits


def split(table: Table, shards: int) -> list[Table]:
    """Cut the table into `shards` runs of about equal bytes, in order."""
    total, done = sum(map(nbytes, table.values())), 0
    parts: list[Table] = [{} for _ in range(shards)]
    for name, size in table.items():
        parts[min(done * shards // total, shards - 1)][name] = size
        done += nbytes(size)
    return parts


def header(part: Table) -> bytes:
    """Return the length and JSON header of one shard."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in part.items():
        end = offset + nbytes(size)
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, part: Table, noise: Noise) -> None:
    """Stream one shard to disk."""
    with path.open("wb") as file:
        file.write(header(part))
        for name, size in part.items():
            for bits in values(name, nbytes(size) // 2, noise):
                file.write(bits.data)


def config(shape: Shape) -> dict[str, object]:
    """Return config.json of the model."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.hidden // shape.heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def generate(out: Path, *, shape: Shape, noise: Noise, shards: int = 3) -> int:
    """Write the checkpoint into the new directory `out` and return its tensor bytes."""
    out.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(split(tensors(shape), shards), 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_shard(out / file, part, noise)
        weight_map |= dict.fromkeys(part, file)
    total = checkpoint_bytes(shape)
    metadata = {"total_size": total, "total_parameters": total // 2}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")
    return total


def main() -> None:
    """Parse the command line and write one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=16, help="16 gives 1.40 GB, 67 gives 5.04 GB")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuned", type=int, metavar="SEED", help="the base moved by noise")
    parser.add_argument("--sigma", type=float, default=1e-3, help="size of that noise")
    args = parser.parse_args()
    noise = Noise(seed=args.seed, tuned=args.tuned, sigma=args.sigma)
    total = generate(args.out, shape=Shape(layers=args.layers), noise=noise, shards=args.shards)
    print(f"{args.out}: {total / 1e9:.3f} GB of tensors in {args.shards} shards")


if __name__ == "__main__":
    main()
