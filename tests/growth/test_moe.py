"""Dense models as experts: what is averaged, what routers are measured from, what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cli.main import main
from growth.upcycle import gates
from growth.upcycle.moe import moe
from growth.upcycle.prompts import Prompts, read_prompts
from surgery.checkpoint import open_checkpoint
from surgery.errors import SurgeryError

DOMAINS = ("uni", "arith")
CHANCE = 0.5


def texts(fixtures_dir, domain):
    lines = (fixtures_dir / "heldout" / f"{domain}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"][:100] for line in lines]


@pytest.fixture
def opened_experts(fixtures_dir):
    return tuple(open_checkpoint(fixtures_dir / name) for name in DOMAINS)


@pytest.fixture
def prompts(fixtures_dir, tmp_path):
    """A file of 16 prompts an expert; the later half of the documents is left for tests."""
    path = tmp_path / "prompts.json"
    told = {name: {"positive": texts(fixtures_dir, name)[:16]} for name in DOMAINS}
    path.write_text(json.dumps(told))
    return path


def tensors_of(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def model_at(path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def routed(path, documents, expert):
    """The share of tokens, over all layers, whose first expert this is."""
    from transformers import AutoTokenizer

    model, tokenizer = model_at(path), AutoTokenizer.from_pretrained(path)
    shares = []
    for text in documents:
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
        logits = torch.stack(model(ids, output_router_logits=True).router_logits)
        shares.append(float((logits.argmax(-1) == expert)[:, 1:].float().mean()))
    return sum(shares) / len(shares)


def test_each_model_gives_its_feed_forwards_and_the_rest_is_averaged(opened_experts, write):
    made = tensors_of(write(moe(*opened_experts)))
    own = [tensors_of(each.root) for each in opened_experts]
    for n, each in enumerate(own):
        block = f"model.layers.2.block_sparse_moe.experts.{n}"
        assert torch.equal(made[f"{block}.w1.weight"], each["model.layers.2.mlp.gate_proj.weight"])
        assert torch.equal(made[f"{block}.w2.weight"], each["model.layers.2.mlp.down_proj.weight"])
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"):
        mean = (own[0][name].float() + own[1][name].float()) / 2
        assert torch.equal(made[name], mean.to(made[name].dtype))


def test_the_first_model_may_give_the_rest(opened_experts, write):
    made = tensors_of(write(moe(*opened_experts, attention="first")))
    own = tensors_of(opened_experts[0].root)
    kept = [name for name in own if ".mlp." not in name]
    assert all(torch.equal(made[name], own[name]) for name in kept)


def test_a_model_beside_itself_computes_what_it_did(fixtures_dir, write):
    base = open_checkpoint(fixtures_dir / "base")
    made = write(moe(base, base, base))
    ids = torch.arange(24)[None]
    with torch.no_grad():
        after, before = (model_at(path)(ids).logits for path in (made, fixtures_dir / "base"))
    assert float((after - before).abs().max()) <= 1e-5


@pytest.mark.parametrize("attention", ["average", "first"])
@pytest.mark.parametrize(("gate", "least"), [("hidden", 0.85), ("cheap", 0.6)])
def test_documents_go_to_their_expert(gate, least, attention, *, prompts, fixtures_dir, tmp_path):
    """Documents that no prompt was cut from; chance is a half."""
    out = tmp_path / "made"
    models = [str(fixtures_dir / name) for name in DOMAINS]
    words = ["moe", *models, "--gate", gate, "--attention", attention, "--top-k", "1"]
    assert main([*words, "--prompts", str(prompts), "-o", str(out)]) == 0
    for expert, domain in enumerate(DOMAINS):
        documents = texts(fixtures_dir, domain)[32:48]
        assert routed(out, documents, expert) > least > CHANCE
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0


def test_random_routers_know_no_domain(fixtures_dir, opened_experts, write):
    made = write(moe(*opened_experts, router_std=1.0))
    told = [routed(made, texts(fixtures_dir, name)[32:40], 0) for name in DOMAINS]
    assert all(0.15 < share < 0.85 for share in told)


def test_a_hidden_gate_is_the_mean_of_what_the_router_sees(fixtures_dir, tmp_path):
    """Measured here with output_hidden_states and the norm by hand, one prompt after another."""
    from transformers import AutoTokenizer

    base = fixtures_dir / "base"
    positive, negative = ["import os\n", "def f(x):\n    return x\n"], ["12 + 34 = 46"]
    file = tmp_path / "gates.safetensors"
    asked = (Prompts(positive=tuple(positive), negative=tuple(negative)),) * 2
    with gates.hidden_vectors(str(base), tokens="mean", device="cpu") as vector:
        gates.write_rows(file, vector, asked, layers=[0, 3], question={})
    model, tokenizer = model_at(base), AutoTokenizer.from_pretrained(base)
    layer = model.model.layers[3]

    @torch.no_grad()
    def seen(text):
        ids = torch.tensor([[0, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        kept = []
        hook = layer.post_attention_layernorm.register_forward_hook(
            lambda _, __, out: kept.append(out)
        )
        model(ids)
        hook.remove()
        return kept[0][0, 1:].double().mean(0)

    wanted = sum(map(seen, positive)) / 2 - seen(negative[0])
    from safetensors.torch import load_file

    rows = load_file(file)
    assert rows.keys() == {"layers.0.router", "layers.3.router"}
    torch.testing.assert_close(rows["layers.3.router"][0].double(), wanted / wanted.norm())


def test_the_length_of_other_prompts_changes_nothing(fixtures_dir, tmp_path):
    """Nothing is padded: a vector of a short prompt is the same beside a long one."""
    with gates.hidden_vectors(str(fixtures_dir / "base"), tokens="last", device="cpu") as vector:
        alone = vector("import os")
        vector("import sys\n" * 20)
        assert torch.equal(vector("import os"), alone)


def test_a_cheap_gate_is_the_mean_embedding_of_the_averaged_model(fixtures_dir, opened_experts):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(fixtures_dir / "base")("import os")["input_ids"]
    tables = [
        tensors_of(each.root)["model.embed_tokens.weight"].double() for each in opened_experts
    ]
    with gates.cheap_vectors(opened_experts) as vector:
        found = vector("import os")
    assert found.shape == (4, 128)
    torch.testing.assert_close(found[0], (sum(tables) / 2)[ids].mean(0))


def test_prompts_too_like_one_another_are_told(fixtures_dir, opened_experts, tmp_path):
    file = tmp_path / "gates.safetensors"
    same = (Prompts(positive=("import os",)),) * 2
    with gates.cheap_vectors(opened_experts) as vector:
        gates.write_rows(file, vector, same, layers=range(4), question={"gate": "cheap"})
    plan = moe(*opened_experts, open_checkpoint(file), gate="cheap")
    assert "in 4 of 4 layers two rows of the router are nearly one" in " ".join(plan.notes)


def test_measured_routers_are_used_again_and_not_for_another_question(
    prompts, fixtures_dir, tmp_path, capsys
):
    models = [str(fixtures_dir / name) for name in DOMAINS]
    file = tmp_path / "rows.safetensors"
    words = ["moe", *models, "--gate", "cheap", "--gates", str(file)]
    assert main([*words, "--prompts", str(prompts), "-o", str(tmp_path / "one")]) == 0
    before = file.stat().st_mtime_ns
    assert main([*words, "-o", str(tmp_path / "two")]) == 0
    assert file.stat().st_mtime_ns == before
    prompts.write_text(json.dumps({name: ["other words"] for name in DOMAINS}))
    assert main([*words, "--prompts", str(prompts), "-o", str(tmp_path / "three")]) == 1
    assert "measured otherwise (prompts differ)" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing(prompts, fixtures_dir, tmp_path, capsys):
    models = [str(fixtures_dir / name) for name in DOMAINS]
    before = sorted(tmp_path.iterdir())
    words = ["--prompts", str(prompts), "-o", str(tmp_path / "made"), "--dry-run"]
    assert main(["moe", *models, "--gate", "cheap", *words]) == 0
    assert "routers" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "text",
    [
        "{a: {positive: [x, y], negative: [z]}, b: [w]}",
        "- {positive: [x, y], negative: [z]}\n- [w]",
        '{"a": {"positive": ["x", "y"], "negative": ["z"]}, "./b": ["w"]}',
    ],
)
def test_prompts_are_read(text, tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    found = read_prompts(path, [("a", "./a"), ("b", "./b")])
    assert found == (Prompts(positive=("x", "y"), negative=("z",)), Prompts(positive=("w",)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{a: [x], c: [y]}", "has prompts for 'c', which is no expert"),
        ("{a: [x]}", "has no entries for the expert 'b'"),
        ("{a: [x], b: [y], ./b: [z]}", "has 2 entries for the expert 'b'"),
        ("- [x]", "has 1 entries for 2 experts"),
        ("words", "holds neither a table nor a list"),
        ("{a: [x], b: []}", "positive prompts of 'b' are no list of texts"),
        ("{a: [x], b: [1]}", "positive prompts of 'b' are no list of texts"),
        ("{a: [x], b: {positiv: [y]}}", "the entry 'b' is of another form"),
        ("{a: [x", "cannot be read as YAML or JSON"),
    ],
)
def test_prompts_of_another_form_are_refused(text, told, tmp_path):
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(SurgeryError, match=told):
        read_prompts(path, [("a", "./a"), ("b", "./b")])


@pytest.fixture
def changed(fixtures_dir, tmp_path):
    """A copy of the base, with some of its files changed."""

    def change(*, config=None, tokenizer=None):
        path = tmp_path / "other"
        shutil.copytree(fixtures_dir / "base", path)
        for name, more in (("config.json", config), ("tokenizer.json", tokenizer)):
            told = json.loads((path / name).read_text())
            (path / name).write_text(json.dumps({**told, **(more or {})}))
        return open_checkpoint(path)

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"config": {"rms_norm_eps": 1e-5}}, "has rms_norm_eps = 1e-05"),
        ({"config": {"rope_parameters": {"rope_theta": 5.0}}}, "has rope_parameters"),
        ({"tokenizer": {"version": "2"}}, "has another tokenizer"),
    ],
    ids=str,
)
def test_experts_that_differ_are_refused(change, told, changed, fixtures_dir):
    with pytest.raises(SurgeryError, match=told):
        moe(open_checkpoint(fixtures_dir / "base"), changed(**change))


@pytest.mark.parametrize(("first", "other"), [("llama", "mistral"), ("llama", "llama_tied")])
def test_other_architectures_are_refused(first, other, structure):
    with pytest.raises(SurgeryError, match="experts are models of one architecture"):
        moe(open_checkpoint(structure(first)), open_checkpoint(structure(other)))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["uni"], "has 1 expert"),
        (["uni", "arith", "--top-k", "3"], "outside 1 to 2"),
        (["uni", "arith", "--gate", "hidden"], "needs prompts"),
        (["uni", "arith", "--gate", "random", "--prompts", "x"], "says nothing beside"),
    ],
    ids=str,
)
def test_wrong_asks_are_told_in_a_sentence(words, told, fixtures_dir, tmp_path, capsys):
    given = [str(fixtures_dir / word) if word in DOMAINS else word for word in words]
    assert main(["moe", *given, "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("file", ["other", "rows"])
def test_a_file_that_holds_other_rows_is_refused(file, fixtures_dir, opened_experts, tmp_path):
    rows = tmp_path / "rows.safetensors"
    if file == "other":
        rows = fixtures_dir / "base" / "model.safetensors"
        told = "does not hold measured rows"
    else:
        three = (Prompts(positive=("import os",)),) * 3
        with gates.cheap_vectors(opened_experts) as vector:
            gates.write_rows(rows, vector, three, layers=range(4), question={"gate": "cheap"})
        told = "where the mixture has"
    with pytest.raises(SurgeryError, match=told):
        moe(*opened_experts, open_checkpoint(rows), gate="cheap")
