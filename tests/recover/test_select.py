"""Selection after PASER: clusters, budgets, conflicts, and the same choice again."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack

import numpy as np
import pytest

from corpora import corpus_of
from surgery.errors import RecipeError
from surgery.recover.clusters import cluster, featurize, k_means
from surgery.recover.data import Source, read_data
from surgery.recover.select import (
    Selection,
    allot,
    check_selection,
    choose,
    concepts,
    degradations,
    select,
)  # fmt: skip

NONE: frozenset[str] = frozenset()


def topics(count: int, size: int, length: int = 60) -> tuple[list[list[int]], np.ndarray]:
    """Documents of words of their own topic, and some words of all."""
    generator = np.random.default_rng(0)
    labels = np.arange(count * size) % count
    documents = [
        np.concatenate(
            [
                generator.integers(1000 * (label + 1), 1000 * (label + 1) + 40, length),
                generator.integers(0, 40, length // 3),
            ]
        ).tolist()
        for label in labels
    ]
    return documents, labels


def same_parts(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


def features_of(documents: list[list[int]]):
    return featurize([np.asarray(ids, np.int32) for ids in documents])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("count", [2, 5])
def test_documents_of_one_topic_are_one_cluster(count, seed):
    documents, labels = topics(count, 12)
    assert same_parts(cluster(features_of(documents), clusters=count, seed=seed), labels)


def test_clusters_are_those_of_the_whole_affinity(monkeypatch):
    """The textbook form: eigenvectors of the normalised matrix of all pairs."""
    documents, _ = topics(3, 20)
    features = features_of(documents)
    dense = np.concatenate([block for _, block in features.blocks()])
    affinity = dense @ dense.T
    roots = np.sqrt(affinity.sum(1))
    vectors = np.linalg.eigh(affinity / roots[:, None] / roots)[1][:, -3:]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    plain = k_means(vectors, 3, np.random.default_rng(0))
    monkeypatch.setattr("surgery.recover.clusters._BLOCK", 7)
    assert same_parts(cluster(features, clusters=3, seed=0), plain)


def test_more_clusters_than_documents_are_no_error():
    assert cluster(features_of([[1, 2], [3, 4]]), clusters=16, seed=0).max() <= 1
    assert cluster(features_of([[1]]), clusters=16, seed=0).tolist() == [0]


@pytest.mark.parametrize(
    ("whole", "weights", "room", "found"),
    [
        (10, [3, 1, 1], [99, 99, 99], [6, 2, 2]),
        (10, [1, 1, 1], [99, 99, 99], [4, 3, 3]),
        (10, [3, 1, 1], [2, 99, 99], [2, 4, 4]),  # what is full leaves its part to the others
        (10, [1, 0], [3, 99], [3, 0]),
        (10, [8, 1, 1], [1, 1, 99], [1, 1, 8]),
    ],
)
def test_budgets_are_in_proportion_to_degradation(whole, weights, room, found):
    assert allot(whole, np.array(weights, float), np.array(room)).tolist() == found


def test_the_most_degraded_documents_for_their_cost_are_chosen():
    degradation = np.array([1.0, 3.0, 2.0, 2.0])
    sizes = np.array([10, 10, 10, 1000])
    found = choose(degradation, np.zeros(4, int), [NONE] * 4, sizes, share=0.5, seed=0)
    assert found.documents == (1, 2)
    cost = degradation / np.log(sizes**2.0)
    assert sorted(found.documents) == sorted(np.argsort(-cost)[:2].tolist())


def test_clusters_that_lost_more_get_more_and_those_that_gained_nothing():
    labels = np.repeat([0, 1, 2], 20)
    degradation = np.repeat([3.0, 1.0, -1.0], 20)
    sizes = np.full(60, 10)
    found = choose(degradation, labels, [NONE] * 60, sizes, share=0.2, seed=0)
    assert [one.chosen for one in found.clusters] == [9, 3, 0]
    assert [one.degradation for one in found.clusters] == [3.0, 1.0, -1.0]


def test_a_document_that_joins_known_concepts_anew_is_passed_over():
    known = [frozenset(words) for words in ({"a", "b"}, {"c", "d"}, {"a", "c"}, {"a", "b", "e"})]
    degradation = np.array([4.0, 3.0, 2.0, 1.0])
    found = choose(degradation, np.zeros(4, int), known, np.full(4, 9), share=0.75, seed=0)
    assert found.documents == (0, 1, 3)
    assert found.clusters[0].conflicts == 1


def test_documents_without_a_loss_are_not_chosen():
    degradation = np.array([np.nan, 1.0, 2.0])
    found = choose(degradation, np.zeros(3, int), [NONE] * 3, np.full(3, 9), share=1, seed=0)
    assert found.documents == (1, 2)


def test_concepts_are_the_words_that_tell_a_document_apart():
    shared = ["the"] * 9
    found = concepts([[*shared, "axe", "axe"], [*shared, "bee"], [*shared]])
    assert "axe" in found[0]
    assert len(concepts([list("abcdefgh")])[0]) == 5


@pytest.mark.parametrize(
    ("share", "student", "parent", "words"),
    [
        (0.0, 9, 9, "--select-share: 0 of the documents is outside 0 to 1"),
        (1.5, 9, 9, "--select-share: 1.5 of the documents is outside 0 to 1"),
        (math.nan, 9, 9, "--select-share: nan of the documents is outside 0 to 1"),
        (0.5, 9, 8, "--select paser: compares losses, and the student has 9 tokens, the parent 8"),
    ],
)
def test_selections_that_cannot_be_are_refused(share, student, parent, words):
    with pytest.raises(RecipeError) as told:
        check_selection(share, student, parent)
    assert words in str(told.value)


def test_a_student_that_lost_nothing_is_refused():
    with pytest.raises(RecipeError, match="nowhere worse than its parent"):
        choose(np.zeros(2), np.zeros(2, int), [NONE] * 2, np.full(2, 9), share=0.5, seed=0)


@pytest.fixture(scope="module")
def models(fixtures_dir):
    """The arithmetic expert as parent, and the base, which cannot, as student."""
    from surgery.evaluate.load import find_device, find_dtype, load, open_source

    cpu = find_device("cpu")
    with ExitStack() as scratch:
        sources = [open_source(fixtures_dir / name, scratch) for name in ("base", "arith")]
        loaded = [load(one, device=cpu, dtype=find_dtype(None, cpu)) for one in sources]
    return sources[0], *loaded


@pytest.fixture(scope="module")
def mixed(models, fixtures_dir):
    """64 documents of ordinary text, then 64 of arithmetic."""
    paths = [fixtures_dir / "heldout" / f"{name}.jsonl" for name in ("mix", "arith")]
    source = models[0]
    return read_data([Source(path) for path in paths], source.tokenizer, mark=source.mark).main


ASK = {"seed": 0, "context": 128, "batch_tokens": 4096}


def test_what_the_student_cannot_do_is_what_is_chosen(models, mixed):
    source, student, parent = models
    found = select(mixed, source.tokenizer, student, parent, share=0.25, clusters=4, **ASK)
    assert len(found.documents) > 16
    assert np.mean(np.array(found.documents) >= 64) > 0.9
    again = select(mixed, source.tokenizer, student, parent, share=0.25, clusters=4, **ASK)
    assert again == found
    assert Selection.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_degradation_is_the_difference_of_mean_losses_of_what_is_trained_on(models, mixed):
    import torch

    _, student, parent = models
    given = {"context": 40, "batch_tokens": 4096}
    found = degradations(mixed, student, parent, **given)
    for number in (0, 70):
        ids = torch.from_numpy(mixed.tokens(number)[:41].astype(np.int64))
        with torch.inference_mode():
            losses = [
                torch.nn.functional.cross_entropy(
                    model.model(input_ids=ids[None, :-1]).logits[0], ids[1:]
                )
                for model in (student, parent)
            ]
        assert found[number] == pytest.approx(float(losses[0] - losses[1]), abs=1e-4)


def test_a_document_with_nothing_to_predict_in_the_context_has_no_degradation(models):
    _, student, parent = models
    corpus = corpus_of([[0, 5, 6, 7], [0, 5, 6, 7, 8, 9]])
    corpus.wanted[4:8] = False  # the first tokens of the second document
    found = degradations(corpus, student, parent, context=3, batch_tokens=64)
    assert np.isnan(found).tolist() == [False, True]
