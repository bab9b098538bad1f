"""What is noted of activations while a model runs: by forward hooks, summed as it goes.

Axis letters: b rows of a batch, t tokens, n = b * t, d width, l layers and one more.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from surgery.anatomy import Anatomy
from surgery.errors import TrainError
from surgery.evaluate.load import Loaded
from surgery.plan import TensorSpec

if TYPE_CHECKING:
    import torch

    Linears = Mapping[str, torch.nn.Module]

KINDS = ("layers", "inputs", "grams")
CHUNK = 1 << 22  # elements of a product of layers by layers that are held at once


class Observer(Protocol):
    """Sums something over all batches."""

    def specs(self) -> dict[str, TensorSpec]:
        """Return names and shapes of the results."""

    def attach(self) -> Iterator[Any]:
        """Hang hooks into the model; yield their handles."""

    def end_of_batch(self) -> None:
        """Make use of what a whole forward pass showed."""

    def results(self) -> "dict[str, torch.Tensor]":
        """Return the sums, on the CPU."""


def find_linears(loaded: Loaded, prefix: str) -> "dict[str, torch.nn.Module]":
    """Return every linear map inside the layers, by its name on disk.

    Raises:
        TrainError: the model in memory has its layers elsewhere.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    found: dict[str, torch.nn.Module] = {
        name: module
        for name, module in loaded.model.named_modules()
        if name.startswith(f"{prefix}.") and isinstance(module, (torch.nn.Linear, Conv1D))
    }
    if not found:
        fact = f"has no linear maps under {prefix} once it is loaded"
        raise TrainError(loaded.path, fact, "this architecture cannot be calibrated")
    return found


def inputs_of(module: "torch.nn.Module") -> int:
    """Return how many inputs a linear map has; transformers' Conv1D stores [in, out]."""
    weight: Any = module.weight
    return int(weight.shape[1] if hasattr(module, "in_features") else weight.shape[0])


def shared_inputs(loaded: Loaded, linears: "Linears") -> dict[str, str]:
    """Return, by linear map, the first one that is given the very same input."""
    import torch

    seen: list[tuple[str, torch.Tensor]] = []  # held, so that no address is given out twice
    handles = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.append((name, given[0])))
        for name, module in linears.items()
    ]
    try:
        with torch.inference_mode():
            loaded.model(
                input_ids=torch.zeros((1, 4), dtype=torch.long, device=loaded.device),
                use_cache=False,
            )
    finally:
        for handle in handles:
            handle.remove()
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    return {name: first.setdefault((x.data_ptr(), tuple(x.shape)), name) for name, x in seen}


def observers_for(
    collect: Collection[str],
    loaded: Loaded,
    parts: Anatomy,
    linears: "Linears",
    aliases: Mapping[str, str],
    *,
    memory: int,
) -> list[list[Observer]]:
    """Return groups of observers; each group is one run over the text, within `memory` bytes."""
    first: list[Observer] = []
    if "layers" in collect:
        first.append(Layers(loaded, parts.stack.prefix))
    if "inputs" in collect:
        first += [Inputs(name, module) for name, module in linears.items()]
    groups = [first] if first else []
    if "grams" in collect:
        held = memory
        for name in dict.fromkeys(aliases.values()):
            gram = Gram(name, linears[name])
            if held + gram.nbytes > memory:
                groups.append([])
                held = 0
            groups[-1].append(gram)
            held += gram.nbytes
    return groups


