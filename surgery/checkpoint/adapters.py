"""Read a LoRA adapter as peft writes it: which module it changes, by which factors and scale."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.checkpoint.header import Stamp, TensorInfo, quoted
from surgery.checkpoint.jsonfile import read_json_object
from surgery.checkpoint.layout import contained, single_file
from surgery.checkpoint.refs import resolve
from surgery.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FLOATS = ("F64", "F32", "F16", "BF16")
MATRIX = 2  # axes
# The end of a key: what it is, behind the module's name and before the adapter's name, if any.
PARTS = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?P<name>\.[^.]+)??(?P<leaf>\.weight|\.bias)?"
)
WRAPPED = re.compile(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)")
# Settings with which a module computes something else than W + scale * B @ A.
VARIANTS = {
    "alora_invocation_tokens": "is an activated LoRA, which acts on some tokens only",
    "arrow_config": "is routed by arrow, so no one weight stands for it",
    "use_bdlora": "is a block-diagonal LoRA",
    "kasa_config": "is a KaSA adapter, which changes the base's own weights",
    "monteclora_config": "is a Monte Carlo LoRA",
    "use_qalora": "is a QALoRA adapter, which pools its inputs",
    "megatron_config": "is made for Megatron's own layers",
}
# Ways to start that take a part of the base away, which only the training run knows exactly.
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica_residual")


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """The change of one module: scale * b @ a, a [rank, in], b [out, rank].

    Attributes:
        module: its name in the model, such as model.layers.0.self_attn.q_proj.
        level: how deep it is wrapped; 0 but for several fused parameters of one module.
        embedding: the module is an embedding, whose weight changes by (b @ a) transposed.
        magnitude: DoRA's length of each output row.
        bias: added to the module's bias, times the scale.
    """

    module: str
    level: int
    a: TensorInfo
    b: TensorInfo
    scale: float
    rank: int
    embedding: bool = False
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def stored(self) -> tuple[TensorInfo, ...]:
        """All tensors of the module's change."""
        more = (self.magnitude, self.bias)
        return (self.a, self.b, *(tensor for tensor in more if tensor is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An opened adapter.

    Attributes:
        config: its adapter_config.json.
        factors: in the order of the names.
        whole: parameters of the model that the adapter holds whole, by name.
        tokens: per embedding the tokens it holds new rows of, and those rows.
        notes: what a user should know.
    """

    ref: str
    root: Path
    file: Path
    stamp: Stamp
    config: Mapping[str, Any]
    factors: tuple[Factors, ...]
    tensors: Mapping[str, TensorInfo]
    whole: Mapping[str, TensorInfo] = field(default_factory=dict)
    tokens: Mapping[str, tuple[tuple[int, ...], TensorInfo]] = field(default_factory=dict)
    revision: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The last part of the path or ref: what an output is named after."""
        return self.ref.partition("@")[0].split("/")[-1] if self.revision else self.root.name


def open_adapter(
    ref: str | Path, *, allow_download: bool = False, replicating: bool = False
) -> Adapter:
    """Open a directory or hub ref with adapter_config.json and adapter_model.safetensors.

    Headers and config are validated; no tensor data is read.

    Args:
        allow_download: fetch a hub ref that the local cache does not hold.
        replicating: take one that repeats its base's layers, to be looked at, not added.

    Raises:
        CheckpointError: it is no LoRA adapter, or of a kind that cannot be added to weights.
    """
    found = resolve(ref, allow_download=allow_download)
    root = found.path.resolve() if found.path.name in {"", ".", ".."} else found.path
    if not root.is_dir() or not (root / CONFIG).exists():
        fact = f"is no adapter: there is no {CONFIG}"
        raise CheckpointError(root, fact, "name the adapter's directory")
    config = read_json_object(contained(root, CONFIG))
    _check_kind(root / CONFIG, config)
    if config.get("layer_replication") and not replicating:
        fact = "replicates layers of its base (layer_replication)"
        raise CheckpointError(root / CONFIG, fact, "merge it by peft, where peft can")
    weights = single_file(_weights(root))
    file = weights.files[0]
    parts = _parts(file, weights.tensors)
    factors, rest = _factors(file, parts, config)
    tokens = _tokens(root / CONFIG, rest, config)
    known = {tensor.name for item in factors for tensor in item.stored}
    known |= {tensor.name for _, tensor in tokens.values()}
    return Adapter(
        ref=str(ref),
        root=root,
        file=file,
        stamp=weights.stamps[file],
        config=config,
        factors=factors,
        tensors=weights.tensors,
        whole=_whole(file, weights.tensors, known),
        tokens=tokens,
        revision=found.revision,
    )


def _weights(root: Path) -> Path:
    if (root / WEIGHTS).exists():
        return contained(root, WEIGHTS)
    pickled = root / "adapter_model.bin"
    remedy = f"convert it first: surgery convert {pickled} -o {root / WEIGHTS}"
    if pickled.exists():
        raise CheckpointError(pickled, "is a pickle file, which is not read", remedy)
    raise CheckpointError(root, f"holds no {WEIGHTS}", "copy the adapter again")


def _check_kind(place: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        fact = f"is an adapter of the type {kind!r}; only LORA can be added to weights"
        raise CheckpointError(place, fact, "merge it by peft, where peft can")
    for key, fact in VARIANTS.items():
        if config.get(key):
            raise CheckpointError(place, f"{fact} ({key})", "merge it by peft, where peft can")
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(MUTATING):
        fact = f"was started by {start}, which took a part of the base's weights away"
        remedy = "save it by peft with path_initial_model_for_weight_conversion"
        raise CheckpointError(place, fact, remedy)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(place, f"has a {key} that is no table", "restore the file")


def _parts(file: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Group tensors by module as it is written, then by part, such as `lora_B.bias`."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        match = PARTS.fullmatch(name)
        if match is None:
            if ".lora_" in name:
                fact = f"holds {quoted(name)}, which is no part of a LoRA that is known"
                raise CheckpointError(file, fact, "merge it by peft, where peft can")
            continue
        if tensor.dtype not in FLOATS:
            fact = f"holds {quoted(name)} as {tensor.dtype}, which is not computed with"
            raise CheckpointError(file, fact, "save the adapter in bfloat16 or float32")
        leaf = ".bias" if match["leaf"] == ".bias" else ""
        parts = found.setdefault(match["module"], {})
        if match["part"] + leaf in parts:
            fact = f"holds two adapters of {quoted(match['module'])}"
            raise CheckpointError(file, fact, "save one adapter at a time")
        parts[match["part"] + leaf] = tensor
    return found


def plain_name(key: str) -> str:
    """Return the model's own name for a key of the adapter, wrappers and prefix left out."""
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def _factors(
    file: Path, parts: Mapping[str, dict[str, TensorInfo]], config: Mapping[str, Any]
) -> tuple[tuple[Factors, ...], dict[str, TensorInfo]]:
    factors, tokens = [], {}
    for key, found in parts.items():
        rows = found.pop("token_adapter.trainable_tokens_delta", None)
        if rows is not None:
            tokens[plain_name(key)] = rows
        if found:
            factors.append(_pair(file, key, found, config))
    if not factors and not parts:
        raise CheckpointError(file, "holds no LoRA weights", "copy the adapter again")
    return tuple(factors), tokens


def _pair(file: Path, key: str, found: dict[str, TensorInfo], config: Mapping[str, Any]) -> Factors:
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    stem = "lora_embedding" if embedding else "lora"
    a, b = found.get(f"{stem}_A"), found.get(f"{stem}_B")
    if a is None or b is None:
        missing = quoted(f"{key}.{stem}_{'A' if a is None else 'B'}")
        raise CheckpointError(file, f"has no {missing}", "copy the adapter again")
    module = plain_name(key)
    level = len(re.findall(r"\.base_layer(?=\.|$)", module))
    module = re.sub(r"\.base_layer(?=\.|$)", "", module)
    if len(a.shape) != MATRIX or len(b.shape) != MATRIX or 0 in (*a.shape, *b.shape):
        fact = f"adapts {quoted(module)} by factors of the shapes {list(a.shape)}, {list(b.shape)}"
        raise CheckpointError(file, fact, "only matrices are added to weights")
    rank, scale = _scale(file, module, config)
    if a.shape[0] != b.shape[1] or a.shape[0] % rank:
        fact = (
            f"has rank {a.shape[0]} and {b.shape[1]} for {quoted(module)}, its config says {rank}"
        )
        raise CheckpointError(file, fact, f"restore {CONFIG}")
    return Factors(
        module=module,
        level=level,
        a=a,
        b=b,
        scale=scale,
        rank=rank,
        embedding=embedding,
        magnitude=found.get("lora_magnitude_vector"),
        bias=found.get("lora_B.bias"),
    )


def _scale(file: Path, module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """Return the rank that the config tells for a module, and alpha / r or alpha / sqrt(r)."""
    rank = _patterned(file, config.get("rank_pattern"), module, config.get("r", 8))
    alpha = _patterned(file, config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        fact = f"has rank {rank!r} and alpha {alpha!r} for {quoted(module)}"
        raise CheckpointError(file.with_name(CONFIG), fact, "restore the file")
    if not math.isfinite(alpha):
        raise CheckpointError(file.with_name(CONFIG), f"has alpha {alpha!r}", "restore the file")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _patterned(file: Path, pattern: object, module: str, default: Any) -> Any:  # noqa: ANN401
    """Look a module up as peft does: the first key that matches the end of its name."""
    for key, value in pattern.items() if isinstance(pattern, dict) else ():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            fact = f"has a pattern {quoted(key)} that is none ({error})"
            raise CheckpointError(file.with_name(CONFIG), fact, "restore the file") from error
    return default


def _tokens(
    place: Path, rows: Mapping[str, TensorInfo], config: Mapping[str, Any]
) -> dict[str, tuple[tuple[int, ...], TensorInfo]]:
    found = {}
    for module, tensor in rows.items():
        told = _listed(config.get("trainable_token_indices"), module)
        if told is None or len(told) != (tensor.shape or (0,))[0]:
            fact = f"does not tell which tokens the new rows of {quoted(module)} are for"
            raise CheckpointError(place, fact, "restore the file")
        found[module] = (told, tensor)
    return found


def _listed(told: object, module: str) -> tuple[int, ...] | None:
    """Return the tokens told for a module, if they are distinct token ids."""
    if isinstance(told, dict):
        ends = (v for k, v in told.items() if module == k or module.endswith(f".{k}"))
        told = next(ends, None)
    if not isinstance(told, list) or not all(type(i) is int and i >= 0 for i in told):
        return None
    return tuple(told) if len(set(told)) == len(told) else None


def _whole(file: Path, tensors: Mapping[str, TensorInfo], known: set[str]) -> dict[str, TensorInfo]:
    """Return parameters that the adapter holds whole (modules_to_save, biases, embeddings)."""
    found: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        if name in known or ".original_module." in name:
            continue
        plain = WRAPPED.sub("", plain_name(name))
        if plain in found:
            fact = f"holds {quoted(plain)} twice"
            raise CheckpointError(file, fact, "save one adapter at a time")
        found[plain] = tensor
    return found
