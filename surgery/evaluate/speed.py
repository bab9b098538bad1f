"""How fast a model reads and writes, and what it holds meanwhile."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from surgery.errors import TrainError
from surgery.evaluate.load import Loaded, first_line

if TYPE_CHECKING:
    import torch

RUNS = 3
DECODED = 32
_HIGHEST = "VmHWM:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """One sequence through one model, a batch of 1.

    Attributes:
        prefill_tokens: Tokens read at once.
        prefill_per_second: Tokens read in a second, the median of three runs.
        decoded_tokens: Tokens written one by one behind them, from the cache.
        decode_per_second: Tokens written in a second, likewise; None where there is no cache.
        prefill_peak, decode_peak: Most bytes of memory held meanwhile, weights included; None
            where this machine does not tell.
        memory: What those bytes are: "allocated on the device" or "resident in the process".
        cache_per_token: Bytes by which the cache grows with a token; None without a cache.
        state_bytes: Bytes of the cache that do not grow, at this length; None likewise.
    """

    prefill_tokens: int
    prefill_per_second: float
    decoded_tokens: int
    decode_per_second: float | None
    prefill_peak: int | None
    decode_peak: int | None
    memory: str
    cache_per_token: float | None
    state_bytes: float | None


def measure_speed(loaded: Loaded, *, context: int) -> Speed:
    """Time reading and writing once warm, and weigh the cache at two lengths.

    The prompt fills the context less the 32 tokens that are written behind it. Bytes a token
    are the growth of the cache between half the prompt and all of it: a sliding window that is
    full before, or a recurrent state, does not grow.

    Raises:
        TrainError: A forward pass fails.
    """
    import torch

    new = min(DECODED, max(1, context // 4))
    length = max(2, context - new)
    ids = (torch.arange(length, device=loaded.device) * 7919 % loaded.embeddings)[None]
    half, full = (_cache(_forward(loaded, ids[:, :n])) for n in (length // 2, length))
    read = [_timed(loaded, lambda: _forward(loaded, ids)) for _ in range(RUNS)]
    wrote = [] if full is None else [_decode(loaded, ids, new) for _ in range(RUNS)]
    grown = None if half is None or full is None else (full - half) / (length - length // 2)
    return Speed(
        prefill_tokens=length,
        prefill_per_second=length / median(seconds for seconds, _ in read),
        decoded_tokens=new if wrote else 0,
        decode_per_second=new / median(seconds for seconds, _ in wrote) if wrote else None,
        prefill_peak=_most(peak for _, peak in read),
        decode_peak=_most(peak for _, peak in wrote),
        memory="allocated on the device" if _is_cuda(loaded) else "resident in the process",
        cache_per_token=grown,
        state_bytes=None if grown is None or full is None else full - grown * length,
    )


def cache_bytes(cache: object) -> int:
    """Return bytes of all tensors that a cache holds, each once, wherever it keeps them."""
    return sum(x.numel() * x.element_size() for x in _tensors(cache, {}).values())


def _tensors(value: object, found: "dict[int, torch.Tensor]") -> "dict[int, torch.Tensor]":
    import torch

    if isinstance(value, torch.Tensor):
        if value.numel():
            found[id(value)] = value
        return found
    inner: Any = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    elif type(value).__module__.startswith(("transformers.", "surgery.")):
        inner = vars(value).values() if hasattr(value, "__dict__") else ()
    for each in inner:
        _tensors(each, found)
    return found


def _cache(out: Any) -> int | None:  # noqa: ANN401 - an output of any architecture
    for name in ("past_key_values", "cache_params", "state"):
        if getattr(out, name, None) is not None:
            return cache_bytes(getattr(out, name))
    return None


def _forward(loaded: Loaded, ids: "torch.Tensor", cache: Any = None) -> Any:  # noqa: ANN401
    import torch

    given = {} if cache is None else {"past_key_values": cache}
    try:
        with torch.inference_mode():
            return loaded.model(input_ids=ids, use_cache=True, **given)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        fact = f"the forward pass fails ({first_line(error)})"
        raise TrainError(loaded.path, fact, "lower --context, or leave --speed out") from error


def _decode(loaded: Loaded, ids: "torch.Tensor", new: int) -> tuple[float, int | None]:
    """Time the tokens behind a prompt; reading the prompt is not timed."""
    out = _forward(loaded, ids)

    def write() -> None:
        last = out
        for _ in range(new):
            chosen = last.logits[:, -1:].argmax(-1)
            last = _forward(loaded, chosen, out.past_key_values)

    return _timed(loaded, write)


def _timed(loaded: Loaded, action: Callable[[], object]) -> tuple[float, int | None]:
    """Return seconds, and the most bytes held meanwhile."""
    import torch

    cuda = _is_cuda(loaded)
    told = cuda or _forget_highest()
    if cuda:
        torch.cuda.synchronize(loaded.device)
        torch.cuda.reset_peak_memory_stats(loaded.device)
    start = perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize(loaded.device)
    seconds = perf_counter() - start
    if cuda:
        return seconds, torch.cuda.max_memory_allocated(loaded.device)
    return seconds, _highest() if told else None


def _is_cuda(loaded: Loaded) -> bool:
    return loaded.device.type == "cuda"


def _forget_highest() -> bool:
    """Let the system count this process's highest memory from here on; Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _highest() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(_HIGHEST)]
    return int(found[0]) << 10 if found else None


def _most(values: Iterator[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
