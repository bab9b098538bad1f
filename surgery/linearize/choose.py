"""Which layers cost most when they become linear, each by itself.

Axis letters: b rows, t tokens, n = b * t, v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.checkpoint import open_checkpoint
from surgery.errors import RecipeError, TrainError
from surgery.evaluate.load import find_device, find_dtype, load, open_source
from surgery.linearize.config import check_config, is_linearized
from surgery.linearize.methods import METHODS
from surgery.recover.data import Rows, Source, open_rows

if TYPE_CHECKING:
    import torch

ROWS = 64  # that are measured by default
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The layers whose conversion costs most.

    Attributes:
        layers: numbers of the layers to keep, rising.
        kl: by layer, KL(teacher || teacher with that layer linear) in nats a token.
        tokens: scored tokens that it is the mean of.
    """

    layers: tuple[int, ...]
    kl: dict[int, float]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        kl = {str(n): cost for n, cost in self.kl.items()}
        return {"layers": list(self.layers), "kl": kl, "tokens": self.tokens}


def choose_layers(
    transferred: str | Path,
    texts: Sequence[Source | Path],
    *,
    count: int,
    teacher: str | Path | None = None,
    context: int = 1024,
    rows: int = ROWS,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Choice:
    """Measure what each linear layer costs alone, and take those that cost most.

    All other layers have softmax attention while one is measured. The states before it are the
    teacher's, which are computed once, so that a swap runs the layers from it on. Of two layers
    that cost the same the lower one is taken.

    Args:
        transferred: a linearized checkpoint after its transfer stage.
        texts: what it is measured on.
        count: layers to keep.
        teacher: what it was linearized from; only asked where the method trains projections.
        context: tokens of a row; rows are fed one at a time.
        rows: how many are fed at most.
        progress: called with rows done, and rows to do.

    Raises:
        RecipeError: the checkpoint is not linearized, the count is not of its layers, or there is
            no teacher where one is needed.
        CheckpointError: text or checkpoint cannot be read.
        TrainError: a cost is not finite, or the model does not load.

    Source: the measure is our own. HALO scores the same swaps by two sets of benchmarks, which
    takes two evaluations for each layer.
    """
    _check(transferred, count, teacher)
    sources = [each if isinstance(each, Source) else Source(each) for each in texts]
    with ExitStack() as scratch:
        source = open_source(transferred, scratch)
        place = find_device(device)
        loaded = load(source, device=place, dtype=find_dtype(None, place))
        found = open_rows(sources, source.tokenizer, context=context, seed=seed, mark=source.mark)
        found.check_fits(loaded.embeddings, transferred)
        if teacher is not None:
            _take_teacher(loaded.model, teacher)
        kl, tokens = _measure(loaded.model, found, min(rows, len(found)), progress)
    _check_finite(kl, transferred)
    chosen = sorted(kl, key=lambda n: (-kl[n], n))[:count]
    return Choice(layers=tuple(sorted(chosen)), kl=kl, tokens=tokens)


def _check(transferred: str | Path, count: int, teacher: str | Path | None) -> None:
    student = open_checkpoint(transferred)
    if not is_linearized(student):
        fact = "is not linearized, so that no layer can be measured"
        raise RecipeError(student.ref, fact, "convert it, and transfer")
    config = check_config(student)
    layers, method = len(config["linear_layers"]), METHODS[config["mixer"]["method"]]
    if not 0 < count < layers:
        fact = f"keeps {count} of the {layers} layers that are converted"
        raise RecipeError(f"kl:{count}", fact, f"1 to {layers - 1} can be")
    if method.projections and teacher is None:
        fact = f"was trained with {method.name}, whose projections are no longer the teacher's"
        raise RecipeError(student.ref, fact, "name the model that it was linearized from")


def _take_teacher(model: Any, teacher: str | Path) -> None:  # noqa: ANN401
    """Give every linear layer the attention of the model that it was linearized from.

    Raises:
        TrainError: the teacher's files do not hold what a layer needs.
    """
    import torch
    from safetensors import safe_open

    from surgery.models.linear_layer import converted, keep_teacher

    keep_teacher(model)
    places = {id(module): name for name, module in model.named_modules()}
    tensors = open_checkpoint(teacher).tensors
    for module in converted(model).values():
        prefix = places[id(module)]
        for name, parameter in module.frozen[0].named_parameters():
            own = tensors.get(f"{prefix}.{name}")
            if own is None or own.shape != tuple(parameter.shape):
                fact = f"holds no {prefix}.{name} of shape {list(parameter.shape)}"
                raise TrainError(teacher, fact, "name the model that was linearized")
            with safe_open(own.file, framework="pt") as file, torch.no_grad():
                parameter.copy_(file.get_tensor(own.name))


def _measure(
    model: Any,  # noqa: ANN401
    rows: Rows,
    count: int,
    progress: Progress | None,
) -> tuple[dict[int, float], int]:
    """Return nats a token by layer, and the tokens that were scored."""
    import torch

    from surgery.models.linear_layer import converted
    from surgery.recover.batch import Batch
    from surgery.recover.heads import head_of

    head, layers = head_of(model), sorted(converted(model))
    sums, tokens = dict.fromkeys(layers, 0.0), 0
    for index in range(count):
        batch = Batch.of(rows, [index], model.device)
        with torch.no_grad():
            for layer, cost in _costs(model, head, batch, layers):
                sums[layer] += cost
        tokens += batch.tokens
        if progress is not None:
            progress(index + 1, count)
    return {layer: total / tokens for layer, total in sums.items()}, tokens


def _costs(model: Any, head: Any, batch: Any, layers: Sequence[int]) -> Iterator[tuple[int, float]]:  # noqa: ANN401
    """Yield each layer and the sum over the scored tokens of its KL."""
    from surgery.linearize.comparing import decoder_of
    from surgery.models.linear_layer import set_mode
    from surgery.recover.fused import TeacherHidden
    from surgery.recover.losses import Objective

    kl, decoder = Objective({"kl": 1.0}), decoder_of(model)
    given = {"position_ids": batch.positions, "use_cache": False}
    set_mode(model, "teacher")
    with _states_before(decoder, layers) as states:
        wanted = decoder(input_ids=batch.ids, **given).last_hidden_state.flatten(0, 1)
    for layer in layers:
        set_mode(model, "linear", [layer])
        with _from_layer(decoder, layer):
            hidden = decoder(inputs_embeds=states[layer], **given).last_hidden_state
        set_mode(model, "teacher", [layer])
        parts = kl(hidden.flatten(0, 1), head, batch.targets, TeacherHidden(wanted, head))
        yield layer, float(parts.total)
    set_mode(model, "linear")


@contextmanager
def _states_before(decoder: Any, layers: Sequence[int]) -> "Iterator[dict[int, torch.Tensor]]":  # noqa: ANN401
    """Keep what goes into layers, for one pass."""
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: object, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[layer] = given[0] if given else named["hidden_states"]

        return hook

    handles = [
        decoder.layers[n].register_forward_pre_hook(keep(n), with_kwargs=True) for n in layers
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _from_layer(decoder: Any, layer: int) -> Iterator[None]:  # noqa: ANN401
    """Let states go by the layers before one."""
    from surgery.linearize.part import Pass

    before = list(decoder.layers[:layer])
    for n in range(layer):
        decoder.layers[n] = Pass()
    try:
        yield
    finally:
        for n, module in enumerate(before):
            decoder.layers[n] = module


def _check_finite(kl: dict[int, float], place: object) -> None:
    odd = next((n for n, cost in kl.items() if not cost < float("inf")), None)
    if odd is not None:
        fact = f"gives no finite logits with layer {odd} linear"
        raise TrainError(place, fact, "transfer again, with a lower --transfer-lr")
