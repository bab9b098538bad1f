"""Recipes: what to merge and how, from YAML, flags or Python, compiled to a plan.

from surgery.recipe import compile, merge_models
from surgery.run import run

recipe = merge_models("ties", ["./math", "./code"], base="./base", density=0.5, weight=1)
run(compile(recipe), "merged")
"""

from surgery.recipe.build import merge_models
from surgery.recipe.compile import Compiled, compile, compile_recipe
from surgery.recipe.explain import explain
from surgery.recipe.parse import load_recipe, load_recipes, parse_recipe
from surgery.recipe.schema import Recipe, TokenizerChoice, TokenSource

__all__ = [
    "Compiled",
    "Recipe",
    "TokenSource",
    "TokenizerChoice",
    "compile",
    "compile_recipe",
    "explain",
    "load_recipe",
    "load_recipes",
    "merge_models",
    "parse_recipe",
]
