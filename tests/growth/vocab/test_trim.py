"""Fewer tokens: the text is cut as before, and logits of what stays are the same bit for bit."""

from __future__ import annotations

import json

import pytest
import speakers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from growth.vocab.closure import needed
from growth.vocab.extend import extend
from growth.vocab.pieces import load_tokenizer
from growth.vocab.trim import trim
from growth.vocab.usage import trim_to_text
from structures import example_inputs, load
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError, PlanError, RecipeError
from surgery.vocabulary import read_vocabulary

TEXT = "def main():\n    print('Zażółć 漢字 🙂', 12)\n\n\nimport os\n" * 3


def text_file(folder, text=TEXT, name="text.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


@pytest.fixture(scope="module")
def trimmed(fixtures_dir, write, tmp_path_factory):
    text = text_file(tmp_path_factory.mktemp("text"))
    return write(trim_to_text(open_checkpoint(fixtures_dir / "base"), texts=[text]))


def tokenizers_of(*paths):
    from transformers import AutoTokenizer

    return [AutoTokenizer.from_pretrained(path) for path in paths]


def kept_rows(old, new):
    """Old ids in the order of the new ones."""
    ids = old.get_vocab()
    return [ids[token] for token, _ in sorted(new.get_vocab().items(), key=lambda item: item[1])]


def test_the_text_is_cut_as_before(trimmed, fixtures_dir):
    old, new = tokenizers_of(fixtures_dir / "base", trimmed)
    assert len(new) < 400
    assert new.convert_ids_to_tokens(new(TEXT)["input_ids"]) == old.convert_ids_to_tokens(
        old(TEXT)["input_ids"]
    )


def test_other_text_is_still_spelled(trimmed):
    (new,) = tokenizers_of(trimmed)
    text = "Ünïcode \x00 unseen words — quite"
    assert new.decode(new(text)["input_ids"]) == text


def test_logits_of_kept_tokens_are_the_same(trimmed, fixtures_dir):
    from transformers import AutoModelForCausalLM

    old, new = tokenizers_of(fixtures_dir / "base", trimmed)
    before, after = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32)
        for p in (fixtures_dir / "base", trimmed)
    )
    rows = kept_rows(old, new)
    with torch.no_grad():
        one = before(torch.tensor([old(TEXT)["input_ids"]])).logits[..., rows]
        two = after(torch.tensor([new(TEXT)["input_ids"]])).logits
    assert torch.equal(one, two)
    assert after.config.tie_word_embeddings
    assert after.config.vocab_size == len(new) == len(rows)