class Layers:
    """How alike the residual stream is before any two layers."""

    def __init__(self, loaded: Loaded, prefix: str) -> None:
        import torch

        self.layers: Sequence[torch.nn.Module] = list(loaded.model.get_submodule(prefix).children())
        size = len(self.layers) + 1
        self.cosine = torch.zeros((size, size), dtype=torch.float64)
        self.angle = torch.zeros((size, size), dtype=torch.float64)
        self.tokens = self.rows = 0
        self.seen: list[torch.Tensor] = []

    def specs(self) -> dict[str, TensorSpec]:
        """Return names and shapes of the results."""
        shape = tuple(self.cosine.shape)
        return {"cosine": TensorSpec("F64", shape), "angle.last": TensorSpec("F64", shape)}

    def attach(self) -> Iterator[Any]:
        """Hang hooks before every layer, and behind the last."""
        for layer in self.layers:
            yield layer.register_forward_pre_hook(self._before, with_kwargs=True)
        yield self.layers[-1].register_forward_hook(self._behind)

    def _before(self, _: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:  # noqa: ANN401
        self.seen.append(given[0] if given else named["hidden_states"])

    def _behind(self, _: Any, __: Any, out: Any) -> None:  # noqa: ANN401
        self.seen.append(out[0] if isinstance(out, tuple) else out)

    def end_of_batch(self) -> None:
        """Add the cosines between all pairs of layers, token by token."""
        import torch

        h_lbtd = torch.stack([x.float() for x in self.seen])
        self.seen.clear()
        h_lbtd = torch.nn.functional.normalize(h_lbtd, dim=-1)
        size, rows, tokens, width = h_lbtd.shape
        h_nld = h_lbtd.reshape(size, rows * tokens, width).transpose(0, 1)
        step = max(CHUNK // (size * size), 1)
        for start in range(0, len(h_nld), step):
            part = h_nld[start : start + step]
            self.cosine += (part @ part.transpose(1, 2)).double().sum(0).cpu()
        last_bld = h_lbtd[:, :, -1].transpose(0, 1).double()
        cosine_bll = (last_bld @ last_bld.transpose(1, 2)).clamp(-1, 1)
        self.angle += (cosine_bll.arccos() / math.pi).sum(0).cpu()
        self.tokens += rows * tokens
        self.rows += rows

    def results(self) -> "dict[str, torch.Tensor]":
        """Return means over tokens, and over rows."""
        return {"cosine": self.cosine / self.tokens, "angle.last": self.angle / self.rows}


class Inputs:
    """How large each input of a linear map is."""

    def __init__(self, name: str, module: "torch.nn.Module") -> None:
        import torch

        self.name, self.module = name, module
        self.square = torch.zeros(inputs_of(module), dtype=torch.float64)
        self.absolute = torch.zeros_like(self.square)

    def specs(self) -> dict[str, TensorSpec]:
        """Return names and shapes of the results."""
        spec = TensorSpec("F64", tuple(self.square.shape))
        return {f"{self.name}.square": spec, f"{self.name}.absolute": spec}

    def attach(self) -> Iterator[Any]:
        """Hang a hook before the map."""
        yield self.module.register_forward_pre_hook(self._add)

    def _add(self, _: Any, given: tuple[Any, ...]) -> None:  # noqa: ANN401
        x_btd = given[0].float()
        x_btd = x_btd if x_btd.dim() == 3 else x_btd[None]  # noqa: PLR2004 - rows and tokens
        self.square += x_btd.square().sum((0, 1)).double().cpu()
        self.absolute += x_btd.abs().mean(1).double().square().sum(0).cpu()

    def end_of_batch(self) -> None:
        """Nothing is left to do."""

    def results(self) -> "dict[str, torch.Tensor]":
        """Return the sums."""
        return {f"{self.name}.square": self.square, f"{self.name}.absolute": self.absolute}


class Gram:
    """Products of the inputs of a linear map."""

    def __init__(self, name: str, module: "torch.nn.Module") -> None:
        self.name, self.module = name, module
        self.size = inputs_of(module)
        self.total: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return 4 * self.size * self.size

    def specs(self) -> dict[str, TensorSpec]:
        """Return name and shape of the result."""
        return {f"{self.name}.gram": TensorSpec("F32", (self.size, self.size))}

    def attach(self) -> Iterator[Any]:
        """Hang a hook before the map."""
        yield self.module.register_forward_pre_hook(self._add)

    def _add(self, _: Any, given: tuple[Any, ...]) -> None:  # noqa: ANN401
        x_nd = given[0].reshape(-1, self.size).float()
        if self.total is None:
            self.total = x_nd.new_zeros((self.size, self.size))
        self.total.addmm_(x_nd.T, x_nd)

    def end_of_batch(self) -> None:
        """Nothing is left to do."""

    def results(self) -> "dict[str, torch.Tensor]":
        """Return the sum, and let it go."""
        import torch

        total = torch.zeros((self.size, self.size)) if self.total is None else self.total.cpu()
        self.total = None
        return {f"{self.name}.gram": total}
