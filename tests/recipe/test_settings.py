"""The number that each tensor gets: gradients, filters, precedence, as the peer resolves them.

The expected numbers were read off mergekit 0.1.5, run on models of constant weights.
"""

import pytest
from recipes import LAYERS, told

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def layer(number, part="self_attn.q_proj"):
    return f"model.layers.{number}.{part}.weight"


def by_layer(found, part="self_attn.q_proj"):
    count = sum(name.endswith(f"{part}.weight") for name in found)
    return [found[layer(n, part)] for n in range(count)]


# Scale of a passthrough: what the layers get, what embedding, norm and head get.
GRADIENTS = {
    "a number": ("3", [3] * 5, 3),
    "two ends": ("[0, 1]", [0, 0.25, 0.5, 0.75, 1], 0),
    "three points": ("[0, 1, 0]", [0, 0.5, 1, 0.5, 0], 0),
    "a list of one": ("[3]", [3] * 5, 3),
    "words that are numbers": ('["1e-1", 0.5]', [0.1, 0.2, 0.3, 0.4, 0.5], 0.1),
    "true is one": ("true", [1] * 5, 1),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_a_gradient_runs_over_the_layers_and_starts_outside(name, flat, merged):
    scale, layers, outside = GRADIENTS[name]
    a = flat("a", 1.0)
    out = merged(f"""
        models: [{{model: {a}, parameters: {{scale: {scale}}}}}]
        merge_method: passthrough
    """)
    found = told(out)
    assert by_layer(found) == pytest.approx(layers)
    assert {found[EMBED], found[NORM], found[HEAD]} == {outside}


def test_a_gradient_runs_over_each_slice_by_itself(flat, merged):
    a, b = flat("a", 1.0), flat("b", 2.0)
    out = merged(f"""
        slices:
          - sources: [{{model: {a}, layer_range: [0, 3]}}]
            parameters: {{scale: [1, 2]}}
          - sources: [{{model: {b}, layer_range: [2, 5]}}]
            parameters: {{scale: [5, 6]}}
        merge_method: passthrough
    """)
    found = told(out)
    assert by_layer(found) == pytest.approx([1, 1.5, 2, 10, 11, 12])
    assert (found[EMBED], found[NORM], found[HEAD]) == (1, 10, 10)


def test_a_slice_of_one_layer_gets_the_end_of_a_gradient(flat, merged):
    a = flat("a", 1.0)
    out = merged(f"""
        slices:
          - sources: [{{model: {a}, layer_range: [0, 1]}}]
          - sources: [{{model: {a}, layer_range: [2, 3]}}]
        parameters: {{scale: [0.5, 1]}}
        merge_method: passthrough
    """)
    assert by_layer(told(out)) == [1, 1]


# Scale: what q_proj, up_proj and the norm of layers 0 and 1 get, and the embedding.
FILTERS = {
    "the first that fits": (
        "[{filter: mlp, value: [0, 1]}, {filter: self_attn, value: 0.5}, {value: 2}]",
        ([0.5, 0.5], [0, 0.25], [2, 2], 2),
    ),
    "one alone": ("{filter: mlp, value: 7}", ([1, 1], [7, 7], [1, 1], 1)),
    "a star fits all": ('[{filter: "*", value: 7}]', ([7, 7], [7, 7], [7, 7], 7)),
    "nothing fits all": ("[{filter: null, value: 7}]", ([7, 7], [7, 7], [7, 7], 7)),
    "a pattern is plain text": (
        '[{filter: "q_.*", value: 7}, {filter: "*proj", value: 5}]',
        ([1, 1], [1, 1], [1, 1], 1),
    ),
    "one layer": ("[{filter: layers.1., value: 6}]", ([1, 6], [1, 6], [1, 6], 1)),
    "glob": ('[{filter: {glob: "*.mlp.*"}, value: 7}]', ([1, 1], [7, 7], [1, 1], 1)),
    "regex": (
        r'[{filter: {regex: "layers\\.[01]\\.self|embed"}, value: 7}]',
        ([7, 7], [1, 1], [1, 1], 7),
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_chooses_by_tensor_name(name, flat, merged):
    scale, wanted = FILTERS[name]
    a = flat("a", 1.0)
    out = merged(f"""
        models: [{{model: {a}, parameters: {{scale: {scale}}}}}]
        merge_method: passthrough
    """)
    found = told(out)
    parts = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    assert [by_layer(found, part)[:2] for part in parts] == [pytest.approx(w) for w in wanted[:3]]
    assert found[EMBED] == wanted[3]


def test_where_no_filter_fits_the_wider_level_decides(flat, merged):
    a = flat("a", 1.0)
    out = merged(f"""
        models: [{{model: {a}, parameters: {{scale: [{{filter: mlp, value: 7}}]}}}}]
        merge_method: passthrough
        parameters: {{scale: 3}}
    """)
    found = told(out)
    assert by_layer(found) == [3] * LAYERS
    assert by_layer(found, "mlp.up_proj") == [7] * LAYERS


def test_the_closest_level_decides(flat, merged):
    a, b, c = (flat(name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 4.0)))
    out = merged(f"""
        slices:
          - sources:
              - {{model: {a}, layer_range: [0, 2], parameters: {{weight: [1, 3]}}}}
              - {{model: {b}, layer_range: [3, 5], parameters: {{weight: 10}}}}
            parameters: {{weight: 100}}
          - sources:
              - {{model: {c}, layer_range: [4, 5]}}
              - {{model: {b}, layer_range: [0, 1]}}
            parameters: {{weight: 1000}}
        merge_method: linear
        parameters: {{weight: 0.5, normalize: false}}
    """)
    found = told(out)
    assert by_layer(found) == [21, 23, 6000]
    assert (found[EMBED], found[NORM], found[HEAD]) == (21, 6000, 6000)


def test_a_module_decides_before_the_whole_recipe(flat, merged):
    a = flat("a", 1.0)
    out = merged(f"""
        modules: {{default: {{models: [{{model: {a}}}], parameters: {{scale: 3}}}}}}
        merge_method: passthrough
        parameters: {{scale: 5}}
    """)
    assert set(told(out).values()) == {3}


SWITCHES = {
    "true": ("true", [2] * 5),
    "off in quotes": ('"off"', [1] * 5),
    "zero": ("0", [1] * 5),
    "a list changes in steps": ("[true, false]", [2, 2, 2, 2, 1]),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_read_as_the_peer_reads_it(name, flat, merged):
    normalize, wanted = SWITCHES[name]
    b = flat("b", 2.0)
    out = merged(f"""
        models: [{{model: {b}, parameters: {{weight: 0.5}}}}]
        merge_method: linear
        parameters: {{normalize: {normalize}}}
    """)
    assert by_layer(told(out)) == wanted
