"""What is read of a tokenizer's files, and how two vocabularies differ."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
import speakers

from structures import STRUCTURES, VOCAB
from surgery.checkpoint import open_checkpoint
from surgery.errors import CheckpointError
from surgery.vocabulary import explain_difference, find_tables, read_vocabulary, unify
from surgery.vocabulary.tables import unknown_tables


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_table_of_every_structure_is_found(
    structure: Callable[[str], Path], name: str
) -> None:
    model = open_checkpoint(structure(name))
    wanted = {n for n, tensor in model.tensors.items() if VOCAB in tensor.shape}
    assert set(find_tables(model)) == wanted
    assert unknown_tables(model) == []


@pytest.mark.parametrize("name", STRUCTURES[:3])
def test_ids_are_those_of_transformers(structure: Callable[[str], Path], name: str) -> None:
    found = read_vocabulary(open_checkpoint(structure(name)))
    tokenizer = AutoTokenizer.from_pretrained(structure(name))
    assert found.ids == tokenizer.get_vocab()
    assert found.roles["eos_token"] == tokenizer.eos_token
    assert found.rows == VOCAB


def test_the_trained_fixtures_share_one_vocabulary(fixtures_dir: Path) -> None:
    models = [open_checkpoint(fixtures_dir / name) for name in ("base", "uni", "arith", "v2")]
    assert explain_difference(models) is None
    assert len(read_vocabulary(models[0]).ids) == 1024


def test_tables_that_are_not_known_as_such_are_told(tmp_path: Path) -> None:
    count = len(speakers.bpe(speakers.TEXTS["fox"], ["<|end|>"]).get_vocab())
    more = {"extra.bag": np.zeros((count, 2), np.float32)}
    more["model.layers.0.extra"] = np.zeros(count, np.float32)
    assert unknown_tables(speakers.speaker(tmp_path, "fox", more=more)) == ["extra.bag"]


def test_a_special_token_that_no_file_places_gets_the_id_that_loading_gives_it(
    tmp_path: Path,
) -> None:
    folder = speakers.speaker(tmp_path, "fox").root
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "pad_token": "<|pad|>",
        "unk_token": {"content": "<|unk|>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = read_vocabulary(open_checkpoint(folder)).ids
    last = len(found) - 2
    assert {found["<|pad|>"], found["<|unk|>"]} == {last, last + 1}
    assert found == AutoTokenizer.from_pretrained(folder).get_vocab()


def test_older_files_are_read_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    folder = speakers.speaker(tmp_path, "fox").root
    ids = read_vocabulary(open_checkpoint(folder)).ids
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "added_tokens.json").write_text(json.dumps({"<|x|>": len(ids)}))
    decoder = {str(len(ids) + 1): {"content": "<|y|>", "special": True}}
    settings = {"eos_token": "<|end|>", "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = read_vocabulary(open_checkpoint(folder))
    assert found.ids == {**ids, "<|x|>": len(ids), "<|y|>": len(ids) + 1}
    assert found.added["<|y|>"]["special"]
    assert found.document is None


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, length = len(data), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


PIECES = ["<unk>", "<s>", "\u2581the", "x" * 200]


def test_the_pieces_of_a_sentencepiece_model_are_read(tmp_path: Path) -> None:
    folder = speakers.save(tmp_path / "m", None, mark=1, rows=9)
    score, kind = b"\x15\x00\x00\x80\xbf", b"\x18\x02"
    pieces = [field(1, field(1, piece.encode()) + score + kind) for piece in PIECES]
    (folder / "tokenizer.model").write_bytes(b"".join(pieces) + field(2, b"\x08\x01"))
    found = read_vocabulary(open_checkpoint(folder))
    assert found.ids == {piece: number for number, piece in enumerate(PIECES)}
    assert (found.kind, found.alphabet) == ("SentencePiece", "spaces")


BROKEN = {
    "tokenizer.model": [b"", b"\x0a\xff", b"\xff" * 9, b"\x0f", b"\x0a\x03\x0a\x01\xff"],
    "tokenizer.json": [b"{}", b'{"model": {"vocab": {"a": "b"}}}', b'{"model": {"vocab": [1]}}'],
    "spiece.model": [b"x"],
    "tekken.json": [b"{}"],
}


@pytest.mark.parametrize(("name", "data"), [(n, d) for n, every in BROKEN.items() for d in every])
def test_a_broken_or_unread_tokenizer_is_told(tmp_path: Path, name: str, data: bytes) -> None:
    folder = speakers.save(tmp_path / "m", None, mark=1, rows=9)
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError):
        read_vocabulary(open_checkpoint(folder))


ADDED = [
    5,
    {"a": 1},
    [{"id": 1 << 40, "content": "x"}],
    [3],
    [{"content": "x"}],
    [{"id": "y", "content": "x"}],
    [{"id": -1, "content": "x"}],
]


@pytest.mark.parametrize("added", ADDED)
def test_broken_added_tokens_are_told(tmp_path: Path, added: object) -> None:
    folder = speakers.speaker(tmp_path, "fox").root
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**document, "added_tokens": added}))
    with pytest.raises(CheckpointError):
        read_vocabulary(open_checkpoint(folder))


def test_a_model_without_an_embedding_has_no_vocabulary(tmp_path: Path) -> None:
    save_file({"model.norm.weight": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no token embedding"):
        find_tables(open_checkpoint(tmp_path))


def test_files_that_are_written_otherwise_are_no_difference(tmp_path: Path) -> None:
    first = speakers.speaker(tmp_path, "fox")
    other = tmp_path / "other"
    shutil.copytree(first.root, other)
    document = json.loads((other / "tokenizer.json").read_text())
    document["model"]["vocab"] = dict(sorted(document["model"]["vocab"].items()))
    (other / "tokenizer.json").write_text(json.dumps(document, indent=3))
    assert explain_difference([first, open_checkpoint(other)]) is None


def test_the_first_differences_are_shown(tmp_path: Path) -> None:
    models = [
        speakers.speaker(tmp_path, "fox", ("<|a|>", "<|end|>")),
        speakers.speaker(tmp_path, "sums", ("<|b|>", "<|end|>", "<|c|>")),
    ]
    found = explain_difference([models[0], models[0], models[1]]) or ""
    assert f"{models[0].ref} has 290 tokens in 290 rows" in found
    assert "0 is '<|a|>' and '<|b|>'" in found
    assert "ids differ in all" in found


def test_rows_alone_are_a_difference(tmp_path: Path) -> None:
    first = speakers.speaker(tmp_path / "one", "fox")
    padded = speakers.speaker(tmp_path / "two", "fox", padding=5)
    found = explain_difference([first, padded])
    assert found is not None
    assert "has 289 rows" in found
    assert "has 294" in found


def test_tables_inside_layers_keep_a_vocabulary_from_changing(tmp_path: Path) -> None:
    more = {"model.embed_tokens_per_layer.weight": np.zeros((9, 2), np.float32)}
    models = [
        speakers.speaker(tmp_path, "fox", more=more),
        speakers.speaker(tmp_path, "sums"),
    ]
    assert unify(models, choice="base", base=0).maps
    with pytest.raises(CheckpointError, match="for every layer"):
        unify(models, choice="sums", base=0, names=["fox", "sums"])


@pytest.mark.parametrize("merges", [[1], ["a b", ["a", "b"]], {"a": 1}])
def test_broken_merges_are_told(tmp_path: Path, merges: object) -> None:
    models = [speakers.speaker(tmp_path, name) for name in ("fox", "sums")]
    file = models[1].root / "tokenizer.json"
    document = json.loads(file.read_text())
    document["model"]["merges"] = merges
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="broken merges"):
        unify(models, choice="union", base=0)


CODE = """
import hashlib, sys
from surgery.checkpoint import open_checkpoint
from surgery.vocabulary import unify
made = unify([open_checkpoint(path) for path in sys.argv[1:]], choice="union", base=0)
keys = [t.key for c in made.checkpoints for t in c.tensors.values() if hasattr(t, "key")]
told = repr([made.config, dict(made.written), made.facts, made.notes, keys])
assert not {"torch", "transformers", "tokenizers"} & set(sys.modules)
print(hashlib.sha256(told.encode()).hexdigest())
"""


def test_a_union_needs_no_torch_and_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    roots = [
        str(speakers.speaker(tmp_path, name, special).root)
        for name, special in (("fox", ["<|end|>"]), ("sums", ["<|b|>", "<|end|>", "<|c|>"]))
    ]
    digests = {
        subprocess.run(
            [sys.executable, "-c", CODE, *roots],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(digests) == 1
