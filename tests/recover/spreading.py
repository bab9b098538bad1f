"""Run by torchrun: open a recovery, and tell what this process has held of the models."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recovering import ask_of
from surgery.recover import spread
from surgery.recover.distributed import joined
from surgery.recover.session import opened


class Peak(TorchDispatchMode):
    """Counts the bytes of all live tensors that operations have made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, StorageWeakRef] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            tensor = leaf.to_local() if isinstance(leaf, DTensor) else leaf
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                held = StorageWeakRef(tensor.untyped_storage())
                self.live[held.cdata] = held
        self.live = {key: held for key, held in self.live.items() if not held.expired()}
        self.most = max(self.most, sum(map(size, self.live.values())))
        return made


def size(held: StorageWeakRef) -> int:
    storage = torch.UntypedStorage._new_with_weak_ptr(held.cdata)
    return 0 if storage is None else storage.nbytes()


def nbytes(tensor: Any) -> int:
    part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.untyped_storage().nbytes()


def main(student: str, out: Path, options: dict[str, Any]) -> None:
    read, real = [0], spread._read

    def counted(home: Any, tensor: Any, world: Any) -> bool:
        read[0] += 0 if not isinstance(tensor, DTensor) else nbytes(tensor)
        return real(home, tensor, world)

    spread._read = counted
    with joined("cpu") as world, Peak() as peak:
        with opened(ask_of(Path(student), out / "out", **options), world) as session:
            models = [session.trainable.model, session.teacher.model]
            every = [p for model in models for p in model.parameters()]
            own = {id(p): p for p in session.held}
            whole = sum(p.numel() * p.element_size() for p in every if id(p) not in own)
            one = session.layers[0]
            told = {
                "meta": sum(t.is_meta for m in models for t in (*m.parameters(), *m.buffers())),
                "whole": whole,
                "trained": sum(map(nbytes, own.values())),
                "local": sum(map(nbytes, every)),
                "read": read[0],
                "uneven": 4 * 352 * len(every),  # a row of each
                "root": models[0].get_input_embeddings().weight.numel() * 4,
                "layer": sum(p.numel() * p.element_size() for p in one.parameters()),
                "peak": peak.most,
            }
            del models, every, own, one
        (out / f"told{world.rank}.json").write_text(json.dumps(told))
        del session


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
    os._exit(0)
