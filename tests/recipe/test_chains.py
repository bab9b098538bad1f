"""Several recipes in one file, later ones made of what earlier ones make."""

import pytest
from recipes import told


@pytest.fixture
def three(flat):
    return flat("a", 1.0), flat("b", 2.0), flat("c", 4.0)


CHAIN = """\
name: first
merge_method: linear
models: [{a}, {b}]
parameters: {{weight: 1}}
---
merge_method: task_arithmetic
base_model: first
models: [second]
parameters: {{weight: 2}}
---
name: second
merge_method: linear
models: [first, {c}]
parameters: {{weight: 1, normalize: false}}
"""


def test_a_later_recipe_takes_what_an_earlier_one_made(three, surgery, tmp_path):
    a, b, c = three
    (tmp_path / "chain.yml").write_text(CHAIN.format(a=a, b=b, c=c))
    answer = surgery("run", tmp_path / "chain.yml", "-o", tmp_path / "made")
    assert answer.code == 0, answer.err
    found = {p.stem: set(told(p).values()) for p in (tmp_path / "made").glob("*.safetensors")}
    assert found == {"first": {1.5}, "second": {5.5}, "merged": {9.5}}
    again = surgery("run", tmp_path / "chain.yml", "-o", tmp_path / "made")
    assert again.out.count("skipped") == 3


CHAINS = {
    "a circle": ("name: x\n{0}models: [y]\n---\nname: y\n{0}models: [x]\n", "takes"),
    "a name twice": (
        "name: x\n{0}models: [{a}]\n---\nname: x\n{0}models: [{b}]\n",
        "name 'x' of another",
    ),
    "no name twice": ("{0}models: [{a}]\n---\n{0}models: [{b}]\n", "has no name, as another"),
    "a name that is a path": ("name: ..\n{0}models: [{a}]\n---\n{0}models: [{b}]\n", "is no name"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_that_cannot_be_is_refused(name, three, surgery, tmp_path):
    text, wanted = CHAINS[name]
    filled = text.format("merge_method: passthrough\n", a=three[0], b=three[1])
    (tmp_path / "chain.yml").write_text(filled)
    answer = surgery("run", tmp_path / "chain.yml", "-o", tmp_path / "made")
    assert answer.code == 2
    assert wanted in answer.err
    assert not (tmp_path / "made").exists()
