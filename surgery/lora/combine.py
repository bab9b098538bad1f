"""Several adapters made one, by sums and rules on the changes that they stand for."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from surgery.checkpoint.adapter_source import AdapterSource
from surgery.checkpoint.adapters import Factors
from surgery.errors import RecipeError
from surgery.lora.decompose import BLOCK, Decomposition, decompose, scratch
from surgery.lora.decompose import Method as Svd
from surgery.lora.elementwise import Change, Elementwise, merged_blocks
from surgery.lora.written import DTYPES, key, make_config
from surgery.plan import Plan, Step, Tell, TensorSpec, check_plan

Method = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
TEMPORARIES = 16 * 8 * BLOCK  # bytes of blocks that a rule works on
BY_ELEMENT = ("ties", "dare_linear", "dare_ties", "magnitude_prune")


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How adapters are merged; see `merge`."""

    method: Method
    rank: int | None
    density: float | None
    svd: Svd
    dtype: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """What the adapters do to one module: their factors, each with its weight."""

    name: str
    parts: tuple[tuple[float, Factors], ...]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        first = self.parts[0][1]
        return first.b.shape[0], first.a.shape[1]

    @property
    def embedding(self) -> bool:
        """Whether the module is an embedding."""
        return self.parts[0][1].embedding

    def rank(self, how: How) -> int:
        """Return the rank of the merged change."""
        ranks = [factors.rank for _, factors in self.parts]
        if how.method == "cat":
            return sum(ranks)
        most = min(self.shape) if how.method in BY_ELEMENT else min(sum(ranks), *self.shape)
        return min(how.rank or max(ranks), most)


def merge(
    *adapters: AdapterSource,
    weights: Sequence[float] | None = None,
    method: Method = "cat",
    rank: int | None = None,
    density: float | None = None,
    svd: Svd = "randomized",
    dtype: str = "float32",
    seed: int = 0,
) -> Plan:
    """Plan one adapter whose change is made of the adapters' changes W_i = scale_i * B_i @ A_i.

    `cat` is their weighted sum exactly, at the sum of the ranks. `svd` and `linear` are the
    nearest to that sum of a lower rank, by QR of the stacked factors: nothing of the weights' size
    is formed. `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` are computed on the elements
    of the changes, block by block, and decomposed again. alpha is the rank, so that every scale
    is 1, whatever the sources had (rank-stabilised ones are divided by the square root of theirs).

    Args:
        weights: one per adapter; 1 for each by default.
        rank: of `svd` and what follows; the largest of a module's by default.
        density: share of elements that the last four keep.
        svd: how the last four are decomposed.
        dtype: of the factors: float32, bfloat16 or float16.
        seed: of masks and sketches.

    Raises:
        RecipeError: the adapters or the parameters do not fit together.

    Source: peft's `add_weighted_adapter` for the names; deviations in docs/decisions.
    """
    how = How(method=method, rank=rank, density=density, svd=svd, dtype=dtype, seed=seed)
    shares = list(weights) if weights is not None else [1.0] * len(adapters)
    _check(adapters, shares, how)
    modules = _modules(adapters, shares)
    ranks = {module.name: module.rank(how) for module in modules}
    steps = [_step(module, ranks[module.name], how) for module in modules]
    bases = list(dict.fromkeys(str(_config(a).get("base_model_name_or_path")) for a in adapters))
    note = f"the adapters name different bases ({', '.join(bases)}); the first is taken"
    plan = Plan(
        operation="lora merge",
        parameters={
            "weights": shares,
            **{name: getattr(how, name) for name in how.__slots__},
        },
        sources=adapters,
        steps=tuple(steps),
        order=tuple(name for step in steps for name, _ in step.outputs),
        config=make_config(
            ranks,
            base=_config(adapters[0]).get("base_model_name_or_path"),
            task=_config(adapters[0]).get("task_type"),
            fan_in_fan_out=any(_config(a).get("fan_in_fan_out") for a in adapters),
            tied=any(_config(a).get("ensure_weight_tying") for a in adapters),
        ),
        dropped={name: "the base's own weight" for a in adapters for name in _own(a).values()},
        notes=(note,) if len(bases) > 1 else (),
        adapter=True,
    )
    return check_plan(plan)


def _config(source: AdapterSource) -> Mapping[str, Any]:
    return source.adapter.config


def _check(adapters: Sequence[AdapterSource], weights: Sequence[float], how: How) -> None:
    if not adapters:
        raise RecipeError("lora merge", "needs adapters", "name two or more")
    if len(weights) != len(adapters):
        fact = f"gives {len(weights)} weights for {len(adapters)} adapters"
        raise RecipeError("--weight", fact, "give one for each")
    if not all(math.isfinite(weight) for weight in weights):
        raise RecipeError("--weight", "holds what is no number")
    if how.dtype not in DTYPES:
        raise RecipeError(f"--dtype {how.dtype}", f"is none of {', '.join(DTYPES)}")
    if how.rank is not None and (how.rank < 1 or how.method == "cat"):
        fact = "is below 1" if how.rank < 1 else "says nothing to cat, which keeps all ranks"
        raise RecipeError(f"--rank {how.rank}", fact, "give a rank with --method svd")
    if how.method in BY_ELEMENT and (how.density is None or not 0 < how.density <= 1):
        told = "needs --density" if how.density is None else f"density {how.density} is not"
        raise RecipeError(how.method, f"{told} in (0, 1]", "for instance --density 0.5")
    if how.method not in BY_ELEMENT and how.density is not None:
        raise RecipeError("--density", f"says nothing to {how.method}", "leave it out")
    for source in adapters:
        _check_plain(source)


