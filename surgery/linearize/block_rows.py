"""Rows by names, under which their hidden states lie on disk."""

from typing import Any

from surgery.evaluate.load import Source as FoundModel
from surgery.linearize.objective import measured_count
from surgery.linearize.transfer_ask import TransferAsk
from surgery.recover.data import Rows, Source, read_data
from surgery.recover.session import sources_of


class BlockRows:
    """What a run trains on and measures.

    Attributes:
        rows, held_out: as a session has them.
        found: for each name the rows, and an index at which they come.
        names: of all rows, in the order of the files.
    """

    def __init__(self, ask: TransferAsk, source: FoundModel) -> None:
        """Read and pack the data; documents of a row are kept apart by linearized models.

        Raises:
            CheckpointError, RecipeError: as `read_data`.
        """
        settings, read = ask.settings, (source.tokenizer, source.mark)
        common: dict[str, Any] = {"context": settings.context, "seed": settings.seed}
        self.rows = Rows.of(read_data(sources_of(ask), read[0], mark=read[1]), **common)
        self.held_out: Rows | None = None
        if ask.held_out:
            apart = [Source(path) for path in ask.held_out]
            self.held_out = Rows.of(read_data(apart, read[0], mark=read[1]), **common)
        self.found: dict[str, tuple[Rows, int]] = {}
        for index in range(settings.steps * settings.batch_rows):
            self.found.setdefault(self.name(self.rows, index), (self.rows, index))
        if self.held_out is not None:
            for index in range(measured_count(settings, self.rows, self.held_out)):
                self.found[self.name(self.held_out, index)] = (self.held_out, index)
        self.names = sorted(self.found)

    def name(self, rows: Rows, index: int) -> str:
        """Return the name of the row that comes at an index."""
        kind = "row" if rows is self.rows else "held"
        return f"{kind}-{rows.place(index):09d}"

    def check_fits(self, embeddings: int, model: str) -> None:
        """Refuse a model that has no embedding for some token; see `Rows.check_fits`."""
        for found in (self.rows, self.held_out):
            if found is not None:
                found.check_fits(embeddings, model)
