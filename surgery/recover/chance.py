"""States of the random number generators, as tensors with one row per process.

Shapes: [processes, numbers of a state].
"""

import hashlib
import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING

from surgery.recover.distributed import World
from surgery.recover.saved import Saved
from surgery.recover.sharded import DTYPES

if TYPE_CHECKING:
    import torch

    States = Mapping[str, torch.Tensor]

MERSENNE = 3  # version of Python's state: 624 words and where it stands in them


def random_states(world: World) -> "dict[str, torch.Tensor]":
    """Return the states of torch, numpy and Python in every process; all of them call it."""
    return {name: _rows(state, world) for name, state in _own(world).items()}


def restore_random_states(saved: Saved, section: str, world: World) -> None:
    """Go on with the random numbers of a saved run.

    Where the number of processes has changed, the first goes on with its own, and the others
    start from a seed that follows from those and their rank.
    """
    import torch

    rows: dict[str, torch.Tensor] = {}
    for name, (code, shape) in sorted(saved.tensors[section].items()):
        if name == "cuda" and world.device.type != "cuda":
            continue
        rows[name] = torch.empty(tuple(shape), dtype=getattr(torch, DTYPES[code]))
        saved.fill(section, name, rows[name])
    if world.is_first or len(rows["torch"]) == world.size:
        # torch reads a generator state from the start of its storage, so a row has to be a copy
        _set({name: table[world.rank].clone() for name, table in rows.items()}, world)
        return
    first = rows["torch"][0].numpy().tobytes()
    _seed(hashlib.sha256(first + world.rank.to_bytes(8, "big")).digest())


def _own(world: World) -> "dict[str, torch.Tensor]":
    import numpy as np
    import torch

    _, words, at, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one
    _, numbers, kept = random.getstate()
    found = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, words), int(at), int(has_gauss)]),
        "numpy_gauss": torch.tensor([float(gauss)], dtype=torch.float64),
        "python": torch.tensor(numbers),
        "python_gauss": torch.tensor([math.nan if kept is None else kept], dtype=torch.float64),
    }
    if world.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(world.device)
    return found


def _set(states: "States", world: World) -> None:
    import numpy as np
    import torch

    torch.set_rng_state(states["torch"])
    *words, at, has_gauss = states["numpy"].tolist()
    told = ("MT19937", np.array(words, dtype=np.uint32), at, has_gauss)
    np.random.set_state((*told, float(states["numpy_gauss"])))  # noqa: NPY002 - the global one
    gauss = float(states["python_gauss"])
    kept = None if math.isnan(gauss) else gauss
    random.setstate((MERSENNE, tuple(states["python"].tolist()), kept))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], world.device)


def _seed(material: bytes) -> None:
    import numpy as np
    import torch

    torch.manual_seed(int.from_bytes(material[:8], "big") >> 1)
    np.random.seed(int.from_bytes(material[8:12], "big"))  # noqa: NPY002 - the global one
    random.seed(material[12:])


def _rows(state: "torch.Tensor", world: World) -> "torch.Tensor":
    """Return the states of all processes [processes, n]."""
    import torch
    from torch import distributed

    if world.size == 1:
        return state[None]
    own = state.to(world.device)
    rows = [torch.empty_like(own) for _ in range(world.size)]
    distributed.all_gather(rows, own)
    return torch.stack(rows).cpu()
