"""Dense models of one architecture as the experts of one mixture (Branch-Train-MiX)."""

from collections.abc import Iterator, Sequence
from typing import Literal

from growth.upcycle import ROUTER_DEVIATION, design, mixture_plan
from growth.upcycle.ask import check_deviation, check_experts
from growth.upcycle.assemble import (
    Change,
    Mixture,
    expert_steps,
    kept_names,
    kept_steps,
    random_routers,
)
from growth.upcycle.dense import Dense, read_dense
from growth.upcycle.numbers import mean
from growth.upcycle.routers import check_rows, rows_name, told_gate
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError, RecipeError
from surgery.plan import Plan, Step, TensorSpec

Gate = Literal["hidden", "cheap", "random"]
Attention = Literal["average", "first"]
# What a config may say otherwise and the model computes the same.
NO_MATTER = frozenset(
    {
        *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"),
        *("initializer_range", "attention_dropout", "auto_map", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"),
    }
)
CLOSE = 0.99  # cosine of two routers' rows from which they are told to be nearly one


def moe(
    *models: Checkpoint,
    gate: Gate = "random",
    attention: Attention = "average",
    top_k: int = 2,
    layout: str | None = None,
    layers: str | None = None,
    router_std: float = ROUTER_DEVIATION,
    seed: int = 0,
) -> Plan:
    """Make dense models of one architecture the experts of a mixture.

    Each model's feed-forwards become an expert; attention, norms, embedding and head are
    averaged, or the first model's. The result computes what none of them does, and is meant to be
    trained.

    Args:
        models: the experts in order; unless the gate is random, the measured rows of the routers
            follow (`growth.upcycle.gates`).
        gate: where the routers come from.
        attention: what becomes of all that is no expert.
        layout, layers, router_std, seed: as `growth.upcycle.upcycle` takes them.

    Raises:
        RecipeError: the ask makes no sense.
        PlanError: a model cannot be an expert beside the others, with the reason.

    Source: Branch-Train-MiX, arXiv 2403.07816, section 3.2.
    """
    experts, rows = (models, None) if gate == "random" else (models[:-1], models[-1])
    _check_asks(experts, top_k=top_k, router_std=router_std, attention=attention)
    opened = tuple(read_dense(model) for model in experts)
    for other in opened[1:]:
        _check_alike(opened[0], other)
    mixture = design(opened[0], opened, layout=layout, layers=layers)
    steps = [*_kept_steps(mixture, attention), *expert_steps(mixture, Change())]
    if rows is None:
        steps += random_routers(mixture, deviation=router_std, seed=seed)
    else:
        steps += _measured_routers(mixture, rows, gate)
    parameters: dict[str, object] = {
        "gate": gate,
        "attention": attention,
        "top_k": top_k,
        "layout": mixture.layout.name,
        "layers": layers,
        "router_std": router_std,
        "seed": seed,
    }
    return mixture_plan(
        "moe",
        mixture,
        steps,
        parameters,
        top_k=top_k,
        notes=list(_notes(mixture, rows)),
        sources=models,
        dropped=_unused(mixture, attention),
    )


def _check_asks(
    experts: Sequence[Checkpoint], *, top_k: int, router_std: float, attention: str
) -> None:
    if len(experts) < 2:  # noqa: PLR2004 - one is no mixture
        fact = f"has {len(experts)} expert(s), which makes no mixture"
        raise RecipeError("moe", fact, "name two models or more, or use surgery upcycle")
    check_experts(len(experts), top_k)
    check_deviation("--router-std", router_std)
    if attention not in ("average", "first"):
        raise RecipeError(f"--attention {attention}", "is unknown", "give average or first")


def _check_alike(first: Dense, other: Dense) -> None:
    """Refuse an expert of another architecture, shape or vocabulary.

    Raises:
        PlanError: with the first thing that differs.
    """
    place, name = other.source.ref, first.source.ref
    keys = sorted({*first.settings, *other.settings} - NO_MATTER)
    for key in keys:
        mine, yours = first.settings.get(key), other.settings.get(key)
        if mine != yours:
            fact = f"has {key} = {repr(yours)[:60]}, and {name} has {repr(mine)[:60]}"
            raise PlanError(place, fact, "experts are models of one architecture")
    lost = sorted(first.source.tensors.keys() ^ other.source.tensors.keys())
    if lost:
        fact = f"and {name} do not hold the same tensors ({lost[0]})"
        raise PlanError(place, fact, "experts are models of one architecture")
    for tensor_name, mine in first.source.tensors.items():
        yours = other.source.tensors[tensor_name]
        if mine.shape != yours.shape:
            fact = f"is {list(yours.shape)} in {place}, and {list(mine.shape)} in {name}"
            raise PlanError(tensor_name, fact, "experts are models of one shape")
    _check_tokenizers(first.source, other.source)


def _check_tokenizers(first: Checkpoint, other: Checkpoint) -> None:
    from surgery.vocabulary.read import same_bytes, tokenizer_files  # numpy, which help needs not

    told = [
        [path for path in tokenizer_files(model) if path.name in _VOCABULARY]
        for model in (first, other)
    ]
    if all(told) and not same_bytes(*told):
        fact = f"has another tokenizer than {first.ref}"
        remedy = "give both one vocabulary first: surgery merge --tokenizer"
        raise PlanError(other.ref, fact, remedy)


_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")


def _kept_steps(mixture: Mixture, attention: Attention) -> Iterator[Step]:
    """Yield the steps of all that is no expert: the mean over the models, or the first's."""
    for name in kept_names(mixture):
        tensors = [expert.source.tensors[name] for expert in mixture.experts]
        spec = TensorSpec(tensors[0].dtype, tensors[0].shape)
        if attention == "first":
            yield from kept_steps(tensors[0], (name,), spec.dtype)
        else:
            yield Step(
                inputs=tuple(tensors),
                outputs=((name, spec),),
                fn=mean,
                elementwise=True,
                plain=True,
                why="average",
            )


def _measured_routers(mixture: Mixture, rows: Checkpoint, gate: str) -> Iterator[Step]:
    shape = (len(mixture.experts), mixture.dense.hidden)
    check_rows(rows, mixture.sparse, shape=shape, gate=gate)
    for layer in mixture.sparse:
        name = mixture.name(layer, mixture.layout.router)
        tensor = rows.tensors[rows_name(layer)]
        yield from kept_steps(tensor, (name,), mixture.dense.dtype, why="routers")


def _unused(mixture: Mixture, attention: Attention) -> dict[str, str]:
    if attention == "average":
        return {}
    return dict.fromkeys(kept_names(mixture), "is the first model's")


def _notes(mixture: Mixture, rows: Checkpoint | None) -> Iterator[str]:
    yield "the result computes what none of its experts does: train it"
    if rows is None:
        yield "routers are random: every expert gets tokens of every kind"
        return
    close = {n: c for n, c in told_gate(rows).closest.items() if n in mixture.sparse and c > CLOSE}
    if close:
        worst = max(close, key=close.__getitem__)
        yield (
            f"in {len(close)} of {len(mixture.sparse)} layers two rows of the router are nearly "
            f"one (cosine {close[worst]:.4f} in layer {worst}): make the prompts less alike"
        )
