"""What moved layers must compute, told by transformers alone: nothing here comes from `growth`."""

from __future__ import annotations

import copy
import re

import torch
from safetensors import safe_open

LAYER = re.compile(r"^((?:.*\.)?(?:layers|layer|h|blocks)\.)(\d+)(\..+)$")
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "layer_rope_theta")
NUMBERED = ("layer_idx", "layer_id", "layer_number")


def prompt(length: int = 24) -> dict[str, torch.Tensor]:
    """Two rows of byte tokens, three times as long as the fixtures' sliding windows."""
    rows = torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(11))
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompt(), use_cache=False).logits


def generated(model) -> list[list[int]]:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    return model.generate(**prompt(), **options).tolist()


def stored(directory) -> dict[str, torch.Tensor]:
    """Every tensor of a directory or file, as safetensors reads it."""
    files = [directory] if directory.is_file() else sorted(directory.glob("*.safetensors"))
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def source_name(name: str, sources: list[int]) -> str:
    """The tensor of the source that a tensor of the result must be a copy of."""
    found = None if re.match(r"vision|visual|model\.visual", name) else LAYER.match(name)
    return f"{found[1]}{sources[int(found[2])]}{found[3]}" if found else name


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def text_of(config):
    return config.get_text_config(decoder=True)


def depth(config) -> int:
    text = text_of(config)
    return next(getattr(text, key) for key in COUNTS if hasattr(text, key))


def moved(model, sources: list[int]):
    """The model with its layers in a new sequence, each a copy that knows its new number."""
    count = depth(model.config)
    made = copy.deepcopy(model)
    path, layers = next(
        (path, module)
        for path, module in made.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == count and "vis" not in path
    )
    new = [_renumbered(layers[source], i - source) for i, source in enumerate(sources)]
    parent, _, last = path.rpartition(".")
    owner = made.get_submodule(parent)
    setattr(owner, last, torch.nn.ModuleList(new))
    for module in made.modules():
        config = getattr(module, "config", None)
        if config is not None and not hasattr(config, "vision_config"):
            _move_config(config, sources, count)
    _move_config(text_of(made.config), sources, count)
    return made.eval()


def _renumbered(layer, by: int):
    made = copy.deepcopy(layer)
    for module in made.modules():
        for name in NUMBERED:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) + by)
    return made


def _move_config(config, sources: list[int], count: int) -> None:
    own = vars(config)
    key = next((key for key in COUNTS if own.get(key) == count), None)
    if key is None or own.get("_moved"):
        return
    for name in (key, *LISTS):
        value = own.get(name)
        if isinstance(value, list):
            value = [value[source] for source in sources]
        own[name] = len(sources) if name == key else value
    own["_moved"] = True
