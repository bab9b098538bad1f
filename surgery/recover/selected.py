"""Which parameters train, by mode."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from surgery.anatomy import OTHER_TOWERS, PARTS
from surgery.checkpoint import Checkpoint
from surgery.errors import CheckpointError, RecipeError
from surgery.provenance import read_record
from surgery.recover.names import disk_names, layer_of, names_of
from surgery.recover.settings import Settings

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
MATRIX = 2  # axes
HANDED_ON = (
    *("masked", "sparsity", "trainable_layers", "trainable_parameters"),
    *("linear_layers", "state_bytes", "kv_bytes_per_token", "break_even"),
)
ATTENTION, FEED_FORWARD, NORMS = "attention", "feed-forward", "norms"


def handed_on(student: Checkpoint) -> dict[str, Any]:
    """Return what the student's record says that holds for the healed model too."""
    facts = (read_record(student) or {}).get("facts")
    told = facts if isinstance(facts, dict) else {}
    return {key: told[key] for key in HANDED_ON if key in told}


@dataclass(frozen=True, slots=True)
class Recorded:
    """What the operation that made a student recorded as new.

    Attributes:
        layers: numbers of layers, of all that is in them.
        patterns: of the names on disk of parameters.
    """

    layers: frozenset[int]
    patterns: tuple[str, ...]


def recorded(student: Checkpoint) -> Recorded:
    """Return what the operation that made the student recorded as new.

    Raises:
        RecipeError: it recorded nothing.
    """
    told = handed_on(student)
    layers = _listed(told.get("trainable_layers"), int)
    patterns = _listed(told.get("trainable_parameters"), str)
    if not layers and not patterns:
        makers = "expand, stack, lesa or linearize"
        fact = f"trains the parts that {makers} recorded as new, and {student.ref} has none"
        raise RecipeError("--train new", fact, "take lora, full, norms or half")
    return Recorded(frozenset(layers), tuple(patterns))


def _listed(told: object, kind: type[T]) -> list[T]:
    """Return a list of one type; nothing for anything else."""
    sound = isinstance(told, list) and all(type(entry) is kind for entry in told)
    return list(told) if isinstance(told, list) and sound else []


def select(
    model: "torch.nn.Module", student: Checkpoint, settings: Settings, *, part: bool = False
) -> frozenset[str]:
    """Return the first names of the model's own parameters that train.

    Towers for images and sound never do: no text reaches them. With LoRA these are norms, and what
    a model of ours has of its own: low-rank factors, and mixers of linear layers.

    Args:
        part: the model holds some layers of the student alone.

    Raises:
        RecipeError: `new` without recorded layers, or layers of other numbers.
    """
    own = [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not OTHER_TOWERS.search(name)
    ]
    match settings.train:
        case "full":
            chosen = set(own)
        case "new":
            chosen = _new(own, recorded(student), model, student, part=part)
        case "half":
            chosen = half(own, dict(model.named_parameters()), settings.seed)
        case "norms":
            biases = {name for name in own if name.endswith("bias")}
            chosen = biases | (norms_of(model) & set(own))
        case "lora":
            chosen = (norms_of(model) | _extras_of(model)) & set(own)
    if not chosen and settings.train != "lora":
        fact = f"trains nothing: {student.ref} has no parameters of that kind"
        raise RecipeError(f"--train {settings.train}", fact, "take lora or full")
    return frozenset(chosen)


