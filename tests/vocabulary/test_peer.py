"""The same `tokenizer` blocks with mergekit 0.1.5: every token's row agrees, ids may differ.

SURGERY_PEER_VENV names its virtualenv.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parent))
import speakers

from surgery.recipe import compile, parse_recipe
from surgery.run import run

VENV = os.environ.get("SURGERY_PEER_VENV")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not VENV, reason="SURGERY_PEER_VENV names no virtualenv"),
]
SPECIAL = {
    "fox": ("<|end|>", "<|a|>"),
    "sums": ("<|b|>", "<|end|>", "<|pad|>"),
    "renard": ("<|end|>", "<|c|>"),
}
ZERO = {"kind": "zero"}


def token(model: str, **told: Any) -> dict[str, Any]:
    return {"kind": "model_token", "model": model, **told}


CASES: dict[str, Any] = {
    "union": {"source": "union"},
    "base": {"source": "base"},
    "a named model": {"source": "sums"},
    "single tokens": {
        "source": "union",
        "tokens": {
            "<|b|>": {"source": "sums"},
            "Ġthe": {"source": "sums", "force": True},
            "<|c|>": {"source": token("fox", token="!")},
            "Ġlazy": {"source": token("sums", token_id=7), "force": True},
            "<|pad|>": {"source": ZERO},
            "Ġnumbers": {"source": ZERO, "force": True},
        },
    },
}


def placed(told: Any, folder: Path) -> Any:
    """The same block with the models' names turned into paths."""
    if isinstance(told, dict):
        return {key: placed(value, folder) for key, value in told.items()}
    return str(folder / told) if isinstance(told, str) and told in SPECIAL else told


@pytest.mark.parametrize("with_base", [True, False], ids=["with a base", "without"])
@pytest.mark.parametrize("case", CASES)
def test_every_tokens_row_agrees(case: str, with_base: bool, tmp_path: Path) -> None:
    if case == "base" and not with_base:
        pytest.skip("the peer takes whichever model comes first that day")
    for name, special in SPECIAL.items():
        speakers.speaker(tmp_path, name, special)
    weights = zip(SPECIAL, (0.5, 0.25, 0.25), strict=True)
    document = {
        "merge_method": "linear",
        "dtype": "float32",
        "models": [
            {"model": str(tmp_path / name), "parameters": {"weight": weight}}
            for name, weight in weights
        ],
        "tokenizer": placed(CASES[case], tmp_path),
    }
    document |= {"base_model": str(tmp_path / "fox")} if with_base else {}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    run(compile(parse_recipe(document)), tmp_path / "ours")
    command = [f"{VENV}/bin/mergekit-yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "theirs")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    ours, theirs = (tables(tmp_path / name) for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        assert table.keys() == theirs[name].keys()
        for text, row in table.items():
            np.testing.assert_allclose(row, theirs[name][text], rtol=1e-6, err_msg=text)


def tables(made: Path) -> dict[str, dict[str, np.ndarray]]:
    """The rows of embedding and head by token."""
    document = json.loads((made / "tokenizer.json").read_text())
    ids = dict(document["model"]["vocab"])
    ids |= {entry["content"]: entry["id"] for entry in document["added_tokens"]}
    stored = load_file(made / "model.safetensors")
    return {
        name: {text: stored[name][number] for text, number in ids.items()}
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
