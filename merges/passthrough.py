"""One model as it is, or scaled."""

from typing import Annotated

from surgery.method import Param, Tensor, merge


@merge(source="https://github.com/arcee-ai/mergekit", elementwise=True, plain=True)
def passthrough(
    model: Tensor,
    *,
    scale: Annotated[float | None, Param("multiplies every weight")] = None,
) -> Tensor:
    r"""Take a model's weights, times `scale` where there is one.

    $$W = s\,W_1$$

    Shapes: any.

    Source: mergekit; with slices of layers it makes the models called frankenmerges.
    """
    return model if scale is None else model * scale
