"""Another model's tokenizer, with rows for its tokens in this model's own space."""

from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np

from growth.vocab.choices import Method
from growth.vocab.newrows import NewRows
from growth.vocab.pieces import Cutter
from growth.vocab.rebuild import refuse_bare, vocabulary_plan
from growth.vocab.sparse import Sparse, sparse_step
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import RecipeError
from surgery.plan import Plan, Step
from surgery.vocabulary.alphabet import spelled
from surgery.vocabulary.config import Move
from surgery.vocabulary.donor import choose_files, new_configs
from surgery.vocabulary.read import Vocabulary, read_vocabulary
from surgery.vocabulary.rows import Numbers, own_rows
from surgery.vocabulary.tables import MATRIX, Table, embedding, find_tables

K = 64


def transplant(base: Checkpoint, donor: Checkpoint, *, method: Method = "omp", k: int = K) -> Plan:
    """Give a model the tokenizer of another; the rows of tokens that both have are copied.

    A token that only the donor has gets a row by `omp`: the donor's row of it is approximated by
    a sum of `k` of the donor's rows of shared tokens, and the same sum is taken of the model's own
    rows, embedding and head each by themselves; by `subword`: the mean of the pieces that the
    model's old tokenizer cuts it into; or by `mean`: the mean of all rows.

    Raises:
        RecipeError: the two share fewer than `k` tokens, or the method is not known.
        CheckpointError: a tokenizer cannot be read.

    Source: arXiv 2506.06607. Deviation: atoms are chosen by their angle to what is left, as for
    atoms of one length, so that long rows are not preferred.
    """
    for model in (base, donor):
        refuse_bare(model, "transplanted")
    if method not in get_args(Method):
        raise RecipeError(f"--method {method}", f"is none of {', '.join(get_args(Method))}")
    old, new = read_vocabulary(base), read_vocabulary(donor)
    if old.ids == new.ids:
        raise RecipeError(donor.ref, f"has the same tokens as {base.ref}", "nothing would change")
    size = max(new.rows, new.end)
    own = own_rows([old], new, new.ids, size)[0]
    named = _named(own, new)
    _check(method, k, int((named[: new.rows] >= 0).sum()), donor.ref)
    rows = _rows(old, new, named, method)
    files = choose_files((base, donor), donor=0, source=1, template=None)
    config, configs, lost = new_configs(base, donor, size=size, move=_mover(old, new, size))
    return vocabulary_plan(
        base,
        rows,
        operation="vocab transplant",
        parameters={"method": method, "k": k},
        config=config,
        carried=files.carried,
        written={**files.written, **configs},
        facts={"tokens": len(new.ids), "shared": int((named >= 0).sum())}
        | _summed(rows, new, method),
        notes=(_told(rows, new), *files.notes, *lost, *_roles(named, new)),
        others=(donor,),
        make=_maker(donor, new, named, k) if method == "omp" else lambda _: None,
    )


def _summed(rows: NewRows, new: Vocabulary, method: Method) -> dict[str, dict[str, int]]:
    """Return how the rows are made where matching pursuit makes them."""
    if method != "omp":
        return {}
    ids = np.fromiter(new.ids.values(), np.int64)
    sums = int((rows.copy[ids[ids < new.rows]] < 0).sum())
    counts = {**rows.counts(), "sums of shared rows": sums}
    counts["mean"] -= sums
    return {"made_of": {name: count for name, count in counts.items() if count}}


def _named(own: Numbers, new: Vocabulary) -> Numbers:
    """Return own rows by new id, without those that stand for no token."""
    found = np.full_like(own, -1)
    ids = np.fromiter(new.ids.values(), np.int64)
    found[ids] = own[ids]
    return found


def _check(method: Method, k: int, shared: int, ref: str) -> None:
    if method == "omp" and k < 1:
        raise RecipeError(f"--k {k}", "is below 1", f"the paper takes {K}")
    least = k if method == "omp" else 1
    if shared < least:
        fact = f"shares {shared} tokens with the model, and {least} are needed"
        raise RecipeError(ref, fact, "take --method subword, or a lower --k")


def _rows(old: Vocabulary, new: Vocabulary, named: Numbers, method: Method) -> NewRows:
    """Return the rows of tables that matching pursuit does not make."""
    pieces: dict[int, Sequence[int]] = {}
    if method == "subword":
        cutter = Cutter(old)
        texts = {n: text for text, n in spelled(new.ids, new.added, new.alphabet).items()}
        fresh = (number for number in new.ids.values() if named[number] < 0 and number in texts)
        cut = ((number, cutter.rows(texts[number])) for number in fresh)
        pieces = {number: rows for number, rows in cut if rows}
    return NewRows(copy=named, pieces=pieces, known=min(old.end, old.rows))


def _maker(
    donor: Checkpoint, new: Vocabulary, named: Numbers, k: int
) -> Callable[[Table], Step | None]:
    theirs = find_tables(donor)
    first = embedding(donor)
    ids = np.sort(np.fromiter(new.ids.values(), np.int64))
    shared, fresh = ids[named[ids] >= 0], ids[named[ids] < 0]
    rows = Sparse(
        size=len(named), shared=shared, base=named[shared], donor=shared[shared < new.rows],
        fresh=fresh[fresh < new.rows], steps=k,
    )  # fmt: skip

    def make(table: Table) -> Step | None:
        if len(table.tensor.shape) != MATRIX or table.axis:
            return None  # a bias: the mean of all entries
        other = _counterpart(table, [t for t in theirs.values() if t.axis == 0], first)
        return sparse_step(table.tensor, other, rows)

    return make


def _counterpart(table: Table, theirs: Sequence[Table], first: TensorInfo) -> TensorInfo:
    """Return the donor's head for a head, its embedding for all else or where its head is tied."""
    heads = [t.tensor for t in theirs if t.head and len(t.tensor.shape) == MATRIX]
    return heads[0] if table.head and heads else first


def _mover(old: Vocabulary, new: Vocabulary, size: int) -> Move:
    """Return the function from an old id to the new one of its token."""
    names = {number: token for token, number in old.ids.items()}
    taken = set(new.ids.values())

    def move(number: int) -> int | None:
        if number in names:
            return new.ids.get(names[number])
        return number if number < size and number not in taken else None

    return move


def _told(rows: NewRows, new: Vocabulary) -> str:
    known = int((rows.copy >= 0).sum())
    return f"{known} of the tokenizer's {len(new.ids)} tokens keep their rows"


def _roles(named: Numbers, new: Vocabulary) -> list[str]:
    """Tell of special tokens that the model has never seen."""
    unseen = [t for t in dict.fromkeys(new.roles.values()) if named[new.ids[t]] < 0]
    told = f"the model has not learned to use {', '.join(unseen)}, whose rows are made up"
    return [told] if unseen else []
