"""What models keep of a text, and what a forward pass keeps for gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks.linear_speed_shapes import Shape


class Room(DynamicLayer):  # type: ignore[misc]
    """Keys and values in a place that has room for all, so that a token copies none of them."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        super().__init__()
        self.all, self.seen, self.is_initialized = (keys, values), seen, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write, and return what there is."""
        new = slice(self.seen, self.seen + key_states.shape[2])
        for own, states in zip(self.all, (key_states, value_states), strict=True):
            own[:, :, new] = states
        self.seen = new.stop
        return self.all[0][:, :, : self.seen], self.all[1][:, :, : self.seen]

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen


def roomy(config: Any, rows: int, shape: Shape, device: str) -> DynamicCache:  # noqa: ANN401
    """Return a cache of random keys and values, with room for the tokens to come."""
    cache = DynamicCache(config=config)
    size = (rows, shape.kv_heads, shape.room, shape.head_dim)
    kind = {"dtype": getattr(torch, shape.dtype), "device": device}
    for n in range(shape.layers):
        keys, values = torch.randn(size, **kind), torch.randn(size, **kind)
        layer = Room(keys, values, shape.context)
        cache.layers[n : n + 1] = [layer]
    return cache


def tensors_of(layer: Any) -> list[torch.Tensor]:  # noqa: ANN401
    """Return what one layer of a cache keeps."""
    past = getattr(layer, "past", None)
    return [layer.keys, layer.values] if past is None else list(past.tensors.values())


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes behind a cache; a view counts as all that it holds."""
    found = {}
    for tensor in (t for layer in cache.layers for t in tensors_of(layer)):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Count the storages that a forward pass saves, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive = []  # so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found
