"""Depth by collapse: runs of layers melt into one, while the output stays alike (LaCo)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from growth.depth import SCALABLE, DepthMap, change_depth
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError, RecipeError
from surgery.plan import Plan, Step, check_plan

if TYPE_CHECKING:
    import torch

    from surgery.calibrate.rows import TokenRows
    from surgery.evaluate.load import Loaded

Mixture = Mapping[int, int]  # layer of the source: how often it is counted
Progress = Callable[[int, int], None]
MELTED = 4  # layers that are melted into one at once, at most (the paper's C)
APART = 2  # layers that the next try begins further down (the paper's I)


def collapse(base: Checkpoint, *, mixtures: Sequence[Mapping[str, int]], threshold: float) -> Plan:
    """Plan a model whose layers are sums of the source's.

    Args:
        mixtures: per new layer the source's layers and how often each counts; the least one gives
            the layer's kind.
        threshold: what they were found with, for the record.

    Raises:
        RecipeError: a mixture is empty or names a layer that does not exist.
        PlanError: layers that are summed do not hold the same tensors.
    """
    mixed = [{int(layer): int(count) for layer, count in row.items()} for row in mixtures]
    if not all(mixed):
        raise RecipeError("the mixtures", "hold an empty one", "each new layer needs a source")
    asked = [{str(layer): count for layer, count in row.items()} for row in mixed]
    parameters = {"mixtures": asked, "threshold": threshold}
    depth = DepthMap(sources=tuple(min(row) for row in mixed))
    plan = change_depth(base, depth, operation="laco", parameters=parameters)
    parts = anatomy(base)
    steps = []
    for step in plan.steps:
        located = parts.locate(step.outputs[0][0])
        row = mixed[located[0]] if located and located[0] < len(mixed) else {}
        steps.append(_sum(base, step, located[1], row) if located and len(row) > 1 else step)
    used = {layer for row in mixed for layer in row}
    dropped = {
        name: why
        for name, why in plan.dropped.items()
        if (inside := parts.locate(name)) is None or inside[0] not in used
    }
    return check_plan(replace(plan, steps=tuple(steps), dropped=dropped))


def _sum(base: Checkpoint, step: Step, rest: str, row: Mixture) -> Step:
    parts = anatomy(base)
    own = step.inputs[0]
    inputs = []
    for layer in row:
        tensor = base.tensors.get(parts.stack.name(layer, rest))
        if tensor is None or (tensor.shape, tensor.dtype) != (own.shape, own.dtype):
            fact = f"layers {min(row)} and {layer} do not hold the same tensors ({rest})"
            raise PlanError(base.ref, fact, "layers of different kinds cannot be summed")
        inputs.append(tensor)
    if own.dtype not in SCALABLE:
        fact = f"is stored as {own.dtype}, which is not summed"
        raise PlanError(own.name, fact, "dequantise the checkpoint first")
    counts = tuple(row.values())
    return Step(
        inputs=tuple(inputs),
        outputs=step.outputs,
        fn=partial(_weighted, counts=counts),
        elementwise=True,
        plain=True,
        why="melt",
        key=repr(counts),
    )


def _weighted(*tensors: Any, counts: tuple[int, ...]) -> Any:  # noqa: ANN401 - tensors or arrays
    total = tensors[0] * float(counts[0])
    for tensor, count in zip(tensors[1:], counts[1:], strict=True):
        total = total + tensor * float(count)
    return total


def melt(mixtures: Sequence[Mixture], first: int, more: int) -> list[dict[int, int]]:
    """Melt the `more` layers behind `first` into it: theta_l + sum_k (theta_l+k - theta_l).

    Source: LaCo, arXiv 2402.11187, equation 1. The published notebook computes something else:
    there the last of the layers wins.
    """
    total = dict.fromkeys(mixtures[first], 0)
    for layer, count in mixtures[first].items():
        total[layer] += (1 - more) * count
    for row in mixtures[first + 1 : first + 1 + more]:
        for layer, count in row.items():
            total[layer] = total.get(layer, 0) + count
    kept = {layer: count for layer, count in sorted(total.items()) if count}
    return [*map(dict, mixtures[:first]), kept, *map(dict, mixtures[first + 1 + more :])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """How `find_collapse` measures; see there."""

    context: int | None = None
    samples: int = 128
    device: str = "cpu"
    batch_tokens: int = 4096


def find_collapse(
    base: Checkpoint,
    texts: Sequence[Path],
    *,
    layers: int,
    threshold: float,
    ask: Ask = Ask(),
    progress: Progress | None = None,
) -> list[dict[int, int]]:
    """Melt runs of layers from the top down until `layers` are gone.

    A melting is kept where the mean cosine between the last hidden states of the model and of the
    original stays above the threshold; else the next try begins one layer further down.

    Args:
        texts: a few documents are enough; the paper takes five sentences.
        threshold: the paper's T, 0.45 for its 13B model.
        progress: called with layers gone and `layers`.

    Returns:
        Per layer that is left, the source's layers and how often each counts.

    Raises:
        RecipeError: so many cannot be melted, or not at this threshold.
        TrainError: the model does not load whole, or keeps its layers elsewhere.

    Source: LaCo, arXiv 2402.11187, algorithm 1. Deviation: it ends when `layers` are gone, so
    the last run may be shorter.
    """
    count = check_ask(base, layers=layers, threshold=threshold)
    mixtures: list[dict[int, int]] = [{layer: 1} for layer in range(count)]
    with _trial(base, texts, ask) as likeness:
        first = count - 2
        while first >= 0 and count - len(mixtures) < layers:
            left = layers - (count - len(mixtures))
            more = min(MELTED - 1, left, len(mixtures) - 1 - first)
            tried = melt(mixtures, first, more)
            if more and likeness(tried) > threshold:
                mixtures = tried
                first = min(first - APART, len(mixtures) - 2)
                if progress:
                    progress(count - len(mixtures), layers)
            else:
                first -= 1
    gone = count - len(mixtures)
    if gone < layers:
        fact = f"melts only {gone} of {layers} layers while the output stays above {threshold}"
        raise RecipeError("laco", fact, "lower --threshold or --layers")
    return mixtures


def check_ask(base: Checkpoint, *, layers: int, threshold: float) -> int:
    """Return the model's number of layers after refusing what makes no sense for it.

    Raises:
        RecipeError: so many cannot be melted, or no cosine has that threshold.
    """
    count = anatomy(base).layers
    if not 1 <= layers < count:
        fact = f"is outside 1 to {count - 1} for a model of {count} layers"
        raise RecipeError(f"--layers {layers}", fact, "at least one layer has to stay")
    if not -1 <= threshold < 1:
        fact = "is outside -1 to 1, as it is compared with a cosine"
        raise RecipeError(f"--threshold {threshold:g}", fact, "the paper takes 0.45")
    return count


@contextmanager
def _trial(
    base: Checkpoint, texts: Sequence[Path], ask: Ask
) -> "Iterator[Callable[[Sequence[Mixture]], float]]":
    """Load the model; give what measures how alike the output is with layers melted."""
    from surgery.calibrate.rows import plan_token_rows, row_length
    from surgery.evaluate.documents import read_documents
    from surgery.evaluate.load import find_device, find_dtype, load, open_source

    documents = read_documents(texts)
    device = find_device(ask.device)
    with ExitStack() as scratch:
        source = open_source(base.ref if base.adapters else base.root, scratch)
        rows = plan_token_rows(
            source.tokenizer,
            documents,
            mark=source.mark,
            context=row_length(ask.context, source.limit),
            samples=ask.samples,
        )
        loaded = load(source, device=device, dtype=find_dtype(None, device))
        prefix = anatomy(base).stack.prefix
        originals = list(loaded.model.get_submodule(prefix).children())
        reference = _last_states(loaded, rows, ask.batch_tokens)

        def likeness(mixtures: Sequence[Mixture]) -> float:
            _put(loaded, prefix, _melted(originals, mixtures))
            states = _last_states(loaded, rows, ask.batch_tokens)
            _put(loaded, prefix, originals)
            return _mean_cosine(reference, states)

        yield likeness


def _put(loaded: "Loaded", prefix: str, layers: "Sequence[torch.nn.Module]") -> None:
    holder = loaded.model.get_submodule(prefix)
    for number, layer in enumerate(layers):
        setattr(holder, str(number), layer)


def _melted(
    originals: "Sequence[torch.nn.Module]", mixtures: Sequence[Mixture]
) -> "list[torch.nn.Module]":
    """Return as many layers as before, of which those that are gone hand their input on."""
    import copy

    import torch

    class Through(torch.nn.Module):
        def __init__(self, like: torch.nn.Module) -> None:
            super().__init__()
            self.attention_type = getattr(like, "attention_type", None)

        def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return hidden_states

    layers: list[torch.nn.Module] = [Through(layer) for layer in originals]
    for row in mixtures:
        place = min(row)
        if len(row) == 1:
            layers[place] = originals[place]
            continue
        sums = copy.deepcopy(originals[place])
        with torch.no_grad():
            for name, weight in sums.named_parameters():
                parts = [originals[n].get_parameter(name).float() * c for n, c in row.items()]
                weight.copy_(torch.stack(parts).sum(0))
        layers[place] = sums
    return layers


def _last_states(loaded: "Loaded", rows: "TokenRows", batch_tokens: int) -> "list[torch.Tensor]":
    import torch

    found = []
    with torch.inference_mode():
        for batch in rows.batches(batch_tokens):
            ids = torch.from_numpy(batch).to(loaded.device)
            out = loaded.model.base_model(input_ids=ids, use_cache=False)
            found.append(out.last_hidden_state.float())
    return found


def _mean_cosine(one: "Sequence[torch.Tensor]", two: "Sequence[torch.Tensor]") -> float:
    import torch

    cosines = [
        torch.nn.functional.cosine_similarity(a, b, dim=-1).flatten()
        for a, b in zip(one, two, strict=True)
    ]
    return float(torch.cat(cosines).double().mean())
