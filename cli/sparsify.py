"""`surgery sparsify`: zeros inside the linear maps."""

from typing import Annotated, Any

import typer

from cli.measured import Measuring, measured, measuring_options
from cli.writing import BASE, Writing, default_output, write_plan, writing_options
from growth.sparsify import NEEDS, Method, choose_maps, parse_sparsity, sparsify
from surgery.pipeline import is_ahead

FILTERS = "a part of module names, glob:PATTERN or regex:PATTERN; several times for several."


@writing_options
@measuring_options
def command(
    base: BASE,
    *,
    method: Annotated[Method, typer.Option(help="Which weights become zero.")],
    sparsity: Annotated[
        str, typer.Option(metavar="S|N:M", help="Share of zeros, or N kept of every M (2:4).")
    ],
    include: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Only modules by {FILTERS}")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Leave out modules by {FILTERS}")
    ] = None,
    measuring: Measuring,
    writing: Writing,
) -> None:
    """Set weights of the layers' linear maps to zero.

    magnitude goes by the weights alone; wanda weighs them by the size of their inputs on text, per
    output; sparsegpt moves the weights that stay, to make up for those that go. Embeddings, norms,
    routers and the head stay. The file does not shrink: zeros pay with kernels that know them.

    Example: surgery sparsify model --method wanda --sparsity 2:4 --calibration text.jsonl
    """
    writing.limits()
    parse_sparsity(sparsity)
    source = writing.open(base)
    out = writing.output or default_output(source, f"{method}")
    asks: dict[str, Any] = {
        "sparsity": sparsity,
        "include": include or (),
        "exclude": exclude or (),
    }
    if method not in NEEDS:
        measuring.need_none(f"--method {method}")
        write_plan(sparsify(source, method=method, **asks), out, writing)
        return
    measuring.need(f"--method {method}")
    choose_maps(source, method, **asks)  # a wrong ask costs no measurement
    guess = sparsify(source, method="magnitude", **asks)
    kinds = [NEEDS[method]]
    with measured(guess, out, kinds, measuring=measuring, writing=writing) as statistics:
        ahead = statistics is None and is_ahead()
        plan = guess if ahead else sparsify(source, statistics, method=method, **asks)
        write_plan(plan, out, writing)
