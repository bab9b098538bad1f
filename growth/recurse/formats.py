"""The forms in which a recursive model is saved: its steps, names and config."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from growth.recurse.block import How, Module, Wanted, block_step
from growth.recurse.config import MODELLING_FILE, modelling_file, recursive_config
from growth.recurse.survey import WEIGHT, Looped
from surgery.checkpoint import TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.layers.config import remap_config
from surgery.lora.written import key, make_config
from surgery.plan import Step, TensorSpec

Format = Literal["tied", "peft", "dense"]
Part = Literal["base", "adapter"]
FORMATS: tuple[Format, ...] = ("tied", "peft", "dense")
PARTS: tuple[Part, ...] = ("base", "adapter")
Ranks = Mapping[str, Sequence[int]]  # by linear layer, one for each depth
ARCHITECTURES = "base_architectures"  # the key in a tied config for what it was
# Where all that a depth has for itself are two norms, whose gains fold into what reads them.
FOLDABLE = ("llama", "mistral")
FIRST_NORM, SECOND_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
FOLDED = {
    **{f"self_attn.{name}_proj.weight": FIRST_NORM for name in "qkv"},
    **{f"mlp.{name}_proj.weight": SECOND_NORM for name in ("gate", "up")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a plan holds of a form."""

    steps: tuple[Step, ...]
    order: tuple[str, ...]
    config: dict[str, Any]
    written: Mapping[str, bytes]
    adapter: bool = False


def tied_form(looped: Looped, ranks: Ranks, how: How) -> Form:
    """Each block once, at the first depth that runs it; what depths have of their own at each."""
    steps = [*_outside(looped), *_own(looped), *_tied_gains(looped)]
    names: dict[str, tuple[str, ...]] = {}
    for block, rest in looped.modules():
        module = module_of(looped, block, rest, whole=rest.removesuffix(WEIGHT) in ranks)
        own = _ranks(module, ranks)
        factors = {slot: _factor_names(looped, d, rest) for slot, d in enumerate(module.depths)}
        wanted = Wanted(
            ranks=own,
            tied=looped.name(module.depths[0], rest),
            factors={slot: pair for slot, pair in factors.items() if own[slot]},
        )
        names |= {pair[0]: pair for pair in wanted.factors.values()}
        steps.append(block_step(module, wanted, how))
    config = recursive_config(
        looped.config,
        layer_map=looped.loops.layer_map,
        per_depth=looped.per_depth,
        lora_ranks=ranks,
    )
    stock = looped.config.get("architectures")
    return Form(
        steps=tuple(steps),
        order=tuple(_in_order(looped, steps)),
        config=config | ({ARCHITECTURES: stock} if stock else {}),
        written={MODELLING_FILE: modelling_file()},
    )


def dense_form(looped: Looped, ranks: Ranks, how: How) -> Form:
    """All depths as layers of their own, the factors added: the stock model."""
    steps = [*_outside(looped), *_own(looped), *_tied_gains(looped, every=True)]
    for block, rest in looped.modules():
        module = module_of(looped, block, rest, whole=rest.removesuffix(WEIGHT) in ranks)
        dense = {slot: looped.name(depth, rest) for slot, depth in enumerate(module.depths)}
        steps.append(block_step(module, Wanted(ranks=_ranks(module, ranks), dense=dense), how))
    order = tuple(_in_order(looped, steps))
    return Form(steps=tuple(steps), order=order, config=looped.config, written={})


def base_form(looped: Looped, how: How) -> Form:
    """The K blocks as a stock model of K layers, which an adapter repeats; gains folded in."""
    number = {looped.loops.depths(b)[0]: b for b in range(looped.loops.blocks)}
    steps = [*_outside(looped)]
    steps += _ones(looped) if not looped.tie_norms else _tied_gains(looped)
    for block, rest in looped.modules():
        module = module_of(looped, block, rest, whole=False, fold=not looped.tie_norms)
        tied = looped.name(module.depths[0], rest)
        wanted = Wanted(ranks=(0,) * len(module.depths), tied=tied)
        steps.append(block_step(module, wanted, how))
    order = _in_order(looped, steps)

    def renamed(name: str) -> str:
        inside = looped.parts.locate(name)
        return looped.name(number[inside[0]], inside[1]) if inside else name

    return Form(
        steps=tuple(_renamed(step, renamed) for step in steps),
        order=tuple(renamed(name) for name in order),
        config=remap_config(looped.config, looped.parts, tuple(number)),
        written={},
    )


def adapter_form(looped: Looped, ranks: Ranks, how: How) -> Form:
    """The factors as an adapter of peft that repeats the layers of `base_form`."""
    steps, by_module = [], {}
    for block, rest in looped.modules():
        name = rest.removesuffix(WEIGHT)
        if name not in ranks:
            continue
        module = module_of(looped, block, rest, whole=True, fold=not looped.tie_norms)
        own = _ranks(module, ranks)
        factors = {}
        for slot, depth in enumerate(module.depths):
            if own[slot]:
                full = looped.name(depth, name)
                factors[slot] = (key(full, "A"), key(full, "B"))
                by_module[full] = own[slot]
        if factors:
            steps.append(block_step(module, Wanted(ranks=own, factors=factors), how))
    config = make_config(by_module, base=None, task="CAUSAL_LM")
    config["layer_replication"] = replication(looped.loops.layer_map)
    order = tuple(name for step in steps for name, _ in step.outputs)
    return Form(steps=tuple(steps), order=order, config=config, written={}, adapter=True)


