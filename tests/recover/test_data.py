"""Rows to train on: their order, their mixture, and what is refused before the first step."""

from __future__ import annotations

import builtins
import importlib
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from corpora import corpus_of
from surgery.errors import CheckpointError, RecipeError, TrainError
from surgery.evaluate.tokens import Mark
from surgery.recover.data import IGNORED, Data, Rows, Source, open_rows, read_data

MARK = Mark(0, every_window=False)


class Package:
    """The little of the datasets package that is used, and whether it shows progress."""

    bars = True

    @classmethod
    def are_progress_bars_disabled(cls) -> bool:
        return not cls.bars

    @classmethod
    def disable_progress_bars(cls) -> None:
        cls.bars = False

    @classmethod
    def enable_progress_bars(cls) -> None:
        cls.bars = True


@pytest.fixture(scope="module")
def tokenizer(fixtures_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fixtures_dir / "base")


def data_of(main: int, replay: int = 0, share: Fraction = Fraction(0)) -> Data:
    """As many documents of four tokens, those of the replay with high ids."""
    first = [[i, i, i, i] for i in range(main)]
    second = [[1000 + i] * 4 for i in range(replay)]
    again = corpus_of(second) if replay else None
    return Data(main=corpus_of(first), replay=again, share=share)


def firsts(rows: Rows, indices) -> list[int]:
    return [int(rows.row(index).ids[0]) for index in indices]


def test_the_order_is_a_pure_function_of_seed_and_index():
    rows, same = (Rows.of(data_of(30), context=4, seed=7) for _ in range(2))
    indices = [95, 3, 3, 61, 0, 29, 30, 64, 95]  # any order, over epochs
    assert firsts(rows, indices) == [firsts(same, [index])[0] for index in indices]
    assert firsts(rows, range(30)) != firsts(Rows.of(data_of(30), context=4, seed=8), range(30))


def test_processes_that_deal_rows_out_see_the_order_of_one():
    rows = Rows.of(data_of(12), context=4, seed=0)
    dealt = {rank: firsts(rows, range(rank, 24, 3)) for rank in range(3)}
    assert [dealt[i % 3][i // 3] for i in range(24)] == firsts(rows, range(24))


def test_every_epoch_has_all_rows_in_an_order_of_its_own():
    rows = Rows.of(data_of(30), context=4, seed=0)
    epochs = [firsts(rows, range(30 * e, 30 * e + 30)) for e in range(3)]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("share", ["1/20", "1/3", "1/2", "9/10"])
def test_every_prefix_has_its_share_of_replay_to_within_a_row(share):
    rows = Rows.of(data_of(40, 7, Fraction(share)), context=4, seed=0)
    replayed = np.cumsum([first >= 1000 for first in firsts(rows, range(200))])
    exact = np.arange(1, 201) * float(Fraction(share))
    assert np.abs(replayed - exact).max() < 1 + 1e-9


def test_an_epoch_has_the_main_data_once_and_replay_has_epochs_of_its_own():
    rows = Rows.of(data_of(30, 4, Fraction(1, 4)), context=4, seed=0)
    counts = Counter(firsts(rows, range(len(rows))))
    assert len(rows) == 39
    assert {counts[i] for i in range(30)} == {1}
    assert sorted(counts[1000 + i] for i in range(4)) == [2, 2, 2, 3]


@pytest.mark.parametrize(("main", "share"), [(1, "1/2"), (5, "1/3"), (13, "1/20"), (7, "9/10")])
def test_an_epoch_ends_with_the_last_row_of_the_main_data(main, share):
    rows = Rows.of(data_of(main, 3, Fraction(share)), context=4, seed=0)
    own = sum(first < 1000 for first in firsts(rows, range(len(rows))))
    assert own == main
    assert firsts(rows, [len(rows) - 1])[0] < 1000


def test_tokens_of_an_epoch_are_those_of_its_rows():
    rows = Rows.of(data_of(10, 3, Fraction(1, 3)), context=6, seed=0)
    assert rows.tokens == 4 * len(rows)


def test_a_stored_row_has_one_place_whenever_it_comes():
    rows = Rows.of(data_of(9, 2, Fraction(1, 4)), context=4, seed=0)
    by_place = {}
    for index in range(50):
        row = rows.row(index).ids.tolist()
        assert by_place.setdefault(rows.place(index), row) == row
        assert rows.at(rows.place(index)).ids.tolist() == row
    assert set(by_place) == set(range(rows.stored))


def test_only_chosen_documents_are_in_the_rows():
    rows = Rows.of(data_of(9), context=4, seed=0, chosen=np.array([5, 2]))
    assert sorted(firsts(rows, range(len(rows)))) == [2, 5]


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"context": 5}, {"packed": False}, {"chosen": np.array([0, 1])}],
)
def test_the_digest_tells_what_shapes_the_rows(change):
    given = {"seed": 0, "context": 4, "packed": True, "chosen": None}
    data = data_of(3)
    assert Rows.of(data, **given).digest == Rows.of(data_of(3), **given).digest
    assert Rows.of(data, **given).digest != Rows.of(data, **given | change).digest


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_texts_have_the_marks_and_duplicates_and_empty_ones_are_counted(tokenizer, tmp_path):
    texts = lines({"text": "import os"}, {"text": " "}, {"text": "import os"}, {"text": "def f"})
    sources = [Source(write(tmp_path, "a.jsonl", texts)), Source(write(tmp_path, "b.txt", "x = 1"))]
    rows = open_rows(sources, tokenizer, context=64, seed=0, mark=MARK)
    told = rows.summary()
    assert (told["documents"], told["empty"], told["duplicates"]) == (4, 1, 1)
    assert [file["documents"] for file in told["files"]] == [3, 1]
    corpus = rows.data.main
    assert [corpus.name(n).rpartition("/")[2] for n in range(4)] == [
        "a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "b.txt:1",
    ]  # fmt: skip
    end = tokenizer.eos_token_id
    assert corpus.tokens(0).tolist() == [0, *tokenizer("import os")["input_ids"], end]


