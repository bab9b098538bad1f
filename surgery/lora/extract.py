"""An adapter from the difference of two models: B @ A is the nearest of its rank to it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from surgery.anatomy import anatomy
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.adapters import PREFIX
from surgery.checkpoint.tying import HEAD
from surgery.comparing import compare
from surgery.difference import TensorDifference
from surgery.engine import Progress
from surgery.errors import CheckpointError, RecipeError
from surgery.lora.choice import Choice
from surgery.lora.decompose import Method, decompose, scratch
from surgery.lora.modules import Parameter, parameters
from surgery.lora.spectra import energy_ranks
from surgery.lora.targets import Target, find_targets, held_whole
from surgery.lora.written import DTYPES, key, make_config, task_of
from surgery.plan import Plan, Step, Tell, TensorSpec, check_plan
from surgery.preflight import MEMORY

CAP = 256  # rank at most, where the energy decides
FEW = 3  # names in a note


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: Method = "randomized",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    modules_to_save: Iterable[str] = (),
    dtype: str = "float32",
    seed: int = 0,
    workers: int | None = None,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> Plan:
    """Plan an adapter that makes `tuned` of `base`; both are read, to see what differs.

    Every linear layer that differs gets the leading singular triplets of its difference, the
    singular values shared between both factors, alpha = rank. Fused experts, routers, embeddings
    and norms get none: what of the difference they hold is told.

    Args:
        rank: of every module, or the most that `energy` may take.
        energy: take the smallest rank that keeps this share of a module's squared difference.
        method: `exact` decomposes whole matrices.
        include, exclude: parts of module names, `glob:PATTERN` or `regex:PATTERN`.
        modules_to_save: likewise; modules that differ otherwise, to be held whole.
        dtype: of the factors: float32, bfloat16 or float16.
        seed: of the randomised sketches.

    Raises:
        RecipeError: the two models do not fit, or nothing differs that could be extracted.

    Source: Eckart and Young for the optimum, arXiv 2106.09685 for the form. Deviation: the rank
    may differ by module, since no module has more than its smaller side.
    """
    asks = {"include": [*include], "exclude": [*exclude], "modules_to_save": [*modules_to_save]}
    _check(rank, energy, dtype)
    _check_shapes(base, tuned)
    found, notes = parameters(base)
    limits: dict[str, Any] = {"workers": workers, "memory": memory, "progress": progress}
    differences = {t.name: t for t in compare(base, tuned, **limits).tensors}
    changed = {n: t for n, t in differences.items() if t.state != "identical"}
    targets = find_targets(base, tuned, found, changed, Choice(asks["include"], asks["exclude"]))
    whole = held_whole(found, changed, {t.base.name for t in targets}, asks["modules_to_save"])
    if not targets:
        fact = f"differs from {base.ref} in no linear layer that is asked for"
        raise RecipeError(tuned.ref, fact)
    ranks = {t.module: min(rank or CAP, *t.shape) for t in targets}
    if energy is not None:
        how: dict[str, Any] = {"method": method, "seed": seed, "limits": limits}
        ranks, more = energy_ranks(targets, ranks, energy=energy, sources=(base, tuned), **how)
        notes = (*notes, *more)
    covered = {t.base.name for t in targets} | whole.keys()
    notes = (*notes, *_left(changed, covered))
    steps = [_factor(t, ranks[t.module], method, seed, DTYPES[dtype]) for t in targets]
    steps += _copies(base, tuned, ranks.keys(), whole)
    told = {"rank": rank, "energy": energy, "method": method, "dtype": dtype, "seed": seed}
    plan = Plan(
        operation="lora extract",
        parameters=told | asks,
        sources=(base, tuned),
        steps=tuple(steps),
        order=tuple(name for step in steps for name, _ in step.outputs),
        config=_config(base, targets, ranks, whole),
        dropped=_dropped(base, tuned, targets, whole),
        facts={
            "changes": {key(t.module, "A"): t.change for t in targets},
            "not_represented": _share_left(changed, covered),
        },
        notes=notes,
        adapter=True,
    )
    return check_plan(plan)


def energy_in_all(plan: Plan, told: Mapping[str, Mapping[str, float]]) -> float:
    """Return the share of the extracted modules' difference that the adapter keeps."""
    changes: dict[str, float] = plan.facts["changes"]
    kept = sum(told[name]["energy"] * change for name, change in changes.items())
    return kept / sum(changes.values())


def _check(rank: int | None, energy: float | None, dtype: str) -> None:
    if rank is None and energy is None:
        raise RecipeError("lora extract", "needs --rank or --energy", "for instance --rank 32")
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank}", "is below 1", "for instance --rank 32")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy {energy}", "is outside (0, 1]", "for instance --energy 0.9")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}", f"is none of {', '.join(DTYPES)}")


