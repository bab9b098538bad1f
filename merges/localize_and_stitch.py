"""Localize-and-stitch without data: the largest changes of each task, averaged where they meet."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from merges.stages.layers import added
from merges.stages.localized import added_up
from merges.stages.parameters import Lambda, LinesAlpha, LinesBeta, groups
from merges.stages.trim import by_magnitude
from surgery.method import Param, PerModel, Place, Tensor, merge
from surgery.passes import Passes, Slices


def _groups(values: Mapping[str, Any]) -> tuple[str, ...]:
    return groups({**values, "scope": "model"})


@merge(source="https://arxiv.org/abs/2408.13656", groups=_groups)
def localize_and_stitch(
    base: Tensor,
    models: Sequence[Tensor],
    *,
    density: Annotated[
        PerModel[float], Param("fraction of each task vector that is kept", gt=0, le=1)
    ] = 0.1,
    lambda_: Lambda = 1.0,
    lines_alpha: LinesAlpha = None,
    lines_beta: LinesBeta = None,
    place: Place,
) -> Passes:
    r"""Keep the largest changes of every task, and average those that several tasks keep.

    $$W = W_0 + \lambda \sum_i \frac{\gamma_i}{\sum_j \gamma_j} \odot \tau_i$$

    with $\gamma_i$ the mask of the `density` largest magnitudes of $\tau_i$ over all tensors that
    are merged, the lower index first where they are equal; zeros are in no mask.

    Shapes: all equal, any.

    Deviations: the dataless form only, in which magnitudes choose the masks; the authors' other
    form trains them. Their code compares with the k-th value strictly, and so keeps k - 1.
    What they call sparsity is `density` here, and lambda is ours.

    Source: "Localize-and-Stitch", arXiv 2408.13656, sections 3.2 and 3.3; dataless, section 3.4.
    """
    vectors = yield from by_magnitude(density, base.numel(), scope="model")
    del models

    def combined(x: Slices) -> Tensor:
        from torch import from_numpy

        kept = [from_numpy(vector) for vector in vectors.slices(x)]
        counts = added_up([vector.sign().abs_() for vector in kept])
        return added_up(kept).div_(counts.clamp_(min=1))

    return (
        yield from added(
            combined, scale=lambda_, lines_alpha=lines_alpha, lines_beta=lines_beta, place=place
        )
    )
