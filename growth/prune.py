"""Depth by removal of named layers."""

from growth.depth import DepthMap, change_depth, check_layers, parse_layers
from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint
from surgery.plan import Plan


def prune(base: Checkpoint, *, layers: str) -> Plan:
    """Drop layers such as `21-28` (both ends included); the others close up.

    Raises:
        RecipeError: a layer does not exist, or none would be left.
    """
    count = anatomy(base).layers
    gone = parse_layers(layers, option="--layers")
    check_layers(gone, count)
    kept = tuple(n for n in range(count) if n not in gone)
    return change_depth(
        base, DepthMap(sources=kept), operation="prune", parameters={"layers": layers}
    )
