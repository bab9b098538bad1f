"""What a recipe may say of models, tokenizers, templates and seeds."""

import pytest

from surgery.errors import RecipeError
from surgery.recipe import TokenSource, merge_models, parse_recipe


def parsed(**more):
    return parse_recipe({"merge_method": "linear", "models": ["a", "b"], **more})


REFERENCES = {
    "text": ("org/name", "org/name"),
    "a revision": ("org/name@main", "org/name@main"),
    "an adapter": ("./base+./adapter", "./base+./adapter"),
    "a table": ({"model": {"path": "org/name"}}, "org/name"),
    "a table of all": (
        {"model": {"path": "org/name", "revision": "v1"}, "lora": {"path": "org/lora"}},
        "org/name@v1+org/lora",
    ),
    "a table of text": ({"model": "org/name"}, "org/name"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_model_is_named_as_the_peer_names_it(name):
    given, wanted = REFERENCES[name]
    for recipe in (
        parsed(base_model=given),
        parse_recipe({"merge_method": "linear", "models": [{"model": given}]}),
    ):
        assert recipe.models[0] == wanted


def test_models_are_listed_once_the_donor_first():
    recipe = parsed(
        base_model="c",
        tokenizer={"source": "d", "tokens": {"<x>": {"source": "e"}, "<y>": {"source": "a"}}},
    )
    assert recipe.donor == "c"
    assert recipe.models == ("c", "a", "b", "d", "e")


TOKENIZERS = {
    "a word": ("union", "union", {}),
    "a model": ("./a", "./a", {}),
    "a table": ({"source": "base"}, "base", {}),
    "the union by default": ({"pad_to_multiple_of": 64}, "union", {}),
    "tokens": (
        {
            "tokens": {
                "<a>": {"source": "x"},
                "<b>": {"source": {"kind": "model_token", "model": "x", "token": "<c>"}},
                "<c>": {"source": {"kind": "model_token", "model": "x", "token_id": 7}},
                "<d>": {"source": {"kind": "zero"}, "force": True},
                "<e>": {"source": {"model": {"path": "x"}}},
                "<f>": {"force": True},
            }
        },
        "union",
        {
            "<a>": TokenSource(kind="model", model="x"),
            "<b>": TokenSource(kind="model_token", model="x", token="<c>"),
            "<c>": TokenSource(kind="model_token", model="x", token_id=7),
            "<d>": TokenSource(kind="zero", force=True),
            "<e>": TokenSource(kind="model", model="x"),
            "<f>": TokenSource(force=True),
        },
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_chosen_in_each_form(name):
    given, source, tokens = TOKENIZERS[name]
    found = parsed(tokenizer=given).tokenizer
    assert (found.source, found.tokens) == (source, tokens)


def test_the_older_key_chooses_a_tokenizer_too():
    assert parsed(tokenizer_source="union").tokenizer.source == "union"


REFUSED = {
    "both keys": ({"tokenizer": "union", "tokenizer_source": "base"}, "are both given"),
    "an unknown key": ({"tokenizer": {"sorce": "union"}}, "did you mean 'source'?"),
    "padding of nothing": ({"tokenizer": {"pad_to_multiple_of": 0}}, "no whole number above 0"),
    "a list of tokens": ({"tokenizer": {"tokens": ["<a>"]}}, "no table of tokens"),
    "a token's text": ({"tokenizer": {"tokens": {"<a>": "x"}}}, "write {source: MODEL}"),
    "a kind": (
        {"tokenizer": {"tokens": {"<a>": {"source": {"kind": "one"}}}}},
        "'one' is no kind; write model_token or zero",
    ),
    "a token and its number": (
        {
            "tokenizer": {
                "tokens": {
                    "<a>": {
                        "source": {"kind": "model_token", "model": "x", "token": "b", "token_id": 1}
                    }
                }
            }
        },
        "either token or token_id",
    ),
    "a forced word": (
        {"tokenizer": {"tokens": {"<a>": {"source": "x", "force": "yes"}}}},
        "neither true nor false",
    ),
    "a number as tokenizer": ({"tokenizer": 3}, "is no table; write for instance {source: union}"),
    "a template": ({"chat_template": 3}, "chat_template: is no text"),
    "a seed": ({"seed": -1}, "seed: -1 is no seed"),
    "a name": ({"name": ""}, "name: is no text"),
    "a model that is a number": ({"base_model": 3}, "names no model"),
    "an architecture": (
        {"base_model": {"model": "x", "override_architecture": "Llama"}},
        "not supported, and not needed",
    ),
    "a table without a path": ({"base_model": {"model": {"revision": "v1"}}}, "names no path"),
    "models as a table": ({"models": {"a": 1}}, "models: is no list"),
    "a source without a model": ({"models": [{"parameters": {}}]}, "models[0]: names no model"),
    "a list as source": ({"models": [["a"]]}, "models[0]: is no table"),
    "parameters as a list": ({"parameters": [1]}, "parameters: is no table of parameters"),
    "an empty list": ({"parameters": {"weight": []}}, "weight: is an empty list"),
    "nothing as value": ({"parameters": {"weight": None}}, "weight: has no value"),
    "an entry without a value": ({"parameters": {"weight": {"filter": "x"}}}, "has no value"),
    "filters among numbers": ({"parameters": {"weight": [{"value": 1}, 2]}}, "mixes filters"),
    "lists in a list": ({"parameters": {"weight": [[1]]}}, "neither a value nor a list"),
    "an empty filter": (
        {"parameters": {"weight": {"filter": {"glob": "a", "regex": "b"}, "value": 1}}},
        "filter: is no filter",
    ),
    "modules as a list": ({"models": None, "modules": [1]}, "modules: is no table of modules"),
    "a module of nothing": ({"models": None, "modules": {"default": {}}}, "none of models, slices"),
    "a slice without sources": ({"models": None, "slices": [{}]}, "slices[0]: has no sources"),
    "a slice without a range": (
        {"models": None, "slices": [{"sources": [{"model": "a"}]}]},
        "layer_range: is missing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_its_place(name):
    more, wanted = REFUSED[name]
    with pytest.raises(RecipeError) as caught:
        parsed(**more)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_peer_takes_and_ignores_is_told():
    recipe = parse_recipe(
        {
            "merge_method": "passthrough",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 1]}], "residual_weight": 0.5}
            ],
        }
    )
    assert recipe.notes == ("slices[0].residual_weight: is accepted and changes nothing",)


def test_python_gives_one_value_for_each_model_as_a_list():
    recipe = merge_models("linear", ["a", "b"], weight=[0.25, [0, 1]], normalize=False)
    assert recipe.as_written == {
        "merge_method": "linear",
        "models": [
            {"model": "a", "parameters": {"weight": 0.25}},
            {"model": "b", "parameters": {"weight": [0, 1]}},
        ],
        "parameters": {"normalize": False},
    }


def test_python_gives_a_gradient_or_filters_for_all_as_tables():
    gradient = {"value": [0, 1]}
    filters = [{"filter": "mlp", "value": 1}, {"value": 2}]
    for given in (gradient, filters):
        recipe = merge_models("linear", ["a", "b"], weight=given)
        assert recipe.as_written["parameters"] == {"weight": given}


def test_python_refuses_another_number_of_values():
    with pytest.raises(RecipeError, match="weight: has 3 values for 2 models"):
        merge_models("linear", ["a", "b"], weight=[1, 2, 3])
