"""Parameters that the task-vector methods share, declared once."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from surgery.method import Param, PerModel

Weight = Annotated[PerModel[float], Param("weight of each task vector; may be negative")]
Density = Annotated[PerModel[float], Param("fraction of each task vector that is kept", ge=0, le=1)]
Normalize = Annotated[bool, Param("divide by the weights that were added up")]
Rescale = Annotated[
    Literal["none", "l1", "inverse"],
    Param(
        "make up for what was dropped: keep the sum of magnitudes (l1, true), or divide by"
        " the probability of being kept (inverse)",
        switch=("l1", "none"),
    ),
]
Lambda = Annotated[float, Param("factor of the merged task vector")]
Elect = Annotated[
    Literal["weighted", "raw"], Param("whether the signs vote with their weights or without")
]
Divide = Annotated[
    Literal["weights", "count"], Param("what normalize divides by: weights or number of agreeing")
]
LinesAlpha = Annotated[
    float | None, Param("LiNeS: factor of the first layer, and of what is in none")
]
LinesBeta = Annotated[float | None, Param("LiNeS: added to it up to the last layer")]


def groups(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the groups that a task-vector method asks for with these values."""
    trim = ("trim",) if values.get("scope") == "model" else ()
    alone = values.get("lines_alpha") is None and values.get("lines_beta") is not None
    return (*trim, "lines") if alone else trim