def check_foldable(looped: Looped) -> None:
    """Refuse a model that peft's layer_replication would not run exactly.

    Raises:
        PlanError: with the reason.
    """
    family = str(looped.config.get("model_type"))
    place, remedy = "--format peft", "take --format tied"
    if family not in FOLDABLE:
        known = " and ".join(FOLDABLE)
        fact = (
            f"is exact for {known} alone: what {family} has per depth does not fold into its"
            " linear layers, or peft miscounts its layers"
        )
        raise PlanError(place, fact, remedy)
    rest = sorted({*looped.gains} - {FIRST_NORM, SECOND_NORM})
    if rest and not looped.tie_norms:
        fact = f"cannot hold {rest[0]} per depth, which layers that peft repeats share"
        raise PlanError(place, fact, remedy)


def replication(layer_map: Sequence[int]) -> list[list[int]]:
    """Return peft's layer_replication, runs [first, behind the last], of a layer map."""
    runs: list[list[int]] = []
    for block in layer_map:
        if runs and block == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([block, block + 1])
    return runs


def check_format(form: str, part: str | None, *, parts: Sequence[Format]) -> None:
    """Refuse forms that are none.

    Args:
        parts: the forms of which one part has to be asked for.

    Raises:
        RecipeError: what is asked for is no form.
    """
    if form not in FORMATS:
        raise RecipeError(f"--format {form}", f"is none of {', '.join(FORMATS)}")
    if (part in PARTS) != (form in parts):
        raise RecipeError(f"--format {form}", f"has no part {part}", f"{PARTS} are peft's")


def module_of(looped: Looped, block: int, rest: str, *, whole: bool, fold: bool = False) -> Module:
    """Return a linear layer of a block.

    Args:
        whole: with the weights of all depths, for their residuals.
        fold: with the gains of the norms that it reads from.
    """
    depths = looped.loops.depths(block)
    sources = looped.loops.sources[block]
    layers = tuple(dict.fromkeys((*(depths if whole else ()), *sources)))
    norm = FOLDED.get(rest) if fold else None
    return Module(
        name=rest.removesuffix(WEIGHT),
        depths=depths,
        inputs=tuple(looped.tensor(layer, rest) for layer in layers),
        starts=tuple(layers.index(source) for source in sources),
        gains=tuple(looped.tensor(layer, norm) for layer in layers) if norm else (),
    )


def _ranks(module: Module, ranks: Ranks) -> tuple[int, ...]:
    own = ranks.get(module.name)
    return tuple(own[depth] if own else 0 for depth in module.depths)


def _factor_names(looped: Looped, depth: int, rest: str) -> tuple[str, str]:
    stem = looped.name(depth, rest.removesuffix(WEIGHT))
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _copy(tensor: TensorInfo, *names: str) -> Step:
    spec = TensorSpec(tensor.dtype, tensor.shape)
    return Step(inputs=(tensor,), outputs=tuple((name, spec) for name in names))


def _outside(looped: Looped) -> Iterator[Step]:
    before, behind = looped.outside()
    yield from (_copy(looped.base.tensors[name], name) for name in (*before, *behind))


def _own(looped: Looped) -> Iterator[Step]:
    """Copy what every depth holds for itself."""
    for depth in range(len(looped.loops.layer_map)):
        for rest in looped.per_depth:
            yield _copy(looped.tensor(depth, rest), looped.name(depth, rest))


def _tied_gains(looped: Looped, *, every: bool = False) -> Iterator[Step]:
    """Tie vectors like matrices: the mean of what the block starts from."""
    if not looped.tie_norms:
        return
    for block, sources in enumerate(looped.loops.sources):
        depths = looped.loops.depths(block)
        for rest in looped.gains:
            inputs = tuple(looped.tensor(layer, rest) for layer in sources)
            names = [looped.name(d, rest) for d in (depths if every else depths[:1])]
            if len(inputs) == 1:
                yield _copy(inputs[0], *names)
                continue
            spec = TensorSpec(inputs[0].dtype, inputs[0].shape)
            yield Step(
                inputs=inputs,
                outputs=tuple((name, spec) for name in names),
                fn=_Mean(len(names)),
                elementwise=True,
                plain=True,
                why="tie",
            )


@dataclass(frozen=True, slots=True)
class _Mean:
    """The mean, once for every output."""

    outputs: int

    def __call__(self, *inputs: Any) -> Any:  # noqa: ANN401 - tensors; torch is not imported
        total = inputs[0]
        for more in inputs[1:]:
            total = total + more
        mean = total / len(inputs)
        return mean if self.outputs == 1 else (mean,) * self.outputs


def _ones(looped: Looped) -> Iterator[Step]:
    """Write gains of one where the model's own are folded into the weights."""
    for block in range(looped.loops.blocks):
        depth = looped.loops.depths(block)[0]
        for rest in looped.gains:
            tensor = looped.tensor(depth, rest)
            yield Step(
                inputs=(tensor,),
                outputs=((looped.name(depth, rest), TensorSpec(tensor.dtype, tensor.shape)),),
                fn=_one,
                elementwise=True,
                plain=True,
                why="fold",
            )


def _one(gain: Any) -> Any:  # noqa: ANN401 - a tensor; torch is not imported
    return gain * 0 + 1


def _renamed(step: Step, renamed: Any) -> Step:  # noqa: ANN401 - a function of names
    from dataclasses import replace

    return replace(step, outputs=tuple((renamed(name), spec) for name, spec in step.outputs))


def _in_order(looped: Looped, steps: Sequence[Step]) -> Iterator[str]:
    """Yield the names of the outputs as a model has them: by depth, factors behind weights."""
    given = {name for step in steps for name, _ in step.outputs}
    before, behind = looped.outside()
    yield from before
    for depth in range(len(looped.loops.layer_map)):
        for rest in looped.parts.stack.layers[0]:
            names = (looped.name(depth, rest), *_factor_names(looped, depth, rest))
            yield from (name for name in names if name in given)
    yield from behind
