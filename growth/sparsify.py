"""Zeros inside the linear maps: by magnitude, by Wanda, by SparseGPT; any share, or n of m."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from growth.linears import Linear, find_linears
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.plan import Plan, Step, Tell, TensorSpec, check_plan

if TYPE_CHECKING:
    from torch import Tensor

    from surgery.calibrate.statistics import Statistics

Method = Literal["magnitude", "wanda", "sparsegpt"]
NEEDS = {"wanda": "inputs", "sparsegpt": "grams"}
CHUNK = 1 << 20  # elements of the rows worked on at once
BLOCK = 128  # columns that SparseGPT works on at once (the authors' size)
DAMPING = 0.01  # share of the mean of the Hessian's diagonal that is added to it (the authors')
SHARE = re.compile(r"0?\.[0-9]{1,6}")
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
OF = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")


@dataclass(frozen=True, slots=True)
class Pattern:
    """How many weights become zero.

    Attributes:
        share: of all.
        keep, of: keep at most `keep` of every `of` neighbours along the inputs; 0 where free.
    """

    share: float
    keep: int = 0
    of: int = 0


def parse_sparsity(text: str) -> Pattern:
    """Parse a share of zeros such as `0.5`, or `2:4`, which keeps two of every four.

    Raises:
        RecipeError: neither of these.
    """
    match = OF.fullmatch(text.strip())
    if match and int(match[1]) < int(match[2]):
        keep, of = int(match[1]), int(match[2])
        return Pattern(1 - keep / of, keep, of)
    if SHARE.fullmatch(text.strip()) and 0 < float(text) < 1:
        return Pattern(float(text))
    fact = "is neither a share between 0 and 1 nor a pattern such as 2:4"
    raise RecipeError(f"--sparsity {text[:40]}", fact, "write for instance 0.5 or 2:4")


def sparsify(
    base: Checkpoint,
    statistics: Checkpoint | None = None,
    *,
    method: Method,
    sparsity: str,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
) -> Plan:
    """Plan a model with zeros in every linear map of its layers, the rest of its weights kept.

    - `magnitude`: the weights of least |w| of each map become zero.
    - `wanda`: per output, those of least |w_ij| ||x_j|| (arXiv 2306.11695, equation 1).
    - `sparsegpt`: columns one after the other, each map's error made up for by the columns that
      follow (arXiv 2301.00774, algorithm 1; blocks of 128, damping 0.01, as the authors do).

    Which weights are zero is what the output's own zeros tell; the record names the maps under
    `masked`, so that recovery can keep them.

    Args:
        base: the model.
        statistics: of `surgery calibrate`: inputs for wanda, grams for sparsegpt.
        sparsity: share of zeros, or `2:4`.
        include, exclude: parts of module names, `glob:PATTERN` or `regex:PATTERN`.

    Raises:
        RecipeError: an option makes no sense, or a map's inputs are no multiple of the pattern.
        CheckpointError: the statistics lack what the method needs.
        PlanError: the layers hold no linear maps that are stored one by one.
    """
    pattern = parse_sparsity(sparsity)
    include, exclude = [*include], [*exclude]
    linears = choose_maps(base, method, sparsity, include=include, exclude=exclude)
    found = _statistics(statistics, base, method)
    chosen = {x.tensor.name: x for x in linears}
    steps = tuple(
        _sparse(chosen[name], found, method, pattern) if name in chosen else _copy(tensor)
        for name, tensor in base.tensors.items()
    )
    sources = (base,) if statistics is None else (base, statistics)
    used = {part.name for step in steps for part in step.inputs[1:]}
    beside = statistics.tensors if statistics is not None else {}
    return check_plan(
        Plan(
            operation="sparsify",
            parameters={
                "method": method,
                "sparsity": sparsity,
                "include": include,
                "exclude": exclude,
            },
            sources=sources,
            steps=steps,
            order=tuple(base.tensors),
            config=base.config,
            carried=base.carried,
            dropped={n: "of the statistics, not asked for" for n in beside if n not in used},
            facts={"masked": [x.module for x in linears], "sparsity": sparsity, "method": method},
            notes=base.notes,
        )
    )


def choose_maps(
    base: Checkpoint,
    method: Method,
    sparsity: str,
    *,
    include: Iterable[str],
    exclude: Iterable[str],
) -> list[Linear]:
    """Return the maps that get zeros; see `sparsify` for arguments and errors."""
    of = parse_sparsity(sparsity).of
    _, linears = find_linears(base, include=include, exclude=exclude)
    odd = next((x for x in linears if of and x.inputs % of), None)
    if odd is not None:
        fact = f"does not divide the {odd.inputs} inputs of {odd.module}"
        raise RecipeError(f"--sparsity {sparsity}", fact, "give a share, or leave it out")
    expert = next((x for x in linears if EXPERT.search(x.module)), None)
    if expert is not None and method in NEEDS:
        fact = f"goes by inputs, which are not measured for single experts ({expert.module})"
        remedy = "take --method magnitude, or --exclude experts"
        raise PlanError(f"--method {method}", fact, remedy)
    return linears


def _statistics(
    statistics: Checkpoint | None, base: Checkpoint, method: Method
) -> "Statistics | None":
    if method == "magnitude":
        return None
    if statistics is None:
        fact = "needs statistics of the model's activations"
        raise RecipeError(f"--method {method}", fact, "name text with --calibration")
    from surgery.calibrate.statistics import open_statistics  # with numpy

    return open_statistics(statistics, base)


def _copy(tensor: TensorInfo) -> Step:
    spec = TensorSpec(tensor.dtype, tensor.shape)
    return Step(inputs=(tensor,), outputs=((tensor.name, spec),))


def _sparse(
    linear: Linear, statistics: "Statistics | None", method: Method, pattern: Pattern
) -> Step:
    beside: tuple[TensorInfo, ...] = ()
    if statistics is not None and method == "wanda":
        beside = (statistics.tensor(f"{linear.module}.square", "inputs"),)
    elif statistics is not None:
        beside = (statistics.gram(linear.module),)
    names = ("zeros", "error") if method == "sparsegpt" else ("zeros",)
    return Step(
        inputs=(linear.tensor, *beside),
        outputs=((linear.tensor.name, TensorSpec(linear.tensor.dtype, linear.tensor.shape)),),
        fn=partial(_apply, method=method, pattern=pattern, swapped=linear.swapped),
        streamed=True,
        scratch=_scratch(linear, method),
        why=method,
        key=repr((pattern, method)),
        tells=names,
    )


def _scratch(linear: Linear, method: Method) -> int:
    size, width = linear.tensor.numel, 8 if linear.tensor.dtype in {"F32", "F64"} else 4
    if method == "sparsegpt":
        return 4 * (4 * size + 4 * linear.inputs**2)
    held = size if linear.swapped else max(CHUNK, linear.inputs)
    return (4 * width + 16) * held + 64 * CHUNK


def _is_global(method: Method, pattern: Pattern) -> bool:
    return method == "magnitude" and not pattern.of


def _apply(
    weight: Any,  # noqa: ANN401 - `Stored`
    *beside: Any,  # noqa: ANN401 - `Stored`
    method: Method,
    pattern: Pattern,
    swapped: bool,
) -> Iterator[Any]:
    """Give the weight with zeros, and tell how many there are."""
    if method == "sparsegpt":
        found, error = sparse_gpt(_whole(weight, swapped=swapped), beside[0], pattern)
        yield found.T.contiguous() if swapped else found
        yield Tell(zeros=float((found == 0).double().mean()), error=error)
        return
    zeros = total = 0
    sizes = beside[0][...] if method == "wanda" else None
    parts = iter([_whole(weight, swapped=True)]) if swapped else _rows(weight)
    masks = _global_masks(weight, pattern) if _is_global(method, pattern) else None
    for w in parts:
        score = w.abs() if sizes is None else w.abs() * sizes.to(w.dtype).sqrt()
        mask = smallest(score, pattern) if masks is None else masks(score)
        found = w.masked_fill(mask, 0.0)
        zeros, total = zeros + int((found == 0).sum()), total + w.numel()
        yield found.T.contiguous() if swapped else found
    yield Tell(zeros=zeros / total)


def _whole(weight: Any, *, swapped: bool) -> "Tensor":  # noqa: ANN401 - `Stored`
    found: Tensor = weight[...].float()
    return found.T.contiguous() if swapped else found


def _rows(weight: Any) -> "Iterator[Tensor]":  # noqa: ANN401 - `Stored`
    step = max(CHUNK // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        yield weight[start : start + step]


def _global_masks(weight: Any, pattern: Pattern) -> "Callable[[Tensor], Tensor]":  # noqa: ANN401
    """Return what masks one run of elements after the other: the least of the whole map.

    Of those equal to the greatest that goes, the first ones in the map's own order.
    """
    import torch

    count = int(math.prod(weight.shape) * pattern.share)
    if not count:
        return lambda score: torch.zeros(score.shape, dtype=torch.bool)
    bound, left = _smallest_but(weight, count)

    def mask(score: "Tensor") -> "Tensor":
        nonlocal left
        equal = (score == bound).reshape(-1)
        taken = equal & (equal.cumsum(0) <= left)
        left -= int(taken.sum())
        return (score < bound) | taken.view(score.shape)

    return mask


def _smallest_but(weight: Any, count: int) -> "tuple[Tensor, int]":  # noqa: ANN401 - `Stored`
    """Return the magnitude that `count` do not exceed, and how many equal to it are among those.

    Bits of magnitudes rise with them, so 16 bits after the other are counted; nothing is held.
    """
    import torch

    double = weight.dtype == torch.float64
    whole, first = (torch.int64, 48) if double else (torch.int32, 16)
    found, left = 0, count
    for shift in range(first, -1, -16):
        counts = torch.zeros(1 << 16, dtype=torch.int64)
        for part in _rows(weight):
            bits = part.abs().view(whole).reshape(-1)
            alike = bits if shift == first else bits[bits >> (shift + 16) == found]
            counts += torch.bincount((alike >> shift) & 0xFFFF, minlength=1 << 16)
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, left))
        left -= int(up_to[digit] - counts[digit])
        found = found << 16 | digit
    return torch.tensor(found, dtype=whole).view(weight.dtype), left


def smallest(score: "Tensor", pattern: Pattern) -> "Tensor":
    """Return where the smallest scores of each output are, [outputs, inputs]; of equals the first.

    With a pattern of n of m, those of each m neighbours.
    """
    if pattern.of:
        near = _smallest_of_rows(score.reshape(-1, pattern.of), pattern.of - pattern.keep)
        return near.view(score.shape)
    return _smallest_of_rows(score, int(score.shape[1] * pattern.share))


def _smallest_of_rows(score: "Tensor", count: int) -> "Tensor":
    import torch

    order = score.argsort(dim=1, stable=True)[:, :count]
    mask = torch.zeros(score.shape, dtype=torch.bool)
    mask.scatter_(1, order, True)
    return mask


def sparse_gpt(weight: "Tensor", gram: Any, pattern: Pattern) -> "tuple[Tensor, float]":  # noqa: ANN401
    """Return the weight with zeros and the others moved to make up for them, and its error.

    Args:
        weight: [outputs, inputs].
        gram: [inputs, inputs], sum over tokens of x x^T; indexed with `...`.

    Returns:
        The weight, and |(W - W') X|^2 / |W X|^2.

    Source: SparseGPT, arXiv 2301.00774, algorithm 1.
    """
    import torch

    hessian = gram[...].to(weight.dtype, copy=True)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    left = weight.masked_fill(dead, 0.0)
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    hessian = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(hessian, upper=True)
    block = BLOCK - BLOCK % (pattern.of or 1)  # no group of neighbours lies across two
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        errors = _block(left[:, start:stop], upper[start:stop, start:stop], pattern)
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    del hessian, upper
    products = gram[...].to(weight.dtype)
    whole = lost = 0.0
    step = max(CHUNK // weight.shape[1], 1)
    for start in range(0, weight.shape[0], step):
        old = weight[start : start + step]
        change = old - left[start : start + step]
        whole += float(((old @ products) * old).double().sum())
        lost += float(((change @ products) * change).double().sum())
    return left, lost / whole if whole > 0 else 0.0


def _block(w: "Tensor", upper: "Tensor", pattern: Pattern) -> "Tensor":
    """Sparsify a block of columns in place; return each column's error over its pivot."""
    import torch

    pivots = upper.diagonal()
    errors = torch.zeros_like(w)
    mask = torch.zeros(w.shape, dtype=torch.bool)
    if not pattern.of:  # as the authors do: the least of the whole block, all outputs together
        scores = (w.square() / pivots.square()).reshape(1, -1)
        mask = smallest(scores, pattern).view(w.shape)
    for i in range(w.shape[1]):
        if pattern.of and i % pattern.of == 0:
            near = slice(i, i + pattern.of)
            mask[:, near] = smallest(w[:, near].square() / pivots[near].square(), pattern)
        kept = w[:, i].masked_fill(mask[:, i], 0.0)
        errors[:, i] = (w[:, i] - kept) / pivots[i]
        w[:, i:] -= errors[:, i, None] * upper[i, i:]
        w[:, i] = kept
    return errors
