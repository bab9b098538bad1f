"""Models of a saved evaluation, by labels that tell them apart."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.report.fields import Fields, named

SHORT = 60  # characters of a label


@dataclass(frozen=True, slots=True)
class Measured:
    """A model of an evaluation."""

    label: str
    ref: str
    is_parent: bool
    fields: Fields


@dataclass(frozen=True, slots=True)
class Pair:
    """A child beside a parent."""

    child: str
    parent: str
    fields: Fields

    @property
    def label(self) -> str:
        """Return both names."""
        return f"{self.child} beside {self.parent}"


@dataclass(frozen=True, slots=True)
class Run:
    """A saved evaluation.

    Attributes:
        number: its place among those of the page, for ids.
        name: of its file; empty where it is the only one.
    """

    number: int
    name: str
    fields: Fields
    models: tuple[Measured, ...]

    @classmethod
    def of(cls, fields: Fields, number: int, *, alone: bool) -> "Run":
        """Return an evaluation with its models labelled."""
        models = list(fields.each("models"))
        labels = labelled([_told(model) for model in models])
        measured = (
            Measured(labels[i], model.text("ref") or "", model.flag("parent"), model)
            for i, model in enumerate(models)
        )
        return cls(number, "" if alone else fields.file.name, fields, tuple(measured))

    @property
    def labels(self) -> Mapping[str, str]:
        """Labels of models by the refs that tell them apart in the file."""
        return {model.ref: model.label for model in self.models}

    def pairs(self) -> Iterator[Pair]:
        """Yield each child beside each of its parents."""
        for model in self.models:
            for against in model.fields.each("against"):
                ref = against.text("ref") or ""
                parent = self.labels.get(ref) or short(named(against.text("name") or ref))
                yield Pair(model.label, parent, against)


def labelled(told: list[tuple[str, str]]) -> list[str]:
    """Return a label for each name and ref: the name, or more where names are the same."""
    names = Counter(name for name, _ in told)
    first = [short(name if names[name] == 1 else ref) for name, ref in told]
    again, seen = Counter(first), Counter[str]()
    labels = []
    for label in first:
        seen[label] += 1
        labels.append(label if again[label] == 1 else f"{label} ({seen[label]})")
    return labels


def short(text: str) -> str:
    """Return a label that fits: its beginning and its end."""
    text = " ".join(text.split()) or "(no name)"
    return text if len(text) <= SHORT else f"{text[: SHORT // 2]}...{text[-SHORT // 3 :]}"


def _told(model: Fields) -> tuple[str, str]:
    ref = model.text("ref") or ""
    name = model.text("name") or Path(ref).name
    return named(name), named(ref) if named(ref) != Path(ref).name else ref_of(ref)


def ref_of(ref: str) -> str:
    """Return the last two parts of a path."""
    return "/".join(Path(ref).parts[-2:]).lstrip("/")