def test_the_digest_of_a_file_is_its_sha256(tokenizer, tmp_path):
    import hashlib

    path = write(tmp_path, "a.jsonl", lines({"text": "import os"}))
    rows = open_rows([Source(path)], tokenizer, context=8, seed=0, mark=MARK)
    told = rows.summary()["files"][0]["sha256"]
    assert told == hashlib.sha256(path.read_bytes()).hexdigest()


def test_progress_is_told_documents_and_tokens(tokenizer, tmp_path):
    path = write(tmp_path, "a.jsonl", lines(*({"text": f"x = {i}"} for i in range(1500))))
    told = []
    data = read_data([Source(path)], tokenizer, mark=MARK, progress=lambda *at: told.append(at))
    assert [documents for documents, _ in told] == [1024, 1500]
    assert told[-1][1] == len(data.main.ids)


BROKEN = {
    "not utf-8": (b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl:2: byte 10 is not UTF-8"),
    "not json": ('{"text": "a"}\n\n{"text": \n', "a.jsonl:3: the line is not JSON"),
    "a list": ("[1]\n", "a.jsonl:1: the line is a JSON list"),
    "no text": ('{"body": "a"}\n', 'no string under "text" and no "messages" (keys: body)'),
    "half a pair": ('{"text": "\\ud800"}\n', "a.jsonl:1: the text holds half a surrogate pair"),
    "messages are text": ('{"messages": "hi"}\n', '"messages" is not a list of objects'),
    "no template": (
        '{"messages": [{"role": "user", "content": "a"}]}\n',
        "a.jsonl:1: is a chat, and the model's tokenizer has no chat template",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_line_is_told_with_its_file_and_number(tokenizer, tmp_path, case):
    content, words = BROKEN[case]
    path = write(tmp_path, "a.jsonl", content)
    with pytest.raises((CheckpointError, RecipeError)) as told:
        open_rows([Source(path)], tokenizer, context=8, seed=0, mark=MARK)
    assert words in str(told.value)


def refused(case: str, folder) -> list[Source]:
    path = write(folder, "a.txt", "x = 1")
    empty = write(folder, "b.jsonl", lines({"text": ""}))
    return {
        "no data": [],
        "only replay": [Source(path, 0.1)],
        "empty data": [Source(empty)],
        "empty replay": [Source(path), Source(empty, 0.1)],
        "named twice": [Source(path), Source(path)],
        "differing shares": [Source(path), Source(path, 0.1), Source(empty, 0.2)],
        "a share of all": [Source(path), Source(path, 1.0)],
        "a share of none": [Source(path), Source(path, 0.0)],
    }[case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no data", "--data: no data is named"),
        ("only replay", "--data: no data is named"),
        ("empty data", "--data: nothing to predict in"),
        ("empty replay", "--replay-data: nothing to predict in"),
        ("named twice", "is named twice"),
        ("differing shares", "--replay: the replay sources name different shares"),
        ("a share of all", "--replay: 1 of the rows is outside 0 to 1"),
        ("a share of none", "--replay: 0 of the rows is outside 0 to 1"),
    ],
)
def test_data_that_makes_no_sense_is_refused(tokenizer, tmp_path, case, words):
    with pytest.raises(RecipeError) as told:
        open_rows(refused(case, tmp_path), tokenizer, context=8, seed=0, mark=MARK)
    assert words in str(told.value)


def test_a_missing_file_is_told(tokenizer, tmp_path):
    for name in ("no.txt", "no.jsonl"):
        with pytest.raises(CheckpointError, match="no such file"):
            open_rows([Source(tmp_path / name)], tokenizer, context=8, seed=0, mark=MARK)


def test_a_token_without_an_embedding_is_refused():
    rows = Rows.of(data_of(30), context=4, seed=0)
    rows.check_fits(30, "student")
    with pytest.raises(TrainError, match="student: token 29 of the data has no embedding"):
        rows.check_fits(29, "student")


@pytest.mark.parametrize("path", ["a.parquet", "hf://datasets/owner/name"])
def test_what_needs_an_extra_says_so(tokenizer, tmp_path, monkeypatch, path):
    def missing(name: str, *_: object) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    place = path if "://" in path else tmp_path / path
    with pytest.raises(RecipeError, match=r"needs the datasets package.*model-surgery\[data\]"):
        open_rows([Source(place)], tokenizer, context=8, seed=0, mark=MARK)


def test_parquet_gives_what_lines_give(tokenizer, tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")

    texts = [f"x = {i}" for i in range(20)]
    table = pyarrow.table({"text": texts, "other": list(range(20))})
    parquet.write_table(table, tmp_path / "a.parquet")
    same = write(tmp_path, "a.jsonl", lines(*({"text": text} for text in texts)))
    found = [
        read_data([Source(path)], tokenizer, mark=MARK).main.ids.tolist()
        for path in (tmp_path / "a.parquet", same)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("content", "words"), [(b"no", "is not a parquet file"), (None, 'has no column "text"')]
)
def test_a_parquet_file_that_does_not_fit_is_told(tokenizer, tmp_path, content, words):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")

    path = tmp_path / "a.parquet"
    if content is None:
        parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_rows([Source(path)], tokenizer, context=8, seed=0, mark=MARK)


def test_a_data_set_is_read_by_name_revision_and_split(tokenizer, monkeypatch):
    asked = {}

    class Found:
        column_names = ("id", "text")

        def select_columns(self, names):
            assert names == ["text"]
            return [{"text": "import os"}, {"text": ""}]

    class Fake(Package):
        @classmethod
        def load_dataset(cls, name, **told):
            assert not cls.bars
            asked.update(told, name=name)
            return Found()

    real = importlib.import_module
    fake = {"datasets": Fake}
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *rest: fake.get(name) or real(name, *rest)
    )
    rows = open_rows(
        [Source("hf://datasets/owner/name@abc:validation")],
        tokenizer, context=8, seed=0, mark=MARK,
    )  # fmt: skip
    assert asked == {"name": "owner/name", "revision": "abc", "split": "validation"}
    assert Fake.bars
    assert rows.summary()["documents"] == 1
    assert rows.summary()["empty"] == 1


def test_a_data_set_that_cannot_be_loaded_is_one_sentence(tokenizer, monkeypatch):
    class Fake(Package):
        @staticmethod
        def load_dataset(name, **_):
            raise builtins.ConnectionError("no\nnetwork")

    monkeypatch.setattr(importlib, "import_module", lambda name, *_: Fake)
    with pytest.raises(CheckpointError, match=r"cannot be loaded \(ConnectionError: no network\)"):
        open_rows([Source("hf://datasets/a/b")], tokenizer, context=8, seed=0, mark=MARK)


def test_rows_have_one_length_and_plain_types(tokenizer, tmp_path, fixtures_dir):
    rows = open_rows(
        [Source(fixtures_dir / "heldout" / "mix.jsonl")], tokenizer, context=100, seed=0, mark=MARK
    )
    for index in range(len(rows)):
        row = rows.row(index)
        for array in (row.ids, row.targets, row.positions):
            assert array.dtype == np.int64
            assert array.shape == (100,)
        assert ((row.targets == IGNORED) | (row.targets >= 0)).all()