def _check_plain(source: AdapterSource) -> None:
    """Refuse what is no low-rank change of a matrix, and so cannot be added up here."""
    adapter = source.adapter
    own = _own(source)
    reasons = {
        "holds whole parameters": next((name for name in adapter.whole if name not in own), None),
        "holds new tokens of": next(iter(adapter.tokens), None),
        "has DoRA magnitudes of": next((f.module for f in adapter.factors if f.magnitude), None),
        "has a bias of B of": next((f.module for f in adapter.factors if f.bias), None),
        "adapts fused parameters of": next(
            (f.module for f in adapter.factors if f.level or f.a.shape[0] != f.rank), None
        ),
    }
    for reason, name in reasons.items():
        if name is not None:
            fact = f"{reason} {name}, which are not merged as factors"
            raise RecipeError(source.ref, fact, "fuse each into the base and merge the models")


def _own(source: AdapterSource) -> dict[str, str]:
    """Return weights of adapted modules, which peft saves as the base has them, and their names."""
    adapted = {f"{factors.module}.weight" for factors in source.adapter.factors}
    return {n: t.name for n, t in source.adapter.whole.items() if n in adapted}


def _modules(adapters: Sequence[AdapterSource], weights: Sequence[float]) -> list[Module]:
    found: dict[str, list[tuple[float, Factors]]] = {}
    for source, weight in zip(adapters, weights, strict=True):
        for factors in source.adapter.factors:
            found.setdefault(factors.module, []).append((weight, factors))
    modules = [Module(name=name, parts=tuple(parts)) for name, parts in found.items()]
    for module in modules:
        for _, factors in module.parts:
            shape = (factors.b.shape[0], factors.a.shape[1])
            if shape != module.shape or factors.embedding != module.embedding:
                fact = f"changes {module.name} of shape {list(shape)}, not {list(module.shape)}"
                raise RecipeError(factors.a.file, fact, "merge adapters of one base")
    return modules


def _step(module: Module, rank: int, how: How) -> Step:
    rows, columns = module.shape
    by_element = how.method in BY_ELEMENT
    stacked = sum(factors.rank for _, factors in module.parts)
    held = 8 * 4 * stacked * (rows + columns)
    if by_element:
        held += scratch(module.shape, rank, how.svd) + 4 * rows * columns + TEMPORARIES
    dtype = DTYPES[how.dtype]
    return Step(
        outputs=(
            (_key(module, "A"), TensorSpec(dtype, (rank, columns))),
            (_key(module, "B"), TensorSpec(dtype, (rows, rank))),
        ),
        inputs=tuple(t for _, f in module.parts for t in (f.a, f.b)),
        fn=_function(module, rank, how),
        streamed=True,
        scratch=held,
        why=how.method,
        key=repr(([(weight, f.scale) for weight, f in module.parts], how)),
        tells=() if how.method == "cat" else ("energy",),
    )


def _key(module: Module, part: str) -> str:
    return key(module.name, part, embedding=module.embedding)


def _function(module: Module, rank: int, how: How) -> Callable[..., Iterator[Any]]:
    def fn(*tensors: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        changes = [
            Change(a[...].double(), b[...].double() * factors.scale, weight)
            for (weight, factors), a, b in zip(
                module.parts, tensors[::2], tensors[1::2], strict=True
            )
        ]
        if how.method == "cat":
            yield from _stacked(changes)
            return
        made = _by_element(module, changes, rank, how)
        made = made or _nearest(*_stacked(changes), rank)
        yield from made.factors()
        yield Tell(energy=made.share)

    return fn


def _stacked(changes: Sequence[Change]) -> tuple[Any, Any]:
    """Return a [ranks, in] and b [out, ranks], the weights in b."""
    import torch

    a = torch.cat([change.a for change in changes])
    return a, torch.cat([change.b * change.weight for change in changes], dim=1)


def _nearest(a: Any, b: Any, rank: int) -> Decomposition:  # noqa: ANN401 - tensors
    """Decompose b @ a by the core between orthonormal bases of both factors."""
    import torch

    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, s, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    whole = float(s.square().sum())
    return Decomposition(left @ u[:, :rank], s[:rank], v[:rank] @ right.T, whole)


def _by_element(
    module: Module, changes: Sequence[Change], rank: int, how: How
) -> Decomposition | None:
    if how.method not in BY_ELEMENT:
        return None
    seed = f"{how.seed}\0{module.name}"
    blocks = merged_blocks(
        changes,
        module.shape,
        method=cast("Elementwise", how.method),
        density=how.density or 1.0,
        seed=seed,
    )
    return decompose(blocks, module.shape, rank=rank, method=how.svd, seed=seed)