def test_ids_are_given_anew_everywhere(tmp_path, write):
    """Special tokens stand behind the others, and move."""
    core = speakers.bpe(speakers.TEXTS["fox"], ["<|end|>", "<s>", "<pad>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    end, first = core.token_to_id("<|end|>"), core.token_to_id("<s>")
    config = {"bos_token_id": first, "eos_token_id": [end, first]}
    roles = {"bos_token": "<s>", "eos_token": "<|end|>", "pad_token": "<pad>"}
    base = speakers.save(
        tmp_path / "m", core, mark=0, roles=roles, config=config,
        generation={"suppress_tokens": [end, core.token_to_id("Ġthe")]},
    )  # fmt: skip
    out = write(trim_to_text(open_checkpoint(base), texts=[text_file(tmp_path, "the fox")]))
    old, new = tokenizers_of(base, out)
    config, generation = (
        json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert new.bos_token_id == config["bos_token_id"] != old.bos_token_id
    assert config["eos_token_id"] == [new.eos_token_id, new.bos_token_id]
    assert generation["suppress_tokens"] == [new.eos_token_id, new.convert_tokens_to_ids("Ġthe")]
    assert new("the fox")["input_ids"][0] == new.bos_token_id
    table = load_file(out / "model.safetensors")["model.embed_tokens.weight"][:, 0]
    assert table.tolist() == kept_rows(old, new)


KINDS = {
    "bytes": lambda: speakers.bpe(speakers.TEXTS["fox"], ["<|end|>"]),
    "spaces": lambda: speakers.spaced_bpe(speakers.TEXTS["renard"], ["<|end|>"]),
    "wordpiece": lambda: speakers.word_piece(speakers.TEXTS["fox"], ["<|end|>"]),
    "words": lambda: speakers.word_level(speakers.TEXTS["fox"], ["<|end|>"]),
    "unigram": lambda: speakers.unigram(speakers.TEXTS["renard"], ["<|end|>"]),
}
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "le",
    "renard",
    "brun",
    "saute",
    "chien",
    "lazy",
    "über",
    "漢字",
    "xq",
    "qux",
    "foxes",
]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("kind") / kind
            made[kind] = open_checkpoint(speakers.save(folder, KINDS[kind](), mark=0))
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_any_text_is_cut_as_before_by_tokenizers_of_every_kind(
    kind, words, kinds, tmp_path_factory
):
    base = kinds(kind)
    text = " ".join(words)
    path = text_file(tmp_path_factory.mktemp("words"), text)
    plan = trim_to_text(base, texts=[path])
    old, new = (
        load_tokenizer(read_vocabulary(base)),
        Tokenizer.from_str(plan.written["tokenizer.json"].decode()),
    )
    assert old.encode(text).tokens == new.encode(text).tokens
    ids = new.get_vocab()
    assert sorted(ids.values()) == list(range(len(ids))) == list(range(plan.facts["rows"]))


def test_wordpiece_keeps_what_it_tries_in_vain(tmp_path):
    """Without `ab`, `abX` would still be unknown, but `abc` would become `a` and `##bc`."""
    vocab = {t: n for n, t in enumerate(["[UNK]", "a", "ab", "##bc", "zz"])}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    base = open_checkpoint(
        speakers.save(tmp_path / "m", core, mark=0, roles={"unk_token": "[UNK]"})
    )
    text, keep = text_file(tmp_path, "abc"), text_file(tmp_path, "##bc", "keep.txt")
    plan = trim_to_text(base, texts=[text], keep=keep)
    new = Tokenizer.from_str(plan.written["tokenizer.json"].decode())
    assert new.encode("abc").tokens == ["[UNK]"]
    assert new.get_vocab().keys() == {"[UNK]", "a", "ab", "##bc"}


def test_bpe_keeps_what_a_token_is_joined_from(kinds):
    vocabulary = read_vocabulary(kinds("bytes"))
    merges = [tuple(m) for m in vocabulary.document["model"]["merges"]]
    for token in [left + right for left, right in merges][-20:]:
        kept = needed(vocabulary, [token])
        assert any(
            left in kept and right in kept for left, right in merges if left + right == token
        )


def test_rare_tokens_go_and_the_longer_text_is_told(fixtures_dir, tmp_path):
    base = open_checkpoint(fixtures_dir / "base")
    text = text_file(tmp_path, "import os\n" * 5 + "should")
    plan = trim_to_text(base, texts=[text], min_count=2)
    assert plan.facts["text_tokens"] > plan.facts["text_tokens_before"]
    assert '"should"' not in plan.written["tokenizer.json"].decode()


def test_tokens_of_a_file_and_documents_of_lines_are_kept(fixtures_dir, tmp_path):
    base = open_checkpoint(fixtures_dir / "base")
    keep = text_file(tmp_path, "import\nĠself\n", "keep.txt")
    lines = text_file(tmp_path, '{"text": "should"}\n', "a.jsonl")
    ids = load_tokenizer(read_vocabulary(base)).get_vocab()
    plan = trim_to_text(base, texts=[lines], keep=keep)
    kept = json.loads(plan.written["tokenizer.json"])["model"]["vocab"]
    assert {"import", "Ġself", *(t for t in ids if t == "should")} <= kept.keys()


def test_unnamed_special_tokens_go_only_when_asked(structure, write, tmp_path):
    grown = write(extend(open_checkpoint(structure("llama")), tokens=["<a>", "<b>"], special=True))
    text = text_file(tmp_path, "plain <a>")
    kept = write(trim_to_text(open_checkpoint(grown), texts=[text]))
    less = write(trim_to_text(open_checkpoint(grown), texts=[text], keep_special=False))
    old, with_b, without_b = tokenizers_of(grown, kept, less)
    assert len(with_b) == len(old) == len(without_b) + 1
    assert without_b.extra_special_tokens == ["<a>"]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral", "bert", "cohere2"])
def test_rows_go_from_every_layout_and_kept_logits_stay(name, structure, write, tmp_path):
    tokens = [f"<|t{n}|>" for n in range(9)]
    grown = write(extend(open_checkpoint(structure(name)), tokens=tokens, init="random"))
    text = text_file(tmp_path, "a<|t7|>b<|t2|>")
    out = write(trim_to_text(open_checkpoint(grown), texts=[text]))
    old, new = tokenizers_of(grown, out)
    (before, _), (after, info) = load(name, grown), load(name, out)
    rows = kept_rows(old, new)
    with torch.no_grad():
        inputs = example_inputs(name)
        one, two = before(**inputs).logits[..., rows], after(**inputs).logits
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert len(new) == two.shape[-1] == 260
    assert torch.equal(one, two)


@pytest.mark.parametrize("cls", ["Qwen2Tokenizer", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_classes_that_build_their_own_tokenizer_take_the_result(cls, tmp_path, write):
    core = speakers.bpe(speakers.TEXTS["fox"], ["<|endoftext|>", "<|x|>"])
    base = speakers.save(tmp_path / "m", core, mark=0, roles={"eos_token": "<|endoftext|>"})
    told = json.loads((base / "tokenizer_config.json").read_text()) | {"tokenizer_class": cls}
    (base / "tokenizer_config.json").write_text(json.dumps(told))
    text = "the quick fox<|x|>"
    out = write(trim_to_text(open_checkpoint(base), texts=[text_file(tmp_path, text)]))
    old, new = tokenizers_of(base, out)
    assert len(new) < len(old)
    assert new.tokenize(text) == old.tokenize(text)
    assert new("<|x|>")["input_ids"] == [len(new) - 1]


def without_bytes(folder):
    core = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    return speakers.save(folder, core, mark=0, roles={"pad_token": "a"})


def dropping(folder):
    core = speakers.bpe(speakers.TEXTS["fox"], ["<|end|>"])
    core.model.dropout = 0.1
    return speakers.save(folder, core, mark=0)


def slow(folder):
    path = speakers.save(folder, KINDS["bytes"](), mark=0)
    document = json.loads((path / "tokenizer.json").read_text())
    (path / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    (path / "tokenizer.json").unlink()
    return path


def unnamed(folder):
    core = KINDS["bytes"]()
    config = {"image_token_id": core.get_vocab_size() + 3}
    return speakers.save(folder, core, mark=0, padding=5, config=config)


@pytest.mark.parametrize(
    ("make", "told", "kind"),
    [
        (without_bytes, "without bytes and without an unknown token", PlanError),
        (dropping, "at random", PlanError),
        (slow, "without a tokenizer.json", RecipeError),
        (unnamed, "which is no token of the tokenizer", PlanError),
    ],
)
def test_a_tokenizer_that_cannot_be_trimmed_is_refused(make, told, kind, tmp_path):
    with pytest.raises(kind, match=told) as caught:
        trim_to_text(open_checkpoint(make(tmp_path / "m")), texts=[text_file(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"texts": []}, "neither texts nor tokens"),
        ({"min_count": 0}, "below 1"),
        ({"keep": "nothing such"}, "is no token"),
        ({"texts": ["missing"]}, "no such file"),
    ],
)
def test_a_wrong_ask_is_refused(options, told, fixtures_dir, tmp_path):
    text = text_file(tmp_path)
    options = {"texts": [text], **options}
    options["texts"] = [tmp_path / path for path in options["texts"]]
    if "keep" in options:
        options["keep"] = text_file(tmp_path, options["keep"], "keep.txt")
    with pytest.raises((RecipeError, CheckpointError), match=told):
        trim_to_text(open_checkpoint(fixtures_dir / "base"), **options)


@pytest.mark.parametrize(("ids", "told"), [("1-x", "no id"), ("5000", "no token has the id 5000")])
def test_recorded_ids_that_make_no_sense_are_refused(ids, told, fixtures_dir):
    with pytest.raises(RecipeError, match=told):
        trim(open_checkpoint(fixtures_dir / "base"), ids=ids)
