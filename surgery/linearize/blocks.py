"""The blocks of a model: which layers, where their states lie, and how they are run."""

import gc
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from surgery.disk import io_errors
from surgery.errors import PlanError
from surgery.evaluate.load import Loaded
from surgery.evaluate.load import Source as FoundModel
from surgery.linearize.block_rows import BlockRows
from surgery.linearize.comparing import pass_through
from surgery.linearize.objective import Feed, keep_own_teacher
from surgery.linearize.part import load_part
from surgery.linearize.shards import Shards
from surgery.linearize.transfer_ask import TransferAsk
from surgery.recover.batch import Batch
from surgery.recover.data import Rows
from surgery.recover.distributed import World
from surgery.recover.session import check_context, computing, uses_bfloat16

DONE = "done.json"


class Blocks:
    """Layers in blocks, up to the last linear one.

    Attributes:
        layers: of each block.
        linear: numbers of all layers that train.
        data: the rows.
        like: states of a row, on meta.
        nbytes: of the states of all rows; 0 for a single block.
    """

    def __init__(self, ask: TransferAsk, world: World, source: FoundModel) -> None:
        """Read the data; nothing is written.

        Raises:
            RecipeError, CheckpointError: rows do not fit the model, or data cannot be read.
        """
        self.ask, self.world, self.source = ask, world, source
        self.settings = ask.settings
        check_context(self.settings, source)
        self.half = uses_bfloat16(self.settings, world)
        self.folder = ask.folder / "blocks"
        self.linear: list[int] = list(source.config.linear_layers)
        end, size = max(self.linear) + 1, ask.blocks or max(self.linear) + 1
        self.layers = [range(at, min(at + size, end)) for at in range(0, end, size)]
        self.data = BlockRows(ask, source)
        width = source.config.get_text_config(decoder=True).hidden_size
        dtype = torch.bfloat16 if self.half else torch.float32
        self.like = torch.empty(self.settings.context, width, dtype=dtype, device="meta")
        self.nbytes = self.like.nbytes * len(self.data.names) if len(self) > 1 else 0

    def __len__(self) -> int:
        return len(self.layers)

    def needs(self) -> int:
        """Return the bytes that states take at most: those of all rows, and one file more."""
        if not self.nbytes:
            return 0
        return self.nbytes + max(map(len, self.states(1).parts)) * self.like.nbytes

    def check_disk(self) -> None:
        """Refuse to begin where states do not fit.

        Raises:
            PlanError: fewer bytes are free than they take beyond those that are there.
        """
        there = sum(self.states(n).nbytes() for n in range(1, len(self)))
        wanted = max(self.needs() - there, 0)
        with io_errors(self.folder):
            free = shutil.disk_usage(self.folder).free
        if wanted > free:
            fact = f"hidden states need {wanted} bytes, and {free} are free"
            raise PlanError(self.folder, fact, "train on fewer tokens, or choose another disk")

    def place(self, number: int) -> Path:
        """Return the folder of a block."""
        return self.folder / f"{number:04d}"

    def states(self, number: int) -> Shards:
        """Return what goes into a block; there are none before the first, which has tokens."""
        return Shards(self.place(number) / "states", self.data.names, row_bytes=self.like.nbytes)

    def load(self, number: int) -> Loaded:
        """Load a block, with its own teacher, after the one before it is gone."""
        gc.collect()
        loaded = load_part(
            self.source,
            self.layers[number],
            embeddings=number == 0,
            device=self.world.device,
            dtype=self.like.dtype,
        )
        keep_own_teacher(loaded.model)
        return loaded

    def feed(self, number: int) -> Feed:
        """Return what gives the decoder its rows: states, or tokens before the first layer."""
        states = None if number == 0 else self.states(number)

        def feed(rows: Rows, batch: Batch) -> Mapping[str, Any]:
            if states is None:
                return {"input_ids": batch.ids, "position_ids": batch.positions}
            found = [states.read(self.data.name(rows, index)) for index in batch.indices]
            hidden = torch.stack(found).to(self.world.device)
            return {"inputs_embeds": hidden, "position_ids": batch.positions}

        return feed

    def is_past(self, number: int) -> bool:
        """Whether a block, or one after it, was trained: then its states were whole."""
        after = range(number, len(self))
        return any((self.place(n) / DONE).is_file() for n in after) or any(
            self.states(n).nbytes() for n in after if n > number
        )

    def hand_on(self, number: int, part: int, after: Shards, model: Any) -> None:  # noqa: ANN401
        """Write a file of states after a block."""
        size = max(self.settings.micro_tokens // self.settings.context, 1)
        names = after.parts[part]
        feed, end = self.feed(number), self.layers[number].stop

        def made() -> Iterator[tuple[str, torch.Tensor]]:
            for at in range(0, len(names), size):
                found = [(name, *self.data.found[name]) for name in names[at : at + size]]
                for rows, chosen, indices in _by_rows(found):
                    batch = Batch.of(rows, indices, self.world.device)
                    with torch.no_grad(), computing(self.world.device, half=self.half):
                        inputs = feed(rows, batch)
                        hidden = pass_through(model, inputs, each=None, end=end)
                    yield from zip(chosen, hidden, strict=True)

        after.write(part, made(), self.like)


def _by_rows(
    found: "Iterable[tuple[str, Rows, int]]",
) -> "Iterator[tuple[Rows, list[str], list[int]]]":
    """Yield names and indices of neighbours that are of the same rows."""
    for _, group in groupby(found, key=lambda one: id(one[1])):
        members = list(group)
        yield members[0][1], [name for name, _, _ in members], [index for _, _, index in members]
