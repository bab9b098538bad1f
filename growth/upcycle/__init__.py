"""A dense model's feed-forwards copied to experts, of which each token takes a few."""

from collections.abc import Mapping

from growth.upcycle.ask import (
    check_deviation,
    check_experts,
    check_share,
    layout_notes,
    neurons_anew,
    sparse_layers,
)
from growth.upcycle.assemble import (
    Change,
    Mixture,
    dropped_tensors,
    expert_steps,
    figures,
    kept_names,
    kept_steps,
    ordered_names,
    random_routers,
    shared_expert_steps,
)
from growth.upcycle.config import mixture_config
from growth.upcycle.dense import Dense, read_dense
from growth.upcycle.layout import choose_layout
from surgery.checkpoint import Checkpoint
from surgery.plan import Plan, Step, check_plan

ROUTER_DEVIATION = 0.02


def upcycle(
    base: Checkpoint,
    *,
    experts: int,
    top_k: int = 2,
    layout: str | None = None,
    layers: str | None = None,
    drop_ratio: float = 0.0,
    noise: float = 0.0,
    router_std: float = ROUTER_DEVIATION,
    seed: int = 0,
) -> Plan:
    """Make a mixture of experts of a dense model: each expert is a copy of the feed-forward.

    The weights of a token's experts add up to 1, so that the result computes what the base does
    whatever the router says, until the experts differ.

    Args:
        layout: `mixtral`, `qwen3-moe` or `qwen2-moe`; by default the first of them that holds
            the base's attention exactly.
        layers: which layers become mixtures, such as `1-3,7`; by default all.
        drop_ratio: the share of each expert's neurons that start anew (Drop-Upcycling).
        noise: the standard deviation of noise on each expert, as a share of the tensor's own.
        router_std: the standard deviation of the router's numbers.

    Raises:
        RecipeError: the ask makes no sense for this model.
        PlanError: the base cannot become a mixture, with the reason.

    Source: Sparse Upcycling, arXiv 2212.05055, section 3 (there with routers of its own kind);
    Drop-Upcycling, arXiv 2502.19261.
    """
    check_experts(experts, top_k)
    check_share("--drop-ratio", drop_ratio)
    check_deviation("--noise", noise)
    check_deviation("--router-std", router_std)
    dense = read_dense(base)
    change = Change(neurons=neurons_anew(drop_ratio, dense.width), noise=noise, seed=seed)
    mixture = design(dense, (dense,) * experts, layout=layout, layers=layers)
    kept = (base.tensors[name] for name in kept_names(mixture))
    steps = [
        *(step for tensor in kept for step in kept_steps(tensor, (tensor.name,), tensor.dtype)),
        *random_routers(mixture, deviation=router_std, seed=seed),
        *expert_steps(mixture, change),
    ]
    parameters = {
        "experts": experts,
        "top_k": top_k,
        "layout": mixture.layout.name,
        "layers": layers,
        "drop_ratio": drop_ratio,
        "noise": noise,
        "router_std": router_std,
        "seed": seed,
    }
    notes = _change_notes(change, dense)
    return mixture_plan("upcycle", mixture, steps, parameters, top_k=top_k, notes=notes)


def design(
    dense: Dense, experts: tuple[Dense, ...], *, layout: str | None, layers: str | None
) -> Mixture:
    """Decide the layout and which layers become mixtures.

    Raises:
        RecipeError: a layer or layout that does not exist.
        PlanError: no layout, or not the one asked for, holds the model exactly.
    """
    sparse = sparse_layers(layers, dense.parts.layers)
    chosen = choose_layout(
        layout,
        dense.names,
        place=f"{dense.source.ref} ({dense.parts.family})",
        windows=dense.windows,
        whole=len(sparse) == dense.parts.layers,
    )
    return Mixture(dense=dense, experts=experts, layout=chosen, sparse=sparse)


def mixture_plan(
    operation: str,
    mixture: Mixture,
    steps: list[Step],
    parameters: Mapping[str, object],
    *,
    top_k: int,
    notes: list[str],
    sources: tuple[Checkpoint, ...] = (),
    dropped: dict[str, str] | None = None,
) -> Plan:
    """Return the plan that the steps of a mixture make, its config and what is to be told."""
    base, count = mixture.dense.source, len(mixture.experts)
    told = figures(mixture, top_k=top_k)
    return check_plan(
        Plan(
            operation=operation,
            parameters=parameters,
            sources=sources or (base,),
            steps=(*steps, *shared_expert_steps(mixture)),
            order=ordered_names(mixture),
            config=mixture_config(
                mixture.dense, mixture.layout, experts=count, top_k=top_k, sparse=mixture.sparse
            ),
            carried=tuple(path for path in base.carried if path.suffix != ".py"),
            dropped={**dropped_tensors(mixture), **(dropped or {})},
            facts={"experts": count, "mixture_layers": list(mixture.sparse), **told},
            notes=(*base.notes, *notes, *layout_notes(mixture.layout, top_k=top_k)),
        )
    )


def _change_notes(change: Change, dense: Dense) -> list[str]:
    notes = []
    if change.neurons:
        notes.append(
            f"{change.neurons} of {dense.width} neurons of each expert start anew: the result is "
            "worse than the base until it is trained"
        )
    if change.noise:
        notes.append("noise is added to every expert: the result is not exactly the base")
    return notes
