"""Rows of routers measured from prompts: a token goes to the expert whose prompts it is like."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from growth.upcycle.prompts import Prompts
from growth.upcycle.routers import KEY, rows_name
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint, open_checkpoint
from surgery.errors import RecipeError, TrainError
from surgery.evaluate.load import Source, find_device, find_dtype, load, open_source
from surgery.recipe import compile_recipe, merge_models
from surgery.run import run
from surgery.slices import Sources
from surgery.stored import Stored

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tokens = Literal["mean", "last"]
Vector = Callable[[str], "Tensor"]  # of one prompt: [layers, hidden]
SMALLEST = 1e-8
SINGLE = 4  # bytes of a float32


def write_rows(
    out: Path,
    vector: Vector,
    prompts: Sequence[Prompts],
    *,
    layers: Sequence[int],
    question: dict[str, Any],
) -> None:
    """Measure every expert's rows and write them, [experts, hidden] for each layer in float32.

    An expert's row is the mean vector of its positive prompts, less that of its negative ones, at
    unit length: a token's expert is the one whose row its vector has the least angle with.
    """
    import torch
    from safetensors.torch import save_file

    rows = torch.stack([_row(vector, each) for each in prompts], dim=1)
    closest = {}
    for layer in layers:
        cosines = rows[layer] @ rows[layer].T
        closest[layer] = float(cosines.fill_diagonal_(-1).max())
    told = json.dumps({"question": question, "closest": closest}, sort_keys=True)
    tensors = {rows_name(layer): rows[layer].float().contiguous() for layer in layers}
    partial = out.with_name(f".{out.name}.partial")
    save_file(tensors, partial, metadata={KEY: told})
    partial.replace(out)


def _row(vector: Vector, prompts: Prompts) -> "Tensor":
    """Return an expert's row of each layer, [layers, hidden], of unit length."""
    import torch

    def mean(texts: Sequence[str]) -> "Tensor":
        return torch.stack([vector(text) for text in texts]).mean(0)

    found = mean(prompts.positive)
    if prompts.negative:
        found = found - mean(prompts.negative)
    length = found.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
    return found.div(length)


@contextmanager
def cheap_vectors(models: Sequence[Checkpoint]) -> Iterator[Vector]:
    """Give a prompt's mean token embedding, of the mean of some models; nothing is loaded.

    What mergekit-moe calls `cheap_embed`. The begin mark counts for nothing.
    """
    import torch

    with ExitStack() as stack:
        source = open_source(models[0].ref, stack)
        sources = stack.enter_context(Sources(models))
        tables = [Stored(_embedding(model), sources, SINGLE) for model in models]
        layers = anatomy(models[0]).layers

        def vector(text: str) -> "Tensor":
            _, words = _ids(source, text)
            rows = [table[n : n + 1][0].double() for table in tables for n in words]
            return torch.stack(rows).mean(0).expand(layers, -1)

        yield vector


def _embedding(model: Checkpoint) -> Any:  # noqa: ANN401 - a TensorInfo
    name = anatomy(model).embedding
    if name is None:
        raise TrainError(model.ref, "has no embedding by a known name", "use --gate hidden")
    return model.tensors[name]


@contextmanager
def hidden_vectors(ref: str, *, tokens: Tokens, device: str) -> Iterator[Vector]:
    """Give what a model hands to each layer's feed-forward for a prompt, averaged over tokens.

    That is what the router will see: behind the norm, and not the residual stream itself, which
    mergekit-moe takes. Every prompt runs alone, so there is no padding; the begin mark is run but
    not averaged.

    Args:
        tokens: `mean` over the prompt's tokens, or the `last` alone.
    """
    import torch

    with ExitStack() as stack:
        source = open_source(ref, stack)
        place = find_device(device)
        loaded = load(source, device=place, dtype=find_dtype(None, place))
        seen: dict[int, Tensor] = {}
        for number, block in enumerate(loaded.model.model.layers):
            hook = block.mlp.register_forward_pre_hook(_keeper(seen, number))
            stack.callback(hook.remove)

        def vector(text: str) -> "Tensor":
            mark, words = _ids(source, text, limit=source.limit)
            ids = torch.tensor([[*mark, *words]], device=place)
            with torch.inference_mode():
                loaded.model(input_ids=ids, use_cache=False)
            start = -1 if tokens == "last" else len(mark)
            kept = [seen[n][0, start:].double().mean(0).cpu() for n in range(len(seen))]
            return torch.stack(kept).clone()

        yield vector


def _keeper(seen: "dict[int, torch.Tensor]", number: int) -> Callable[..., None]:
    def keep(_: object, given: "tuple[torch.Tensor, ...]") -> None:
        seen[number] = given[0]

    return keep


def _ids(source: Source, text: str, *, limit: int | None = None) -> tuple[list[int], list[int]]:
    """Return the begin mark, where there is one, and a prompt's tokens.

    Raises:
        RecipeError: the prompt has no token, or more than the model takes.
    """
    words = list(source.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    mark = [] if source.mark.token is None else [source.mark.token]
    if not words:
        raise RecipeError(f"the prompt {text[:40]!r}", "has no token", "write words")
    if limit is not None and len(words) + len(mark) > limit:
        fact = f"has {len(words)} tokens, and the model takes {limit - len(mark)}"
        raise RecipeError(f"the prompt {text[:40]!r}", fact, "cut it")
    return mark, words


@contextmanager
def averaged(models: Sequence[Checkpoint], *, beside: Path) -> Iterator[str]:
    """Give the mean of models as one, written beside the output until the measurement is done."""
    refs = [model.ref for model in models]
    opened = dict(zip(refs, models, strict=False))
    with TemporaryDirectory(prefix=".surgery-", dir=beside) as folder:
        recipe = merge_models("linear", refs, weight=1.0)
        plan = compile_recipe(recipe, open_one=lambda ref: opened.get(ref) or open_checkpoint(ref))
        yield str(run(plan.plan, Path(folder) / "average").out)
