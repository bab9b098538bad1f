"""New tokens: old logits stay bit for bit on every layout, and the tokenizer knows them."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from growth.vocab.extend import extend, read_tokens
from growth.vocab.pad import pad
from structures import STRUCTURES, example_inputs, load
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError, RecipeError, SurgeryError

NAMED = 258  # tokens of the structures
TOKENS = [f"<|t{n}|>" for n in range(9)] + ["def __init__"]
VISION = ("gemma3", "llava", "qwen2_vl")


@pytest.fixture(scope="session")
def source(structure, tmp_path_factory):
    """A structure whose config names tokens only: those of images are made ordinary ones."""

    def get(name):
        path = structure(name)
        if name not in VISION:
            return path
        import shutil

        own = tmp_path_factory.mktemp("vision") / name
        shutil.copytree(path, own)
        config = json.loads((own / "config.json").read_text())
        for section in (config, config["text_config"]):
            for key, value in section.items():
                if key.endswith(("_token_id", "_token_index")) and (value or 0) >= NAMED:
                    section[key] = value - 100
        (own / "config.json").write_text(json.dumps(config))
        return own

    return get


@pytest.mark.parametrize("name", STRUCTURES)
def test_old_logits_are_the_same_on_every_layout(name, source, write):
    path = source(name)
    out = write(extend(open_checkpoint(path), tokens=TOKENS, init="random"))
    (before, _), (after, info) = load(name, path), load(name, out)
    inputs = example_inputs(name)
    with torch.no_grad():
        one, two = before(**inputs).logits, after(**inputs).logits
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert two.shape[-1] == NAMED + len(TOKENS)
    assert torch.equal(one[..., :NAMED], two[..., :NAMED])
    assert after.config.get_text_config().vocab_size == NAMED + len(TOKENS)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bert", "llava"])
def test_padding_changes_no_old_logit_and_no_greedy_choice(name, source, write):
    path = source(name)
    out = write(pad(open_checkpoint(path), multiple=100))
    (before, _), (after, _) = load(name, path), load(name, out)
    inputs = example_inputs(name)
    with torch.no_grad():
        one, two = before(**inputs).logits, after(**inputs).logits
    assert two.shape[-1] == 300
    assert torch.equal(one, two[..., :264])
    assert torch.equal(one.argmax(-1), two.argmax(-1))


@pytest.fixture(scope="module")
def grown(fixtures_dir, write):
    made = {}

    def get(init):
        if init not in made:
            base = open_checkpoint(fixtures_dir / "base")
            made[init] = write(extend(base, tokens=["<|tool|>", "def __init__"], init=init))
        return made[init]

    return get


def table(path):
    return load_file(path / "model.safetensors")["model.embed_tokens.weight"]


@pytest.mark.parametrize("init", ["mean", "subword", "zero", "random"])
def test_new_rows_are_what_was_asked_for(init, grown, fixtures_dir):
    from transformers import AutoTokenizer

    old, new = table(fixtures_dir / "base"), table(grown(init))
    assert torch.equal(new[:1024], old)
    cutter = AutoTokenizer.from_pretrained(fixtures_dir / "base")
    mean = old.double().mean(0)
    for at, token in ((1024, "<|tool|>"), (1025, "def __init__")):
        pieces = cutter(token)["input_ids"]
        wanted = {"mean": mean, "subword": old[pieces].double().mean(0), "zero": mean * 0}
        if init in wanted:
            assert torch.equal(new[at], wanted[init].to(new.dtype))
    if init == "random":
        assert not torch.equal(new[1024], new[1025])
        z = (new[1024:].double() - mean) / old.double().std(0, correction=0)
        assert abs(float(z.mean())) < 0.3
        assert 0.8 < float(z.std()) < 1.2


def test_the_tokenizer_knows_new_tokens_and_cuts_other_text_as_before(grown, fixtures_dir):
    from transformers import AutoTokenizer

    old = AutoTokenizer.from_pretrained(fixtures_dir / "base")
    new = AutoTokenizer.from_pretrained(grown("mean"))
    text = "class A:\n    x = 12\n"
    assert new(text)["input_ids"] == old(text)["input_ids"]
    assert new("<|tool|>x")["input_ids"] == [1024, *old("x")["input_ids"]]
    assert new.decode([1025]) == "def __init__"
    assert len(new) == 1026


def test_special_tokens_are_left_out_of_decoded_text_and_listed(fixtures_dir, write):
    from transformers import AutoTokenizer

    base = open_checkpoint(fixtures_dir / "base")
    out = write(extend(base, tokens=["<|tool|>"], special=True))
    new = AutoTokenizer.from_pretrained(out)
    assert new.decode([1024, 65], skip_special_tokens=True) == new.decode([65])
    assert "<|tool|>" in new.extra_special_tokens


def test_a_tied_table_stored_twice_gets_one_noise(structure, write, tmp_path):
    import shutil

    shutil.copytree(structure("llama_tied"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    out = write(extend(open_checkpoint(tmp_path / "m"), tokens=TOKENS, init="random"))
    made = load_file(out / "model.safetensors")
    assert torch.equal(made["lm_head.weight"], made["model.embed_tokens.weight"])


def test_rows_do_not_depend_on_the_size_of_the_pieces_they_are_read_in(structure):
    from surgery.checkpoint import read_rows

    plan = extend(open_checkpoint(structure("llama")), tokens=TOKENS, init="subword")
    tables = load_file(structure("llama") / "model.safetensors")
    view = next(i for s in plan.steps for i in s.inputs if i.name == "lm_head.weight")

    def read(tensor, start, count):
        return tables[tensor.name][start : start + count]

    whole = read_rows(read, view, 0, 268)
    single = torch.cat([read_rows(read, view, n, 1).to(whole.dtype) for n in range(268)])
    assert torch.equal(whole, single)


def test_planning_loads_no_torch(fixtures_dir):
    code = (
        "import sys\nfrom surgery.checkpoint import open_checkpoint\n"
        "from growth.vocab.extend import extend\n"
        f"extend(open_checkpoint({str(fixtures_dir / 'base')!r}), tokens=['<|x|>'],"
        " init='subword')\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_file_of_tokens_keeps_spaces_and_skips_empty_lines(tmp_path):
    (tmp_path / "t").write_bytes(b"<a>\r\n\n b \nc")
    assert read_tokens(tmp_path / "t") == ["<a>", " b ", "c"]


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ([], "is given no token"),
        (["<|endoftext|>"], "is a token already, id 0"),
        (["import"], "is a token already"),
        (["<a>", "<a>"], "named twice"),
        (["  "], "empty, only space"),
        (["x" * 2000], "longer than 1024 letters"),
    ],
)
def test_a_wrong_ask_is_one_sentence(tokens, told, fixtures_dir):
    with pytest.raises(RecipeError, match=told) as caught:
        extend(open_checkpoint(fixtures_dir / "base"), tokens=tokens)
    assert "\n" not in str(caught.value)


def test_a_row_that_only_the_config_names_is_not_given_away(structure):
    with pytest.raises(PlanError, match="names the id 258"):
        extend(open_checkpoint(structure("llava")), tokens=["<a>"])


def test_a_bare_file_and_a_quantised_table_are_refused(fixtures_dir, tmp_path):
    with pytest.raises(CheckpointError, match="without tokenizer"):
        extend(open_checkpoint(fixtures_dir / "base" / "model.safetensors"), tokens=["<a>"])
    import shutil

    shutil.copytree(fixtures_dir / "base", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = torch.from_numpy(np.zeros(tensors[name].shape, np.int8))
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="stored as I8"):
        extend(open_checkpoint(tmp_path / "m"), tokens=["<a>"])


@pytest.mark.parametrize(
    ("multiple", "told"), [(0, "outside"), (1024, "nothing"), (1 << 30, "out")]
)
def test_padding_to_no_multiple_is_refused(multiple, told, fixtures_dir):
    with pytest.raises(SurgeryError, match=told):
        pad(open_checkpoint(fixtures_dir / "base"), multiple=multiple)


def test_a_bare_file_is_padded(fixtures_dir, tmp_path):
    from surgery.run import run

    base = open_checkpoint(fixtures_dir / "base" / "model.safetensors")
    out = run(pad(base, multiple=1000, init="zero"), tmp_path / "m.safetensors").out
    assert not load_file(out)["model.embed_tokens.weight"][1024:].any()
