"""float32 arithmetic on slices of stored bytes, rounded once; the only torch in the engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import ResultError
from surgery.plan import Function, TensorSpec

if TYPE_CHECKING:
    import torch

# Slices of this many elements stay in the cache while they are worked on (measured: 512 Ki).
PART = 512 << 10
COMPUTABLE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
}  # fmt: skip


def torch_dtype(code: str) -> "torch.dtype":
    """Return torch's dtype for a safetensors code that can be computed with."""
    import torch

    found: torch.dtype = getattr(torch, COMPUTABLE[code])
    return found


def use_one_thread() -> None:
    """Keep torch to one thread: the engine has its own."""
    import torch

    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


def compute_slice(
    fn: Function,
    inputs: Sequence[tuple[memoryview, str]],
    outputs: Sequence[tuple[memoryview, str]],
    name: str,
) -> None:
    """Apply an elementwise `fn` to equal slices; fill the output views.

    Args:
        fn: takes one float32 (float64 for F64) vector per input, gives one per output.
        inputs: bytes and dtype code of each input slice, all of n elements.
        outputs: writable bytes and dtype code of each output slice, of n elements.
        name: the tensor, for errors.

    Raises:
        ResultError: the result is not finite.
    """
    sources = [as_tensor(view, code) for view, code in inputs]
    targets = [as_tensor(view, code) for view, code in outputs]
    for start in range(0, targets[0].numel(), PART):
        parts = [wide(source[start : start + PART]) for source in sources]
        results = _as_tuple(fn(*parts))
        for target, result in zip(targets, results, strict=True):
            _store(target[start : start + PART], result, name)


def compute_whole(
    fn: Function,
    inputs: Sequence[tuple[memoryview, str, tuple[int, ...]]],
    outputs: Sequence[tuple[memoryview, TensorSpec]],
    name: str,
) -> None:
    """Apply `fn` to whole tensors in their stored shapes; fill the output views.

    Raises:
        ResultError: a result is not finite or has another shape than planned.
    """
    results = _as_tuple(fn(*(wide(as_tensor(v, code)).view(shape) for v, code, shape in inputs)))
    for (view, spec), result in zip(outputs, results, strict=True):
        if tuple(result.shape) != spec.shape:
            raise ResultError(name, f"came out as {tuple(result.shape)}, planned was {spec.shape}")
        _store(as_tensor(view, spec.dtype), result.reshape(-1), name)


def as_tensor(view: memoryview, code: str) -> "torch.Tensor":
    """See bytes as a flat tensor without copying them."""
    import torch

    if not len(view):
        return torch.empty(0, dtype=torch_dtype(code))
    return torch.frombuffer(view, dtype=torch_dtype(code))


def wide(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return float32, or the tensor itself where it is float64."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _as_tuple(result: object) -> tuple["torch.Tensor", ...]:
    return result if isinstance(result, tuple) else (result,)


def _store(target: "torch.Tensor", result: "torch.Tensor", name: str) -> None:
    target.copy_(result)
    if not bool(target.isfinite().all()):
        fact = "the result holds NaN or infinity"
        raise ResultError(name, fact, "check the inputs with `surgery verify`, or the parameters")
