"""What linearizations cost, as the records of the models tell it."""

from collections.abc import Iterator, Mapping

from surgery.report.blocks import Block, Heading, Section, Table, Text, shown
from surgery.report.fields import Fields, named
from surgery.report.lineage import Ancestor
from surgery.report.reading import Collected

OPERATION = "linearize stages"
HEADINGS = (
    "model", "bits/byte", "more than the teacher", "95% interval", "KL, nats", "same top token",
    "closed of swa-sink", "95% interval", "closed of untrained", "95% interval",
)  # fmt: skip
ABOUT = (
    "Bits per byte on text that nothing trained on. swa-sink is a sliding window with attention "
    "sinks in the same layers, without training; closed is the share of the bits between such a "
    "row and the teacher. The last row is the model without its linear branch."
)


def linearized(collected: Collected) -> Section:
    """Return the table of each linearized model that was measured."""
    made = [m for m in collected.lineage.made if m.operation == OPERATION]
    blocks = [block for model in made for block in _blocks(model, alone=len(made) == 1)]
    return Section("linearized", "Linearization", blocks, ABOUT)


def _blocks(model: Ancestor, *, alone: bool) -> Iterator[Block]:
    facts = model.record.some("facts") if model.record else None
    told = facts.one("table") if facts else None
    if facts is None or told is None:
        return
    if not alone:
        yield Heading(model.name)
    yield Table(HEADINGS, [_row(row) for row in told.each("rows")])
    texts = ", ".join(named(text) for text in told.some("texts").values)
    yield Text(f"{named(told.text('model') or '-')} on {texts}; {_state(facts)}")


def _row(row: Fields) -> tuple[str, ...]:
    closed = row.some("closed")
    shares = (_share(closed.one(name)) for name in ("swa-sink", "untrained"))
    return (
        row.text("name") or "-",
        shown(row.number("bits_per_byte"), ".4f"),
        shown(row.number("more"), "+.4f"),
        _interval(row, "+.4f"),
        shown(row.number("kl"), ".4f"),
        shown(row.number("agreement"), ".1%"),
        *(cell for share in shares for cell in share),
    )


def _share(found: Fields | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return shown(found.number("share"), ".0%"), _interval(found, ".0%")


def _interval(found: Fields, form: str) -> str:
    low, high = found.number("low"), found.number("high")
    return "-" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def _state(facts: Fields) -> str:
    figures: Mapping[str, str] = {
        key: shown(facts.number(key), ",.0f")
        for key in ("state_bytes", "kv_bytes_per_token", "break_even")
    }
    return (
        f"its linear layers keep {figures['state_bytes']} bytes a row, where softmax attention "
        f"keeps {figures['kv_bytes_per_token']} a token: fewer from {figures['break_even']} tokens"
    )
