"""What a recovery needs, opened and checked before the first step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError
from surgery.evaluate.load import Loaded, find_dtype, load, open_source
from surgery.evaluate.load import Source as FoundModel
from surgery.evaluate.tokens import difference_between
from surgery.recover.ask import Ask
from surgery.recover.batch import Batch
from surgery.recover.data import Rows, Source, read_data
from surgery.recover.distributed import World, held_by_all, put_away, shard
from surgery.recover.heads import Head, head_of
from surgery.recover.isolation import keeps_apart
from surgery.recover.losses import Objective
from surgery.recover.meter import Meter, peak_of
from surgery.recover.select import Selection
from surgery.recover.selecting import select_documents
from surgery.recover.settings import Settings
from surgery.recover.speed import compile_layers, compiles, save_memory
from surgery.recover.spread import Spread, layers_of, load_empty, load_shared, streams
from surgery.recover.trainable import Trainable, make_trainable

if TYPE_CHECKING:
    import torch

LOOKING = frozenset({"corda", "eva"})  # starts of LoRA that look at activations
SAMPLED_ROWS = 8
HELD_OUT_ROWS = 64  # of held-out text that are measured at both ends


@dataclass(slots=True, kw_only=True)
class Session:
    """An opened run.

    Attributes:
        student: the checkpoint that is healed.
        loaded: it in memory; `trainable.model` is what is called.
        head: its last linear map; None where the run does not get there.
        layers: its decoder layers.
        rows, held_out: what is trained on, and what is measured.
        selection: which documents were taken, and why; None for all.
        teacher: gives what the student is compared with; None without one.
        teacher_size: parameters of a teacher that runs along.
        held: parameters whose gradients every process holds.
    """

    ask: Ask
    world: World
    student: Checkpoint
    loaded: Loaded
    head: Head | None
    trainable: Trainable
    layers: "Sequence[torch.nn.Module]"
    rows: Rows
    selection: Selection | None
    held_out: Rows | None
    teacher: Any
    teacher_size: int = 0
    held: "list[torch.nn.Parameter]" = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        """The options."""
        return self.ask.settings

    @property
    def ends(self) -> "tuple[torch.Tensor, ...]":
        """Weights of the embedding and the head, which count as no hidden matrices."""
        if self.head is None:
            return ()
        return self.loaded.model.get_input_embeddings().weight, self.head.weight

    @property
    def half_precision(self) -> bool:
        """Whether bfloat16 is computed in."""
        return uses_bfloat16(self.settings, self.world)


def uses_bfloat16(settings: Settings, world: World) -> bool:
    """Return whether to compute in bfloat16: as asked, or on anything but a CPU."""
    if settings.precision is not None:
        return settings.precision == "bfloat16"
    return world.device.type != "cpu"


def computing(device: "torch.device", *, half: bool) -> AbstractContextManager[Any]:
    """Compute in bfloat16 where `half`, whatever weights are held in."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext()


@contextmanager
def opened(
    ask: Ask, world: World, *, prepare: "Callable[[torch.nn.Module], None] | None" = None
) -> Iterator[Session]:
    """Open student, teacher and data.

    Args:
        prepare: is given the student before anything of it is chosen to train, or sharded.

    Raises:
        RecipeError, CheckpointError: something does not fit; nothing has been trained yet.
        TrainError: a model does not load whole.
    """
    settings = ask.settings
    student = open_checkpoint(ask.student)
    with ExitStack() as scratch:
        source = open_source(ask.student, scratch)
        if settings.on_logits:
            Objective(settings.losses).check(cached=ask.cache is not None)
        check_context(settings, source)
        half = uses_bfloat16(settings, world)
        dtype: Any = find_dtype("bfloat16" if half else "float32", world.device)
        may_stream = prepare is None and streams(ask, world)
        spread = load_empty(source, world, dtype) if may_stream else None
        loaded = spread.loaded if spread else load(source, device=world.device, dtype=dtype)
        layers = layers_of(loaded.model, student)
        begin = partial(_begin, ask, world, loaded.model, layers, student)
        trainable = begin(spread=spread) if spread else None
        parent = _parent(ask, world, scratch, source)
        rows, held_out, selection = _rows(ask, world, source, loaded, parent)
        for found in (rows, held_out):
            if found is not None:
                found.check_fits(loaded.embeddings, ask.student)
        head = head_of(loaded.model)
        put_away(loaded.model)
        teacher = _teacher(ask, loaded, parent, rows)
        if prepare is not None:
            prepare(loaded.model)
        if trainable is None:
            samples = _samples(rows, loaded) if settings.lora_init in LOOKING else ()
            trainable = begin(samples=samples, alone=prepare is not None)
        save_memory(loaded.model, settings)
        if compiles(settings, world):
            compile_layers(layers)
        yield Session(
            ask=ask,
            world=world,
            student=student,
            loaded=loaded,
            head=head.renewed(loaded.model),
            trainable=trainable,
            layers=layers,
            rows=rows,
            selection=selection,
            held_out=held_out,
            teacher=teacher,
            teacher_size=parent.parameters if parent is not None and teacher is not None else 0,
            held=held_by_all(trainable.parameters.values(), world),
        )


