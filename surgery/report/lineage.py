"""Where models come from: the inputs in their records, and the inputs of those."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.checkpoint import open_checkpoint
from surgery.checkpoint.jsonfile import read_json_object
from surgery.checkpoint.refs import split_ref
from surgery.errors import CheckpointError
from surgery.provenance import FORMAT, RECORD, read_record
from surgery.report.fields import Fields

RUN_FOLDER = ".surgery-run"
MOST = 300  # models in one lineage; beyond, a picture shows nothing


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A model of a lineage.

    Attributes:
        key: what tells it apart: its real path, or its ref where it is not here.
        name: its last part.
        record: how it was made, None where nothing tells.
        revision: the commit of a hub ref, or None.
        inputs: keys of what it was made of.
        teachers: keys of the models whose answers it learnt.
    """

    key: str
    name: str
    record: Fields | None = None
    revision: str | None = None
    inputs: tuple[str, ...] = ()
    teachers: tuple[str, ...] = ()

    @classmethod
    def at(cls, path: Path) -> "Ancestor | None":
        """Return the model at a local path, or None where there is none.

        Raises:
            CheckpointError: its record is broken.
        """
        place = path.expanduser()
        if place.is_dir():
            file = place / RECORD
            record = Fields(_checked(read_json_object(file), file), file) if file.exists() else None
        elif place.is_file():
            found = read_record(open_checkpoint(place))
            record = Fields(found, place) if found is not None else None
        else:
            return None
        real = place.resolve()
        within = real.parent.name if real.parent.name.endswith(RUN_FOLDER) else ""
        return cls(str(real), f"{within}/{real.name}" if within else real.name, record)

    @property
    def before(self) -> tuple[str, ...]:
        """Keys of all that it comes from."""
        return self.inputs + self.teachers

    @property
    def operation(self) -> str | None:
        """What made it, or None."""
        return self.record.text("operation") if self.record else None

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds: the record without the digests of each tensor."""
        kept = ("operation", "parameters", "facts", "notes", "versions")
        record = self.record.values if self.record else {}
        return {
            "name": self.name,
            "path": self.key,
            "revision": self.revision,
            "inputs": list(self.inputs),
            "teachers": list(self.teachers),
            **{key: record[key] for key in kept if key in record},
        }


@dataclass(frozen=True, slots=True)
class Lineage:
    """Models by their keys; inputs that were not followed are among them.

    Attributes:
        models: by key, those that the user named first.
        complete: False where there were too many to follow them all.
    """

    models: Mapping[str, Ancestor]
    complete: bool = True

    @property
    def made(self) -> list[Ancestor]:
        """Models whose record was read."""
        return [model for model in self.models.values() if model.record is not None]

    def generations(self) -> dict[str, int]:
        """Return for each model how many steps the longest way from an origin takes.

        A circle, which only a forged record has, is cut where it closes.
        """
        found: dict[str, int] = {}
        for key in self.models:
            _measure(self.models, key, found)
        return found


def trace(roots: Iterable[Ancestor]) -> Lineage:
    """Follow inputs as far as they are local."""
    models = {root.key: root for root in roots}
    waiting = list(models.values())
    while waiting and len(models) < MOST:
        child = waiting.pop(0)
        inputs, teachers = list(_inputs(child)), list(_teachers(child))
        for found in [*inputs, *teachers]:
            if found.key not in models:
                models[found.key] = found
                waiting.append(found)
        models[child.key] = replace(child, inputs=_keys(inputs), teachers=_keys(teachers))
    return Lineage(models, complete=not waiting)


def _keys(models: Iterable[Ancestor]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(model.key for model in models))


def _inputs(child: Ancestor) -> Iterator[Ancestor]:
    """Yield the inputs of a model, local ones with their own records."""
    for source in child.record.each("inputs") if child.record else ():
        ref, revision = source.text("ref"), source.text("revision")
        for part in split_ref(ref) if ref else ():
            yield _resolved(part, revision)


def _teachers(child: Ancestor) -> Iterator[Ancestor]:
    if child.operation == "recover" and child.record:
        ref = child.record.some("facts").text("teacher")
        if ref:
            yield _resolved(ref, None)


def _resolved(ref: str, revision: str | None) -> Ancestor:
    """Return an input: a local one as it is now, any other by what the record tells."""
    if revision is None:
        with suppress(CheckpointError, OSError, ValueError):
            found = Ancestor.at(Path(ref))
            if found is not None:
                return found
    name = ref if revision else Path(ref).name
    return Ancestor(f"{ref}@{revision}" if revision else ref, name or ref, None, revision)


def _checked(record: dict[str, Any], place: Path) -> dict[str, Any]:
    if record.get("surgery") != FORMAT:
        fact = f"is a record of format {record.get('surgery')!r}, this version reads {FORMAT}"
        raise CheckpointError(place, fact, "use the version that wrote it")
    return record


def _measure(models: Mapping[str, Ancestor], root: str, found: dict[str, int]) -> None:
    """Add the generation of a model and of all before it, without recursion."""
    stack, open_ = [root], set[str]()
    while stack:
        key = stack[-1]
        before = [k for k in models[key].before if k in models and k not in open_ and k != key]
        missing = [k for k in before if k not in found]
        if missing and key not in found:
            open_.add(key)
            stack += missing
            continue
        stack.pop()
        open_.discard(key)
        found.setdefault(key, 1 + max((found[k] for k in before if k in found), default=-1))
