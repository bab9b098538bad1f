"""Recipes on small models: written as YAML and compiled, and models of constant weights."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

from safetensors.torch import load_file

from surgery.recipe import Compiled, compile_recipe, parse_recipe
from surgery.recipe.reader import parse_documents

WIDE, LAYERS, TOKENS = 4, 5, 7
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (TOKENS, WIDE),
    **{
        f"model.layers.{n}.{rest}": shape
        for n in range(LAYERS)
        for rest, shape in {
            "self_attn.q_proj.weight": (WIDE, WIDE),
            "mlp.up_proj.weight": (2 * WIDE, WIDE),
            "input_layernorm.weight": (WIDE,),
        }.items()
    },
    "model.norm.weight": (WIDE,),
    "lm_head.weight": (TOKENS, WIDE),
}


def compiled(text: str) -> Compiled:
    """Compile the one recipe in a text."""
    (document,) = parse_documents(dedent(text), source="recipe.yml")
    return compile_recipe(parse_recipe(document))


def numbers(found: Compiled, parameter: str) -> dict[str, object]:
    """What each tensor gets of a parameter."""
    return {
        name: choice.value
        for name, choices in found.choices.items()
        for choice in choices
        if choice.parameter.name == parameter
    }


def told(path: Path) -> dict[str, float]:
    """The one number in each tensor."""
    found = {}
    for name, tensor in load_file(path).items():
        assert (tensor == tensor.flatten()[0]).all(), name
        found[name] = round(float(tensor.flatten()[0]), 5)
    return found
