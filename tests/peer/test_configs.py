"""Every form of configuration that mergekit 0.1.5 documents, run by both on the same files.

In float32 with methods whose arithmetic agrees, so that a difference is one of reading the file.
"""

import os
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from cli.main import main

VENV = os.environ.get("SURGERY_PEER_VENV")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not VENV, reason="SURGERY_PEER_VENV names no virtualenv"),
]
SCRIPT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for path in sys.argv[1:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(open(path)))
    run_merge(config, path + ".out", MergeOptions(copy_tokenizer=False, write_model_card=False))
"""

CONFIGS = {
    "models with weights": """
        models:
          - model: ./one
            parameters:
              weight: 1.0
          - model: ./two
            parameters:
              weight: 0.3
        merge_method: linear
        dtype: float32
    """,
    "gradients by filter": """
        slices:
          - sources:
              - model: ./base
                layer_range: [0, 6]
              - model: ./one
                layer_range: [0, 6]
        merge_method: slerp
        base_model: ./base
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: float32
    """,
    "a frankenmerge": """
        slices:
          - sources:
            - model: ./one
              layer_range: [0, 4]
          - sources:
            - model: ./two
              layer_range: [2, 6]
        merge_method: passthrough
        dtype: float32
    """,
    "a scale by slice and filter": """
        slices:
          - sources:
            - model: ./one
              layer_range: [0, 3]
              parameters:
                scale:
                  - filter: o_proj
                    value: 0.0
                  - filter: down_proj
                    value: 0.5
                  - value: 1.0
          - sources:
            - model: ./one
              layer_range: [2, 6]
        merge_method: passthrough
        dtype: float32
    """,
    "empty parameters": """
        models:
          - model: ./one
            parameters:
              weight: [1.0, 0.8, 0.5]
          - model: ./two
            parameters:
              weight: [0.2, 0.8, 0.1]
        merge_method: task_arithmetic
        base_model: ./base
        parameters:
        dtype: float32
    """,
    "a base in the list": """
        models:
          - model: ./base
          - model: ./one
            parameters: {weight: 0.5}
          - model: ./two
            parameters: {weight: -0.25}
        merge_method: task_arithmetic
        base_model: ./base
        parameters: {lambda: 0.5, int8_mask: true, normalize: false}
        dtype: float32
    """,
    "a base that is averaged in": """
        models:
          - model: ./one
          - model: ./two
        merge_method: linear
        base_model: ./base
        parameters: {weight: 1}
        dtype: float32
    """,
    "values by slice": """
        slices:
          - sources:
              - {model: ./one, layer_range: [0, 2], parameters: {weight: 0.9}}
              - {model: ./two, layer_range: [4, 6]}
            parameters: {weight: [0.2, 0.4]}
          - sources:
              - {model: ./base, layer_range: [2, 6]}
              - {model: ./two, layer_range: [2, 6]}
        merge_method: linear
        parameters: {weight: [0.1, 1e-1, "5e-1"], normalize: true}
        dtype: float32
    """,
    "a base of each slice": """
        slices:
          - sources: [{model: ./base, layer_range: [0, 3]}, {model: ./one, layer_range: [0, 3]}]
            base_model: ./base
          - sources: [{model: ./two, layer_range: [3, 6]}, {model: ./one, layer_range: [3, 6]}]
            base_model: ./two
        merge_method: task_arithmetic
        parameters: {weight: 0.5}
        dtype: float32
    """,
    "a module": """
        modules:
          default:
            slices:
              - sources:
                  - {model: ./one, layer_range: [0, 6]}
            parameters: {scale: 2}
        merge_method: passthrough
        parameters: {scale: 3}
        dtype: float32
    """,
    "a model as a table": """
        models:
          - model: {model: {path: ./one}}
            parameters: {weight: 1}
          - model: ./two
            parameters: {weight: "0.5"}
        merge_method: linear
        parameters: {normalize: "off"}
        dtype: torch.float32
        base_model: {model: ./one}
    """,
    "another dtype for the output": """
        models: [{model: ./one}, {model: ./two}]
        merge_method: linear
        parameters: {weight: 1}
        dtype: float32
        out_dtype: bfloat16
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three models of six layers, and every configuration with mergekit's output."""
    root = tmp_path_factory.mktemp("configs")
    for seed, name in enumerate(("base", "one", "two")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=6, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=20, tie_word_embeddings=False,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(root / name)
    files = []
    for number, text in enumerate(CONFIGS.values()):
        files.append(f"{number}.yml")
        (root / files[-1]).write_text(dedent(text))
    command = [str(Path(VENV or "") / "bin/python"), "-c", SCRIPT, *files]
    subprocess.run(command, cwd=root, check=True, timeout=600, capture_output=True)
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_means_the_same_to_both(name, folder, monkeypatch, tmp_path):
    number = list(CONFIGS).index(name)
    monkeypatch.chdir(folder)
    assert main(["run", f"{number}.yml", "-o", str(tmp_path / "out")]) == 0
    found, wanted = (
        load_file(path / "model.safetensors")
        for path in (tmp_path / "out", folder / f"{number}.yml.out")
    )
    assert found.keys() == wanted.keys()
    for tensor, values in found.items():
        assert values.dtype == wanted[tensor].dtype
        torch.testing.assert_close(values, wanted[tensor], rtol=1e-5, atol=1e-6)
