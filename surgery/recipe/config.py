"""The output's config: the donor's, with what the merge changes."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from surgery.anatomy import LAYER_KEYS
from surgery.layers.config import remap_config
from surgery.plan import Step
from surgery.recipe.inputs import Model
from surgery.recipe.layout import Layout
from surgery.recipe.schema import DTYPES

NAMES = {code: name for name, code in DTYPES.items()}
# Entries in which models that are merged may well differ.
APART = (
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "vocab_size"),
    *("tie_word_embeddings", "quantization_config", "use_cache", *LAYER_KEYS),
)
SHOWN = 5


def merged_config(
    told: Mapping[str, Any] | None, layout: Layout, steps: Sequence[Step]
) -> dict[str, Any] | None:
    """Return the output's config, None for a bare file.

    Args:
        told: the donor's, its vocabulary as that of the output.

    Raises:
        PlanError: it cannot describe the layers in their new order.
    """
    if told is None:
        return None
    config = deepcopy(dict(told))
    if layout.layer_map is not None:
        config = remap_config(config, layout.donor.anatomy, layout.layer_map)
    if layout.unties:
        for table in _tables(config):
            table.pop("tie_word_embeddings", None)
        config["tie_word_embeddings"] = False
    dtypes = {spec.dtype for step in steps for _, spec in step.outputs if spec.dtype in NAMES}
    if len(dtypes) == 1:
        for table in _tables(config):
            for key in ("dtype", "torch_dtype"):
                if table.get(key) in NAMES.values():
                    table[key] = NAMES[next(iter(dtypes))]
    return config


def _tables(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config and those of its towers."""
    yield config
    yield from (v for k, v in config.items() if isinstance(v, dict) and k.endswith("_config"))


def config_notes(donor: Model, models: Sequence[Model], *, sliced: bool) -> Iterator[str]:
    """Yield a note for each model whose config says something else than the donor's."""
    if donor.checkpoint.config is None:
        return
    mine = dict(_flat(donor.checkpoint.config, sliced=sliced))
    for model in models:
        if model.checkpoint.config is None or model is donor:
            continue
        other = dict(_flat(model.checkpoint.config, sliced=sliced))
        keys = [key for key in {**mine, **other} if mine.get(key) != other.get(key)]
        if keys:
            shown = ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
            names = f"{donor.checkpoint.name} and {model.checkpoint.name}"
            yield f"the configs of {names} differ in {shown}: that of {donor.checkpoint.name} holds"


def _flat(config: Mapping[str, Any], *, sliced: bool) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{inner}", v) for inner, v in _flat(value, sliced=sliced))
        elif key not in APART and not (sliced and isinstance(value, list)):
            yield key, value