def _check_shapes(base: Checkpoint, tuned: Checkpoint) -> None:
    for here, there in ((base, tuned), (tuned, base)):
        lost = next((name for name in here.tensors if name not in there.tensors), None)
        if lost is not None:
            fact = f"has no tensor {lost!r}, which {here.ref} has"
            raise RecipeError(there.ref, fact, "both must be of one architecture")
    for name, tensor in base.tensors.items():
        other = tuned.tensors[name].shape
        if tensor.shape != other:
            fact = f"has {name} of shape {list(other)}, {base.ref} {list(tensor.shape)}"
            raise RecipeError(tuned.ref, fact, "an adapter changes no shape")


def _factor(target: Target, rank: int, method: Method, seed: int, dtype: str) -> Step:
    n, m = target.shape

    def fn(base: Any, tuned: Any) -> Iterator[Any]:  # noqa: ANN401 - `Stored` tensors
        blocks = target.blocks(base, tuned)
        made = decompose(
            blocks, (n, m), rank=rank, method=method, seed=f"{seed}\0{target.base.name}"
        )
        a, b = made.factors()
        yield from (b.T, a.T) if target.swapped else (a, b)
        yield Tell(energy=made.share)

    inside, outside = (n, m) if target.swapped else (m, n)
    return Step(
        outputs=(
            (key(target.module, "A"), TensorSpec(dtype, (rank, inside))),
            (key(target.module, "B"), TensorSpec(dtype, (outside, rank))),
        ),
        inputs=(target.base, target.tuned),
        fn=fn,
        streamed=True,
        scratch=scratch((n, m), rank, method),
        why="extract",
        key=repr((rank, method, seed)),
        tells=("energy",),
    )


def _config(
    base: Checkpoint,
    targets: Iterable[Target],
    ranks: Mapping[str, int],
    whole: Mapping[str, Parameter],
) -> dict[str, Any]:
    return make_config(
        ranks,
        base=base.ref,
        task=task_of(base.config),
        fan_in_fan_out=any(target.swapped for target in targets),
        whole=dict.fromkeys(p.module for p in whole.values() if p.module not in ranks),
        biases=any(p.module in ranks for p in whole.values()),
        tied=_tied_embedding(base) is not None,
    )


def _copies(
    base: Checkpoint,
    tuned: Checkpoint,
    factorised: Collection[str],
    whole: Mapping[str, Parameter],
) -> Iterator[Step]:
    tied = _tied_embedding(base)
    for name, parameter in whole.items():
        twice = (f"{PREFIX}{HEAD}.weight",) * (name == tied)  # peft reads a tied head too
        yield _copy(tuned.tensors[name], _whole_key(parameter, factorised), *twice)


def _whole_key(parameter: Parameter, factorised: Collection[str]) -> str:
    """Name a parameter that is held whole; of a factorised module peft wraps the layer."""
    module, _, leaf = parameter.name.rpartition(".")
    inside = ".base_layer" if module in factorised else ""
    return f"{PREFIX}{module}{inside}.{leaf}"


def _tied_embedding(base: Checkpoint) -> str | None:
    try:
        parts = anatomy(base)
    except CheckpointError:
        return None
    return parts.embedding if parts.tied else None


def _copy(tensor: TensorInfo, *names: str) -> Step:
    outputs = tuple((name, TensorSpec(tensor.dtype, tensor.shape)) for name in names)
    return Step(inputs=(tensor,), outputs=outputs, why="save whole")


def _dropped(
    base: Checkpoint, tuned: Checkpoint, targets: Iterable[Target], whole: Iterable[str]
) -> dict[str, str]:
    kept = {target.base.name for target in targets}
    saved = set(whole)
    dropped = {n: "no change, or none that is extracted" for n in tuned.tensors if n not in kept}
    return dropped | {n: "held whole" for n in base.tensors if n in saved}


def _left(changed: dict[str, TensorDifference], covered: Iterable[str]) -> Iterator[str]:
    """Tell what differs and is not represented."""
    left = _share_left(changed, covered)
    if left["tensors"]:
        names = ", ".join(left["largest"])
        yield (
            f"{left['tensors']} tensors differ that the adapter does not hold, with "
            f"{left['share']:.2%} of the squared difference: {names}"
        )
    unmeasured = [n for n, t in changed.items() if t.sums is None and n not in set(covered)]
    if unmeasured:
        yield f"{len(unmeasured)} tensors differ that are not measured: {unmeasured[0]}"


def _share_left(changed: dict[str, TensorDifference], covered: Iterable[str]) -> dict[str, Any]:
    kept = set(covered)
    squares = {n: t.sums.dd for n, t in changed.items() if t.sums is not None and t.sums.dd > 0}
    left = {name: square for name, square in squares.items() if name not in kept}
    largest = sorted(left, key=lambda name: (-left[name], name))[:FEW]
    total = sum(squares.values())
    share = sum(left.values()) / total if total else 0.0
    return {"tensors": len(left), "share": share, "largest": largest}
