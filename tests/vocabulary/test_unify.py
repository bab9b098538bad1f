"""Models brought to one vocabulary: transformers reads the tokenizer, the rows tell the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import speakers
from speakers import MARKS, SAMPLES, TEXTS

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import CheckpointError, RecipeError
from surgery.vocabulary import Unified, read_vocabulary, unify

Trio = list[Checkpoint]
KINDS: dict[str, Callable[..., Any]] = {
    "bpe of bytes": speakers.bpe,
    "bpe of spaces": speakers.spaced_bpe,
    "word piece": speakers.word_piece,
    "word level": speakers.word_level,
}


@pytest.fixture
def trio(tmp_path: Path) -> Trio:
    """Different texts, added tokens, padding; the same token has other ids in each."""
    return [
        speakers.speaker(tmp_path, "fox", ("<|end|>", "<|a|>"), padding=7),
        speakers.speaker(tmp_path, "sums", ("<|b|>", "<|end|>", "<|pad|>"), padding=5),
        speakers.speaker(tmp_path, "renard", ("<|end|>", "<|c|>")),
    ]


def ids_of(model: Checkpoint) -> dict[str, int]:
    return dict(AutoTokenizer.from_pretrained(model.root).get_vocab())


def check_own_rows(unified: Unified, models: Trio, number: int, out: Path) -> dict[str, int]:
    """Every token that a model has stands in the row of its new id; the head likewise."""
    made = speakers.written(unified, number, out)
    new = AutoTokenizer.from_pretrained(made).get_vocab()
    mark = MARKS[models[number].root.name]
    found = speakers.rows(made)
    for token, old in ids_of(models[number]).items():
        assert token not in new or found[new[token]] == mark + old, token
    np.testing.assert_array_equal(speakers.rows(made, "lm_head.weight"), -found)
    return dict(new)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_union_has_every_token_of_every_model_with_its_row(
    trio: Trio, number: int, tmp_path: Path
) -> None:
    unified = unify(trio, choice="union", base=0)
    new = check_own_rows(unified, trio, number, tmp_path / "out")
    assert new == dict(unified.ids)
    assert set(new) == {token for model in trio for token in ids_of(model)}


def test_a_union_keeps_the_ids_of_the_base_and_numbers_the_rest_in_order(trio: Trio) -> None:
    ids = list(unify(trio, choice="union", base=0).ids.items())
    base, *others = (read_vocabulary(model).ids for model in trio)
    assert ids[: len(base)] == list(base.items())
    expected = list(base)
    for other in others:
        expected += [
            token for token in sorted(other, key=other.__getitem__) if token not in expected
        ]
    assert [token for token, _ in ids] == expected
    assert [number for _, number in ids] == list(range(len(ids)))


@pytest.mark.parametrize("choice", ["base", "fox", "union"])
def test_what_the_tokenizers_model_wrote_is_read_back(
    trio: Trio, choice: str, tmp_path: Path
) -> None:
    unified = unify(trio, choice=choice, base=0, names=["fox", "sums", "renard"])
    made = AutoTokenizer.from_pretrained(speakers.written(unified, 0, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(trio[0].root)
    for text in SAMPLES:
        assert made.decode(made.encode(text)) == theirs.decode(theirs.encode(text))
        if choice != "union":
            assert made.encode(text) == theirs.encode(text)


def test_the_bases_tokenizer_and_padding_stay_as_they_are(trio: Trio, tmp_path: Path) -> None:
    unified = unify(trio, choice="base", base=0)
    assert unified.size == len(ids_of(trio[0])) + 7
    assert unified.checkpoints[0].tensors == trio[0].tensors
    made = speakers.written(unified, 1, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (trio[0].root / name).read_bytes()
    # Rows 291 to 295 pad the second model too; it has a token at 290, and nothing at 296.
    padding = [1290, *range(2291, 2296), 1296]
    assert speakers.rows(made)[-7:].tolist() == padding


def test_a_named_models_tokenizer_brings_its_files_and_roles(trio: Trio, tmp_path: Path) -> None:
    unified = unify(trio, choice="sums", base=0, names=["fox", "sums", "renard"])
    check_own_rows(unified, trio, 0, tmp_path / "first")
    made = speakers.written(unified, 2, tmp_path / "out")
    assert (made / "tokenizer.json").read_bytes() == (trio[1].root / "tokenizer.json").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(made)
    wanted = AutoTokenizer.from_pretrained(made).eos_token_id
    assert wanted == ids_of(trio[1])["<|end|>"]
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == wanted


@pytest.mark.parametrize("choice", ["base", "union", "sums"])
def test_the_output_loads_whole(trio: Trio, choice: str, tmp_path: Path) -> None:
    unified = unify(trio, choice=choice, base=0, names=["fox", "sums", "renard"])
    made = speakers.written(unified, 2, tmp_path / "out")
    model, told = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(told.values())
    assert model.config.vocab_size == unified.size == model.get_input_embeddings().num_embeddings
    assert (made / "generation_config.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_tokenizers_that_have_a_union(kind: str, tmp_path: Path) -> None:
    models = []
    for name, special in (("fox", ["<|end|>"]), ("sums", ["<|b|>", "<|end|>"])):
        core = KINDS[kind](TEXTS[name], special)
        folder = speakers.save(tmp_path / name, core, mark=MARKS[name], padding=3)
        models.append(open_checkpoint(folder))
    unified = unify(models, choice="union", base=0)
    for number in (0, 1):
        new = check_own_rows(unified, models, number, tmp_path / f"out{number}")
        assert new == dict(unified.ids)
    made = AutoTokenizer.from_pretrained(tmp_path / "out0")
    assert "123" in made.decode(made.encode(TEXTS["sums"]))
    assert made.encode("<|b|>", add_special_tokens=False)[-1] == unified.ids["<|b|>"]


def test_the_union_joins_what_the_base_cuts_and_cuts_nothing_else(
    trio: Trio, tmp_path: Path
) -> None:
    unified = unify(trio, choice="union", base=0)
    made = AutoTokenizer.from_pretrained(speakers.written(unified, 0, tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(trio[0].root)
    for text in SAMPLES:
        new, old = (list(accumulate(map(len, t.tokenize(text)))) for t in (made, theirs))
        assert set(new) <= set(old)
    french = TEXTS["renard"]
    assert len(made.tokenize(french)) < len(theirs.tokenize(french)) / 2


def test_added_tokens_keep_their_flags(trio: Trio) -> None:
    document = json.loads(unify(trio, choice="union", base=0).written["tokenizer.json"])
    added = {entry["content"]: entry for entry in document["added_tokens"]}
    assert set(added) == {"<|end|>", "<|a|>", "<|b|>", "<|pad|>", "<|c|>"}
    assert all(entry["special"] for entry in added.values())
    assert [e["id"] for e in document["added_tokens"]] == sorted(e["id"] for e in added.values())


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    models = [speakers.speaker(tmp_path, name, tied=True) for name in ("fox", "sums")]
    unified = unify(models, choice="union", base=0)
    made = speakers.written(unified, 1, tmp_path / "out")
    model, told = AutoModelForCausalLM.from_pretrained(made, output_loading_info=True)
    assert not any(told.values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in unified.checkpoints[1].tensors


def test_a_head_takes_absent_rows_of_a_tied_model_from_its_embedding(tmp_path: Path) -> None:
    tied = speakers.speaker(tmp_path, "fox", tied=True)
    unified = unify([speakers.speaker(tmp_path, "sums"), tied], choice="union", base=0)
    head = speakers.rows(speakers.written(unified, 0, tmp_path / "out"), "lm_head.weight")
    assert head[unified.ids["Ġfox"]] == 1000 + ids_of(tied)["Ġfox"]


def test_biases_of_the_head_are_permuted_too(tmp_path: Path) -> None:
    models = []
    for name in ("fox", "sums"):
        count = len(speakers.bpe(TEXTS[name], ["<|end|>"]).get_vocab())
        numbers = np.arange(count, dtype=np.float32) + MARKS[name]
        more = {"lm_head.bias": numbers, "final_logits_bias": numbers[None]}
        models.append(speakers.speaker(tmp_path, name, more=more))
    made = speakers.written(unified := unify(models, choice="union", base=0), 1, tmp_path / "out")
    wide = speakers.load_file(made / "model.safetensors")["final_logits_bias"]
    assert wide.shape == (1, unified.size)
    for token, old in ids_of(models[1]).items():
        assert speakers.rows(made)[unified.ids[token]] == 2000 + old
    np.testing.assert_array_equal(speakers.rows(made, "lm_head.bias"), speakers.rows(made))
    np.testing.assert_array_equal(wide[0], speakers.rows(made))


def test_the_same_vocabulary_changes_nothing(tmp_path: Path) -> None:
    first = speakers.speaker(tmp_path / "one", "fox", padding=3)
    second = speakers.speaker(tmp_path / "two", "fox", padding=3)
    for choice in (None, "union", "base"):
        unified = unify([first, second], choice=choice, base=0)
        assert [c.tensors for c in unified.checkpoints] == [first.tensors, second.tensors]
        assert (unified.written, unified.config, unified.maps) == ({}, first.config, ())
        assert unified.carried == first.carried


def test_different_vocabularies_unasked_are_an_error_that_shows_them(trio: Trio) -> None:
    with pytest.raises(
        RecipeError, match=r"290 tokens in 297 rows.*291 tokens in 296 rows.*0 is"
    ) as e:
        unify(trio, base=0)
    assert "tokenizer: {source: union}" in e.value.remedy


def test_padding_to_a_multiple_gives_the_mean_of_all_rows(trio: Trio, tmp_path: Path) -> None:
    unified = unify(trio, choice="base", base=0, pad_to_multiple_of=64)
    assert unified.size == unified.config["vocab_size"] == 320
    found = speakers.rows(speakers.written(unified, 1, tmp_path / "out"))
    assert found[297:].tolist() == [2000 + 295 / 2] * 23


def test_the_first_model_stands_in_for_a_base_that_is_not_named(trio: Trio) -> None:
    assert unify(trio, choice="base").ids == read_vocabulary(trio[0]).ids
    absent = unify(trio, choice="union")
    first, second, third = (set(read_vocabulary(model).ids) for model in trio)
    assert absent.facts["taken_from"][1]["average"] == len((first & third) - second) > 0


def test_ids_of_the_donor_move_with_its_tokens(trio: Trio, tmp_path: Path) -> None:
    config = {"pad_token_id": 290, "image_token_index": 5, "bos_token_id": 9999}
    generation = {"eos_token_id": [289, 0], "suppress_tokens": [5, 290], "temperature": 0.5}
    core = speakers.bpe(TEXTS["sums"], ("<|b|>", "<|end|>", "<|pad|>"))
    folder = speakers.save(
        tmp_path / "d" / "sums", core, mark=2000, config=config, generation=generation
    )
    donor = open_checkpoint(folder)
    old = {number: token for token, number in ids_of(donor).items()}
    unified = unify([donor, trio[0]], choice="union", base=1, donor=0)
    told = unified.config or {}
    assert told["pad_token_id"] == unified.ids["<|pad|>"]
    assert told["image_token_index"] == unified.ids[old[5]]
    assert told["bos_token_id"] is None
    assert any("bos_token_id 9999" in note for note in unified.notes)
    made = json.loads(unified.written["generation_config.json"])
    assert made["eos_token_id"] == [unified.ids["<|end|>"], unified.ids["<|b|>"]]
    assert made["suppress_tokens"] == [unified.ids[old[5]], unified.ids["<|pad|>"]]
    assert made["temperature"] == 0.5


def test_a_vocabulary_in_a_section_of_the_config_is_resized_there(tmp_path: Path) -> None:
    for name in ("fox", "sums"):
        folder = speakers.speaker(tmp_path, name).root
        config = json.loads((folder / "config.json").read_text())
        inside = {"vocab_size": config["vocab_size"], "eos_token_id": config["eos_token_id"]}
        (folder / "config.json").write_text(json.dumps({**config, "text_config": inside}))
    models = [open_checkpoint(tmp_path / name) for name in ("fox", "sums")]
    told = unify(models, choice="sums", base=0, names=["fox", "sums"]).config or {}
    assert told["text_config"]["vocab_size"] == told["vocab_size"] == len(ids_of(models[1]))


REFUSED = {
    "two kinds": (speakers.bpe, speakers.word_piece, "BPE in .* and WordPiece in"),
    "two alphabets": (speakers.bpe, speakers.spaced_bpe, "spells its tokens as bytes"),
    "scores": (speakers.unigram, speakers.unigram, "scores that cannot be compared"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokenizers_that_have_no_union(case: str, tmp_path: Path) -> None:
    one, two, message = REFUSED[case]
    models = [
        open_checkpoint(speakers.save(tmp_path / n, make(TEXTS[n], ["<|end|>"]), mark=1))
        for n, make in (("fox", one), ("sums", two))
    ]
    with pytest.raises(RecipeError, match=message):
        unify(models, choice="union", base=0)


def test_unigram_pieces_that_agree_take_added_tokens(tmp_path: Path) -> None:
    core = speakers.unigram(TEXTS["fox"], ["<|end|>"])
    cores = [core, Tokenizer.from_str(core.to_str())]
    cores[1].add_special_tokens(["<|b|>"])
    models = [
        open_checkpoint(speakers.save(tmp_path / f"m{n}", core, mark=1000))
        for n, core in enumerate(cores)
    ]
    unified = unify(models, choice="union", base=0)
    made = AutoTokenizer.from_pretrained(speakers.written(unified, 0, tmp_path / "out"))
    assert made.get_vocab() == dict(unified.ids) == ids_of(models[1])


def test_tokens_are_compared_as_text_across_alphabets(tmp_path: Path) -> None:
    models = []
    for make, mark in ((speakers.bpe, 1000), (speakers.spaced_bpe, 2000)):
        core = make(TEXTS["sums"], ["<|end|>"], size=300)
        models.append(open_checkpoint(speakers.save(tmp_path / str(mark), core, mark=mark)))
    unified = unify(models, choice="base", base=0)
    found = speakers.rows(speakers.written(unified, 1, tmp_path / "out"))
    theirs = ids_of(models[1])
    assert found[unified.ids["s"]] == 2000 + theirs["s"]
    assert found[unified.ids["<|end|>"]] == 2000 + theirs["<|end|>"]
    assert found[unified.ids["Ċ"]] == 2000 + theirs["<0x0A>"]


def test_an_old_tokenizer_without_a_json_has_no_union_but_can_be_taken(
    trio: Trio, tmp_path: Path
) -> None:
    folder = trio[0].root
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps({**model["vocab"], "<|a|>": 289}))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (folder / "tokenizer.json").unlink()
    old = [open_checkpoint(folder), trio[1]]
    assert unify(old, choice="base", base=0).size == 297
    with pytest.raises(RecipeError, match=r"without a tokenizer\.json"):
        unify(old, choice="union", base=0)


def test_a_model_without_a_tokenizer_is_refused(trio: Trio, tmp_path: Path) -> None:
    bare = open_checkpoint(speakers.save(tmp_path / "bare", None, mark=1, rows=300))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        unify([trio[0], bare], choice="union", base=0)


def test_widths_that_differ_cannot_share_rows(trio: Trio, monkeypatch: pytest.MonkeyPatch,
                                              tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setattr(speakers, "WIDTH", 16)
    wider = speakers.speaker(tmp_path / "wide", "sums")
    with pytest.raises(CheckpointError, match="only models of one width"):
        unify([trio[0], wider], choice="union", base=0)


@pytest.mark.parametrize(
    ("choice", "remedy"), [("sum", "did you mean sums"), ("xyzzy", "the models are")]
)
def test_a_name_that_is_no_models_is_told_with_those_there_are(
    trio: Trio, choice: str, remedy: str
) -> None:
    with pytest.raises(RecipeError, match="is no model of this merge") as error:
        unify(trio, choice=choice, base=0, names=["fox", "sums", "renard"])
    assert remedy in error.value.remedy
