"""A linearized model before anything of it is trained, planned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError, RecipeError
from surgery.linearize.attention import MIXER, PROJECTIONS, Attention, check_model, find_attention
from surgery.linearize.config import (
    check_config,
    is_linearized,
    linearized_config,
    modelling_files,
    stock_config,
)
from surgery.linearize.initial import start_step
from surgery.linearize.keep import Keep, kept_layers
from surgery.linearize.methods import Method, check_options, full_spec, method_of
from surgery.linearize.parameters import Spec
from surgery.linearize.telling import facts, notes
from surgery.plan import Plan, Step, TensorSpec, check_plan

Sliding = Literal["keep", "convert"]
SLIDING = ("keep", "convert")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is converted.

    Attributes:
        spec: the section `mixer` of the config.
        linear: numbers of the layers with a mixer in the result.
        sliding: numbers of the others that are so because they have a window of their own.
        back: numbers of the layers whose mixer is taken out again.
    """

    base: Checkpoint
    attention: Attention
    method: Method
    spec: Spec
    linear: tuple[int, ...]
    sliding: tuple[int, ...] = ()
    back: tuple[int, ...] = ()

    @property
    def starts(self) -> bool:
        """Whether the new parameters begin here; else they are there already."""
        return not is_linearized(self.base)


def linearize(
    base: Checkpoint,
    original: Checkpoint | None = None,
    *,
    method: str,
    keep_softmax: Keep = None,
    window: int | None = None,
    sinks: int | None = None,
    feature_dim: int | None = None,
    feature_map: str | None = None,
    sliding: Sliding = "keep",
    seed: int = 0,
) -> Plan:
    """Plan a model in some of whose layers a mixer stands for softmax attention, untrained.

    Every tensor of the base is carried as it is; parameters of mixers are added at their initial
    values. Of a model that is linearized already, layers get softmax attention back: their mixers
    are dropped, all others stay as they were trained.

    Args:
        original: with a linearized base, the model that it was made from. Layers that get softmax
            attention back take their projections from it; without it they keep those of the base.
        method: name of a row of `METHODS`.
        keep_softmax: layers that keep softmax attention; see `kept_layers`.
        window: tokens that a query sees exactly, itself included.
        sinks: first tokens of a document that stay in sight.
        feature_dim: width of the feature maps, of one half where a map has two.
        feature_map: what is applied to mapped queries and keys.
        sliding: layers that see a window alone in the base: `keep` leaves them as they are where
            others see everything; where all of them slide they are converted, as `convert` does in
            any case, and no mixer's window is wider than theirs.
        seed: of what is drawn.

    Raises:
        RecipeError: an option makes no sense, or does not apply to the method.
        PlanError: the model cannot be linearized, with the layer and the reason.
        CheckpointError: config and tensors disagree.
    """
    rule = method_of(method)
    asked = {"window": window, "sinks": sinks, "feature_dim": feature_dim}
    options: dict[str, Any] = {**asked, "feature_map": feature_map}
    check_options(rule, options)
    if sliding not in SLIDING:
        raise RecipeError(f"--sliding {sliding}", f"is none of {', '.join(SLIDING)}")
    again = is_linearized(base)
    found = (
        _again(base, rule, keep_softmax, options)
        if again
        else _first(base, rule, keep_softmax, options, sliding)
    )
    _check_original(found, original)
    steps = (*_carried(found, original), *_begun(found, seed))
    kept = keep_softmax if isinstance(keep_softmax, str | None) else list(keep_softmax)
    parameters = {"method": method, "keep_softmax": kept, **options}
    return _plan(found, original, steps, {**parameters, "sliding": sliding, "seed": seed})


def _first(
    base: Checkpoint, rule: Method, keep: Keep, options: Mapping[str, Any], sliding: Sliding
) -> Conversion:
    check_model(base)
    attention = find_attention(base, base.config or {}, rope=rule.rope)
    layers = range(attention.parts.layers)
    kept = kept_layers(keep, len(layers))
    mixed = any(attention.slides) and not all(attention.slides)
    slid = {n for n in layers if attention.slides[n] and mixed and sliding == "keep"}
    linear = tuple(n for n in layers if n not in {*kept, *slid})
    if not linear:
        fact = "leaves no layer to convert, as those that slide keep their own window"
        raise RecipeError("--keep-softmax", fact, "keep fewer, or give --sliding convert")
    spec = full_spec(rule, options, attention.sizes)
    if attention.window and any(attention.slides[n] for n in linear):
        spec["window"] = min(spec["window"], attention.window)
        _check_sinks(spec)
    left = tuple(sorted(slid - {*kept}))
    return Conversion(
        base=base, attention=attention, method=rule, spec=spec, linear=linear, sliding=left
    )


def _check_sinks(spec: Spec) -> None:
    if spec["window"] and spec["sinks"] >= spec["window"]:
        fact = f"leaves no room for near tokens: the base's own window is {spec['window']}"
        raise RecipeError(f"--sinks {spec['sinks']}", fact, "lower it")


