"""The tokens that texts use, and whether a trimmed tokenizer cuts them as before."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from growth.vocab.closure import tried
from growth.vocab.pieces import load_tokenizer, parse_tokenizer
from growth.vocab.rebuild import refuse_bare
from growth.vocab.trim import as_ranges, read_kept, trim, trimmable
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError, RecipeError
from surgery.evaluate.documents import read_documents
from surgery.plan import Plan
from surgery.vocabulary.read import Vocabulary

BLOCK = 1 << 22  # letters that are cut at once


def trim_to_text(
    base: Checkpoint,
    *,
    texts: Sequence[Path],
    min_count: int = 1,
    keep: Path | None = None,
    keep_special: bool = True,
) -> Plan:
    """Plan a model with the tokens that texts use, and check that it cuts them as before.

    Args:
        texts: text files; of .jsonl files every line's "text".
        min_count: leave out tokens that are used fewer times. Above 1 the texts are cut
            differently where one is gone, and how much longer they get is told.
        keep: a file of further tokens to keep, one a line.
        keep_special: keep special tokens that nothing names, too.

    Raises:
        RecipeError: there is nothing to keep.
        CheckpointError: a text cannot be read.
        PlanError: the tokenizer cannot be trimmed, or would cut the texts in another way.
    """
    refuse_bare(base, "trimmed")
    if min_count < 1:
        raise RecipeError(f"--min-count {min_count}", "is below 1", "1 keeps every token used")
    if not texts and keep is None:
        raise RecipeError("vocab trim", "is given neither texts nor tokens", "add --text FILE")
    vocabulary = trimmable(base)
    core = load_tokenizer(vocabulary)
    core.no_truncation()
    core.no_padding()
    counts = _count(core, texts)
    ids = {number for number, count in counts.items() if count >= min_count}
    ids |= set(read_kept(keep, vocabulary)) if keep else set()
    if keep_special:
        ids |= {vocabulary.ids[t] for t, flags in vocabulary.added.items() if flags["special"]}
    ids |= _tried(vocabulary, core, texts)
    facts = {"texts": len(texts), "text_tokens_before": sum(counts.values())}
    ids = {number for number in ids if number < vocabulary.rows}
    plan = trim(base, ids=as_ranges(ids), facts=facts)
    return _checked(plan, vocabulary, core, texts, exact=min_count == 1)


def _count(core: Any, texts: Sequence[Path]) -> Counter[int]:  # noqa: ANN401 - a Tokenizer
    counts: Counter[int] = Counter()
    for blocks in _batches(texts):
        for encoding in core.encode_batch(blocks, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def _tried(vocabulary: Vocabulary, core: Any, texts: Sequence[Path]) -> set[int]:  # noqa: ANN401
    """Return what WordPiece tries in words that it does not know: without, it might know them."""
    if vocabulary.kind != "WordPiece":
        return set()
    words: set[str] = set()
    for blocks in _batches(texts):
        for block in blocks:
            plain = core.normalizer.normalize_str(block) if core.normalizer else block
            cut = core.pre_tokenizer.pre_tokenize_str(plain) if core.pre_tokenizer else [(plain, 0)]
            words.update(word for word, _ in cut)
    return {vocabulary.ids[piece] for word in words for piece in tried(vocabulary, word)}


def _checked(
    plan: Plan,
    vocabulary: Vocabulary,
    core: Any,  # noqa: ANN401 - a Tokenizer
    texts: Sequence[Path],
    *,
    exact: bool,
) -> Plan:
    """Cut the texts with both tokenizers; compare ids where nothing that is used has gone."""
    new = parse_tokenizer(plan.written["tokenizer.json"], vocabulary.ref)
    new.no_truncation()
    new.no_padding()
    place = {n: new.token_to_id(token) for token, n in vocabulary.ids.items()}
    total = 0
    for blocks in _batches(texts):
        old_cut, new_cut = (c.encode_batch(blocks, add_special_tokens=False) for c in (core, new))
        for before, after in zip(old_cut, new_cut, strict=True):
            total += len(after.ids)
            if exact and [place[number] for number in before.ids] != after.ids:
                fact = "would cut the texts in another way with the tokens that are left"
                raise PlanError(vocabulary.ref, fact, "name the tokens to keep: --keep FILE")
    return replace(plan, facts={**plan.facts, "text_tokens": total})


def _batches(texts: Sequence[Path]) -> Iterator[list[str]]:
    """Yield blocks of text, so many at a time that what they are cut into fits in memory."""
    batch: list[str] = []
    size = 0
    for document in read_documents(texts) if texts else ():
        for block in _blocks(document.text):
            batch.append(block)
            size += len(block)
            if size >= BLOCK:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _blocks(text: str) -> Iterator[str]:
    """Cut a long text behind ends of lines."""
    start = 0
    while len(text) - start > BLOCK:
        end = text.rfind("\n", start, start + BLOCK) + 1 or start + BLOCK
        yield text[start:end]
        start = end
    yield text[start:]
