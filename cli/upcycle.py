"""`surgery upcycle`: a dense model as a mixture of experts."""

from typing import Annotated

import typer

from cli.writing import BASE, Writing, make, writing_options
from growth.upcycle import ROUTER_DEVIATION, upcycle
from growth.upcycle.layout import Name

TOP_K = Annotated[int, typer.Option("--top-k", help="How many experts each token takes.")]
LAYOUT = Annotated[
    Name | None,
    typer.Option(help="Family of the result.  [default: the first that holds the attention]"),
]
LAYERS = Annotated[
    str | None,
    typer.Option(metavar="RANGES", help='Which layers become mixtures, such as "1-3".'),
]
ROUTER_STD = Annotated[
    float, typer.Option("--router-std", help="Standard deviation of random routers.")
]


@writing_options
def command(
    base: BASE,
    *,
    experts: Annotated[int, typer.Option(help="How many experts.")],
    top_k: TOP_K = 2,
    layout: LAYOUT = None,
    layers: LAYERS = None,
    drop_ratio: Annotated[
        float, typer.Option(help="Share of each expert's neurons that start anew.")
    ] = 0.0,
    noise: Annotated[
        float, typer.Option(help="Noise on each expert, as a share of its standard deviation.")
    ] = 0.0,
    router_std: ROUTER_STD = ROUTER_DEVIATION,
    seed: Annotated[int, typer.Option(help="Seed of routers, neurons and noise.")] = 0,
    writing: Writing,
) -> None:
    """Copy the feed-forwards of a dense model to experts, of which each token takes a few.

    Without --drop-ratio and --noise the result computes exactly what BASE does, whatever the
    router says. With them the experts differ, which training needs, and nothing is exact.
    """
    make(
        base,
        lambda source: upcycle(
            source,
            experts=experts,
            top_k=top_k,
            layout=layout,
            layers=layers,
            drop_ratio=drop_ratio,
            noise=noise,
            router_std=router_std,
            seed=seed,
        ),
        suffix=f"moe{experts}",
        writing=writing,
    )