def _again(base: Checkpoint, rule: Method, keep: Keep, options: Mapping[str, Any]) -> Conversion:
    config = check_config(base)
    own, spec = config["mixer"].get("method"), config["mixer"]
    if own != rule.name:
        fact = f"is not the method of {base.ref}, which is {own}"
        raise RecipeError(f"--method {rule.name}", fact, "name it, or the model with softmax")
    changed = next((n for n, v in options.items() if v not in (None, spec.get(n))), None)
    if changed is not None:
        fact = f"cannot be changed: {base.ref} was made with {spec.get(changed)}"
        raise RecipeError(f"--{changed.replace('_', '-')}", fact, "linearize its base again")
    attention = find_attention(base, stock_config(config), rope=rule.rope)
    kept = kept_layers(keep, attention.parts.layers)
    linear = tuple(n for n in config["linear_layers"] if n not in kept)
    back = tuple(n for n in config["linear_layers"] if n in kept)
    if not back or not linear:
        fact = "takes out no mixer" if not back else "takes out every mixer"
        remedy = f"linear are {', '.join(map(str, config['linear_layers']))}"
        raise RecipeError("--keep-softmax", f"{fact} of {base.ref}, which is linearized", remedy)
    return Conversion(
        base=base, attention=attention, method=rule, spec=spec, linear=linear, back=back
    )


def _check_original(found: Conversion, original: Checkpoint | None) -> None:
    if found.starts and original is not None:
        fact = "is a second model, which is for taking out mixers of a linearized one"
        raise RecipeError(original.ref, fact, "leave it out")
    if original is None:
        if found.back and found.method.projections:
            fact = f"gets softmax attention back, and {found.method.name} trained its projections"
            remedy = "name the model that it was made from, too"
            raise RecipeError(f"layer {found.back[0]}", fact, remedy)
        return
    for name in _restored(found):
        own, wanted = original.tensors.get(name), found.base.tensors[name]
        if own is None or (own.shape, own.dtype) != (wanted.shape, wanted.dtype):
            fact = f"has no {name} of {wanted.dtype} {list(wanted.shape)}"
            raise PlanError(original.ref, fact, f"name the model that {found.base.ref} was made of")


def _restored(found: Conversion) -> list[str]:
    """Return the names of what layers take from the original when they get softmax back."""
    places = tuple(found.attention.name(n, p) for n in found.back for p in PROJECTIONS)
    return [name for name in found.base.tensors if name.startswith(places)]


def _dropped(found: Conversion) -> dict[str, str]:
    places = tuple(found.attention.parts.stack.name(n, MIXER) for n in found.back)
    names = [n for n in found.base.tensors if places and n.startswith(places)]
    return dict.fromkeys(names, "of a layer that gets softmax attention back")


def _carried(found: Conversion, original: Checkpoint | None) -> Iterator[Step]:
    dropped = _dropped(found)
    restored = {n: original.tensors[n] for n in _restored(found)} if original else {}
    for name, tensor in found.base.tensors.items():
        if name not in dropped:
            yield _copy(restored.get(name, tensor))


def _copy(tensor: TensorInfo) -> Step:
    return Step(inputs=(tensor,), outputs=((tensor.name, TensorSpec(tensor.dtype, tensor.shape)),))


def _begun(found: Conversion, seed: int) -> Iterator[Step]:
    if not found.starts:
        return
    attention = found.attention
    made = found.method.new(found.spec, attention.sizes)
    for layer in found.linear:
        for rest, new in made.items():
            name = attention.parts.stack.name(layer, f"{MIXER}{rest}")
            yield start_step(name, new.shape, new.start, dtype=attention.dtype, seed=seed)


def _plan(
    found: Conversion,
    original: Checkpoint | None,
    steps: Sequence[Step],
    parameters: Mapping[str, Any],
) -> Plan:
    base, attention = found.base, found.attention
    told = facts(found.method, found.spec, attention, found.linear)
    said = notes(found.method, found.spec, attention, told, sliding=found.sliding)
    config = linearized_config(attention.config, linear_layers=found.linear, mixer=found.spec)
    return check_plan(
        Plan(
            operation="linearize",
            parameters=parameters,
            sources=(base,) if original is None else (base, original),
            steps=tuple(steps),
            order=tuple(name for step in steps for name, _ in step.outputs),
            config=config,
            carried=base.carried,
            written=modelling_files(),
            dropped=_unused(found, original),
            facts=told,
            notes=(*base.notes, *said),
        )
    )


def _unused(found: Conversion, original: Checkpoint | None) -> dict[str, str]:
    if original is None:
        return _dropped(found)
    others = dict.fromkeys(original.tensors, "of the model it was made from, and not asked for")
    restored = dict.fromkeys(_restored(found), "replaced by that of the model it was made from")
    return {**others, **restored, **_dropped(found)}
