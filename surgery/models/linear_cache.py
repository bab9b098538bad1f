"""What linear layers keep between calls, in the place that transformers has for keys and values."""

from collections.abc import Callable, Iterable

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .linear_seen import Past

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up


class LinearizedLayer(CacheLayerMixin):  # type: ignore[misc]
    """What one linear layer keeps of all tokens; its size does not grow."""

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.past = Past()

    def lazy_initialization(self, *_: object) -> None:
        """Nothing to prepare."""

    def update(self, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keys and values are not kept: a stock attention layer has no business here."""
        raise ValueError("the cache of a linear layer was given to softmax attention")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask, as if all tokens were kept."""
        return self.past.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.past.length

    def get_max_length(self) -> int:
        """No bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier versions

    def reset(self) -> None:
        """Forget."""
        self.past = Past()

    def offload(self) -> None:
        """It is small and stays where it is."""

    prefetch = offload

    def crop(self, tokens_to_remove: int) -> None:
        """Sums cannot be taken back."""
        if tokens_to_remove:
            raise ValueError("the cache of a linear layer cannot be cropped")

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.past.tensors = {name: change(kept) for name, kept in self.past.tensors.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of the beams that go on."""
        self._each(lambda kept: kept.index_select(0, beam_idx.to(kept.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._each(lambda kept: kept.repeat_interleave(repeats, dim=0))


def adopt(cache: DynamicCache, config: PreTrainedConfig, linear_layers: Iterable[int]) -> None:
    """Give linear layers their own place in a new cache.

    Raises:
        ValueError: it is of a kind that cannot have one, or holds keys and values already.
    """
    if cache.offloading:
        fact = "offloading fetches the layer that comes next, and a linear one is never away"
        raise ValueError(f"past_key_values: {fact}: use a cache that is not offloaded")
    if not cache.layers:
        cache.layers.extend(DynamicCache(config=config).layers)
    for n in linear_layers:
        layer = cache.layers[n]
        if isinstance(layer, LinearizedLayer):
            continue
        if not isinstance(layer, DynamicLayer) or layer.get_seq_length():
            fact = f"{type(layer).__name__} holds no sums: start with a new DynamicCache"
            raise ValueError(f"past_key_values: layer {n} is linear, and {fact}")
        cache.layers[n] = LinearizedLayer()
