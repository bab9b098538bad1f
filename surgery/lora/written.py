"""The adapter_config.json and the names of tensors that peft reads."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from surgery.checkpoint.adapters import PREFIX

HEADED = ("LMHeadModel", "ForCausalLM")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def key(module: str, part: str, *, embedding: bool = False) -> str:
    """Return the name under which a factor is stored; `part` is A or B."""
    stem = f"{PREFIX}{module}.lora_"
    return f"{stem}embedding_{part}" if embedding else f"{stem}{part}.weight"


def make_config(
    ranks: Mapping[str, int],
    *,
    base: str | None,
    task: str | None,
    fan_in_fan_out: bool = False,
    whole: Iterable[str] = (),
    biases: bool = False,
    tied: bool = False,
) -> dict[str, Any]:
    """Return a config under which every module's scale is 1: alpha is the rank.

    Args:
        ranks: by module; the most frequent is the default, the others are patterns.
        base: what peft loads the base from.
        task: peft's name of what the model is for.
        whole: modules that the adapter holds whole.
        biases: it holds biases of factorised modules too.
        tied: the base's head is its embedding, and stays so.
    """
    counts = Counter(ranks.values())
    rank = max(counts, key=lambda r: (counts[r], r))
    pattern = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "lora_only" if biases else "none",
        "ensure_weight_tying": tied,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_modules": list(ranks),
        "modules_to_save": list(whole) or None,
    }


def task_of(config: Mapping[str, Any] | None) -> str | None:
    """Return peft's name of a model's task."""
    names = (config or {}).get("architectures") or ()
    return "CAUSAL_LM" if any(str(name).endswith(HEADED) for name in names) else None
