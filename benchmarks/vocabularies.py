"""Two models of one width with large BPE vocabularies that overlap in part, for the benchmark."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WIDTH = 64
LETTERS = [chr(n) for n in (*range(33, 127), *range(161, 173), *range(174, 256))]
LETTERS += [chr(256 + n) for n in range(256 - len(LETTERS))]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def vocabulary(tokens: int, *, seed: int, shared: float) -> tuple[dict[str, int], list[list[str]]]:
    """Return ids and merges: a random chain of merges, the first part the same for every seed."""
    ids = {letter: number for number, letter in enumerate(LETTERS)}
    names, merges = list(ids), []
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    while len(ids) < tokens:
        rng = common if len(ids) < shared * tokens else own
        # The left part is any token, the right part a letter: short names, all different.
        left = names[int(rng.integers(len(names)))]
        right = LETTERS[int(rng.integers(len(LETTERS)))]
        if left + right not in ids:
            ids[left + right] = len(ids)
            names.append(left + right)
            merges.append([left, right])
    return ids, merges


def write(out: Path, tokens: int, *, seed: int, shared: float = 0.6, padding: int = 128) -> Path:
    """Write a one-layer Llama of that vocabulary and return its directory."""
    out.mkdir(parents=True, exist_ok=True)
    ids, merges = vocabulary(tokens, seed=seed, shared=shared)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": tokens + n, "content": token, "special": True, **flags}
        for n, token in enumerate(SPECIAL[: 2 + seed % 2])
    ]
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = {"type": "BPE", "vocab": ids, "merges": merges, "byte_fallback": False}
    document = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    document |= {"normalizer": None, "pre_tokenizer": level, "post_processor": None}
    document |= {"decoder": level, "model": model}
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False, indent=2))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0]}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    rows = tokens + len(added) + padding
    _weights(out, rows, tokens, seed)
    return out


def _weights(out: Path, rows: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    square, at = (WIDTH, WIDTH), "model.layers.0."
    tensors = {"model.embed_tokens.weight": some(rows, WIDTH), "lm_head.weight": some(rows, WIDTH)}
    tensors |= {f"{at}self_attn.{n}_proj.weight": some(*square) for n in "qkvo"}
    tensors |= {f"{at}mlp.{n}_proj.weight": some(*square) for n in ("gate", "up", "down")}
    norms = (f"{at}input_layernorm", f"{at}post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": some(WIDTH) for name in norms}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows}
    config |= {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "dtype": "float16"}
    config |= {"tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": tokens}
    (out / "config.json").write_text(json.dumps(config, indent=2))