def norms_of(model: "torch.nn.Module") -> set[str]:
    """Return the first names of gains and biases of the norms."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() < MATRIX
    }


def _extras_of(model: "torch.nn.Module") -> set[str]:
    """Return what no LoRA can stand for: factors that lie in the model, and mixers."""
    mixers = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if "Mixer" in {kind.__name__ for kind in type(module).__mro__}
        for leaf, _ in module.named_parameters()
    }
    return mixers | {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if {"Factor", "FactoredLinear"} & {kind.__name__ for kind in type(module).__mro__}
        for leaf, _ in module.named_parameters(recurse=False)
        if leaf != "bias"
    }


def _new(
    own: Sequence[str],
    found: Recorded,
    model: "torch.nn.Module",
    student: Checkpoint,
    *,
    part: bool,
) -> set[str]:
    chosen = _inside(own, found.layers, model) if found.layers else set()
    if not found.patterns:
        return chosen
    disk = disk_names(model, student)
    for pattern in found.patterns:
        fitting = {n for n in own if any(fnmatchcase(other, pattern) for other in disk[n])}
        if not fitting and not part:
            fact = f"finds {pattern} in the record, and the student has no such parameter"
            raise RecipeError("--train new", fact, "take full, or restore surgery.json")
        chosen |= fitting
    return chosen


def _inside(own: Sequence[str], layers: frozenset[int], model: "torch.nn.Module") -> set[str]:
    names = names_of(model)
    reached = {layer_of(other): True for every in names.values() for other in every}
    beyond = next((n for n in sorted(layers) if n not in reached), None)
    if beyond is not None:
        fact = f"finds layer {beyond} in the record, which the student does not have"
        raise RecipeError("--train new", fact, "take full, or restore surgery.json")
    return {name for name in own if any(layer_of(other) in layers for other in names[name])}


def half(own: Sequence[str], parameters: "Mapping[str, torch.Tensor]", seed: int) -> set[str]:
    """Return a random half: of each layer's attention, feed-forward and norms, half of each.

    Where a category has an odd number of members, half of the layers take one more of it and the
    others one less, drawn as well. A bias goes with its matrix. What is in no layer trains:
    embedding, head and last norm.

    Source: "HFT", arXiv 2404.18466, section 3 (selection at the level of categories). Deviations:
    experts count as feed-forward, and a router trains.
    """
    categories: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    chosen = set()
    for name in own:
        layer, category = layer_of(name), _category(name)
        if layer is None or category is None:
            chosen.add(name)
        elif not _is_bias(name, parameters):
            categories[category][layer].append(name)
    generator = np.random.default_rng(seed)
    for category in sorted(categories):
        chosen |= _drawn(categories[category], generator)
    with_weight = {name for name in own if name.removesuffix("bias") + "weight" in chosen}
    return chosen | {n for n in with_weight if _is_bias(n, parameters)}


def _drawn(layers: Mapping[int, list[str]], generator: "np.random.Generator") -> set[str]:
    chosen: set[str] = set()
    numbers = sorted(layers)
    order = {numbers[i]: place for place, i in enumerate(generator.permutation(len(numbers)))}
    for layer in numbers:
        members = sorted(layers[layer])
        count = (len(members) + order[layer] % 2) // 2
        chosen |= {members[i] for i in generator.permutation(len(members))[:count]}
    return chosen


def _category(name: str) -> str | None:
    part = next((part for part, found in PARTS if found.search(_rest(name))), None)
    if part in {FEED_FORWARD, "experts"}:
        return FEED_FORWARD
    return part if part in {ATTENTION, NORMS} else None


def _rest(name: str) -> str:
    """Return what follows the layer's number."""
    layer = layer_of(name)
    return name.partition(f".{layer}.")[2]


def _is_bias(name: str, parameters: "Mapping[str, torch.Tensor]") -> bool:
    return name.endswith(".bias") and name.removesuffix("bias") + "weight" in parameters


def check_student(student: Checkpoint) -> None:
    """Refuse a student that cannot be trained as it is stored.

    Raises:
        CheckpointError: a bare file, one with adapters, or a quantised model.
    """
    if student.bare or student.config is None:
        fact = "has no config.json, which says what model it is"
        raise CheckpointError(student.ref, fact, "name the model's directory")
    if student.adapters:
        remedy = f"write it out first: surgery lora fuse {student.ref} -o FUSED"
        raise CheckpointError(student.ref, "is a base with adapters", remedy)
    config = student.config
    sections = [config, *(v for v in config.values() if isinstance(v, dict))]
    packed = next((t for t in student.tensors.values() if t.dtype.startswith("F8")), None)
    if packed is not None or any(section.get("quantization_config") for section in sections):
        fact = "is quantised, and what is trained could not be written back without a loss"
        raise CheckpointError(student.ref, fact, "train the model before it is quantised")


def check_finite(model: "torch.nn.Module", student: Checkpoint) -> None:
    """Refuse weights that are no numbers.

    Raises:
        CheckpointError: a parameter holds NaN or infinity.
    """
    import torch

    for name, parameter in model.named_parameters():
        if parameter.is_meta or bool(torch.isfinite(parameter).all()):
            continue
        fact = f"holds NaN or infinity in {name}"
        raise CheckpointError(student.ref, fact, "see `surgery inspect`, and make it again")
