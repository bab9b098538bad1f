"""Vocabularies: read, compared, united, and the tables that have a row for every token."""

from surgery.vocabulary.explain import explain_difference
from surgery.vocabulary.permute import permuted
from surgery.vocabulary.read import Vocabulary, read_vocabulary
from surgery.vocabulary.rows import RowMap
from surgery.vocabulary.tables import Table, find_tables
from surgery.vocabulary.template import choose_template, find_template
from surgery.vocabulary.unify import Unified, unify

__all__ = [
    "RowMap",
    "Table",
    "Unified",
    "Vocabulary",
    "choose_template",
    "explain_difference",
    "find_tables",
    "find_template",
    "permuted",
    "read_vocabulary",
    "unify",
]