def _begin(
    ask: Ask,
    world: World,
    model: Any,  # noqa: ANN401
    layers: "Sequence[torch.nn.Module]",
    student: Checkpoint,
    *,
    spread: Spread | None = None,
    samples: "Sequence[dict[str, torch.Tensor]]" = (),
    alone: bool = False,
) -> Trainable:
    """Choose what trains of a student, shard it, and give it its values if it has none.

    Args:
        spread: the student without values.
        samples: see `make_trainable`.
        alone: layers may be called without the model around them.
    """
    settings = ask.settings
    trainable = make_trainable(model, student, settings, samples=samples)
    to_masters(trainable, settings)
    shard(
        layers,
        trainable.parameters.values(),
        world,
        whole=settings.train in ({"full"} if alone else {"full", "half", "new"}),
        half_precision=uses_bfloat16(settings, world),
        root=None if alone else model,
    )
    if spread is not None:
        spread.fill(world)
        trainable.renew_masks()
    return trainable


def check_context(settings: Settings, source: FoundModel) -> None:
    """Refuse rows that a model does not read.

    Raises:
        RecipeError: they are longer than its limit.
    """
    if source.limit is not None and settings.context > source.limit:
        fact = f"is more than {source.ref} reads, {source.limit} tokens"
        raise RecipeError(f"--context {settings.context}", fact, f"give {source.limit} or less")


def _rows(
    ask: Ask, world: World, source: FoundModel, loaded: Loaded, parent: Loaded | None
) -> tuple[Rows, Rows | None, Selection | None]:
    """Return what is trained on, what is measured, and which documents were chosen."""
    common: dict[str, Any] = {
        "context": ask.settings.context,
        "seed": ask.settings.seed,
        "packed": keeps_apart(loaded),
    }
    data = read_data(sources_of(ask), source.tokenizer, mark=source.mark)
    chosen = None
    if ask.settings.select is not None and parent is not None:
        models = {"student": loaded, "parent": parent}
        chosen = select_documents(ask, world, data.main, tokenizer=source.tokenizer, **models)
    picks = None if chosen is None else np.array(chosen.documents, dtype=np.int64)
    rows = Rows.of(data, chosen=picks, **common)
    if not ask.held_out:
        return rows, None, chosen
    apart = [Source(path) for path in ask.held_out]
    held_out = Rows.of(read_data(apart, source.tokenizer, mark=source.mark), **common)
    return rows, held_out, chosen


def _samples(rows: Rows, loaded: Loaded) -> "list[dict[str, torch.Tensor]]":
    found = (Batch.of(rows, [index], loaded.device) for index in range(SAMPLED_ROWS))
    return [batch.inputs(loaded.model) for batch in found]


def sources_of(ask: Ask) -> list[Source]:
    """Return the data, and what is replayed with its share of the rows."""
    share = ask.settings.replay if ask.replay else None
    return [*ask.data, *(replace(source, share=share) for source in ask.replay)]


def _parent(ask: Ask, world: World, scratch: ExitStack, source: FoundModel) -> Loaded | None:
    """Load the teacher that runs along, or that documents are chosen by."""
    if ask.teacher is None:
        return None
    parent = open_source(ask.teacher, scratch)
    odd = difference_between(parent.tokenizer, source.tokenizer, ())
    if odd is not None:
        remedy = "a teacher needs the student's tokenizer"
        raise RecipeError(f"--teacher {ask.teacher}", odd, remedy)
    check_context(ask.settings, parent)
    half = uses_bfloat16(ask.settings, world)
    dtype = find_dtype("bfloat16" if half else "float32", world.device)
    if ask.settings.select is None:
        return load_shared(parent, world, dtype)
    return load(parent, device=world.device, dtype=dtype)  # one process alone asks it


def _teacher(ask: Ask, student: Loaded, parent: Loaded | None, rows: Rows) -> Any:  # noqa: ANN401
    """Return what the losses ask, or None where none of them asks anything."""
    from surgery.recover.teacher import CachedTeacher, OnlineTeacher

    if ask.cache is not None:
        return CachedTeacher(ask.cache, rows, student=student)
    if parent is None or not ask.settings.needs_teacher:
        return None
    layers = any(name.startswith("hidden") for name in ask.settings.losses)
    return OnlineTeacher(parent, student=student, layers=layers)


def to_masters(trainable: Trainable, settings: Settings) -> None:
    """Hold what is trained in float32; layers that are sharded whole need one dtype."""
    import torch

    chosen: list[Any] = list(trainable.parameters.values())
    if settings.train in {"full", "half"}:
        chosen = list(trainable.model.parameters())
    for parameter in chosen:
        if parameter.dtype in {torch.bfloat16, torch.float16}:
            parameter.data = parameter.data.float()


def meter_of(session: Session) -> Meter:
    """Return what counts the run's tokens, time and operations."""
    import torch

    device = session.world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    looked_up = 0
    if session.head is not None:
        embedding = session.loaded.model.get_input_embeddings().weight
        looked_up = 0 if session.head.weight is embedding else embedding.numel()
    return Meter(
        parameters=session.loaded.parameters - looked_up,
        teacher=session.teacher_size,
        partly=session.settings.train not in {"full", "half"},
        peak=peak_of(name),
        devices=session.world.size,
    )
