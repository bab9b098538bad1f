"""Zeros of sparsified models that stay zero while the rest is trained.

Which weights are zero is told by the zeros themselves; which maps are sparse, by the record of
the student (`masked`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Masks:
    """The places that stay zero, by the parameter's name in memory.

    Taken from whole parameters, which may be sharded since, or from the parts that are here.
    """

    def __init__(self, parameters: "Mapping[str, torch.Tensor]") -> None:
        self._kept = {name: _local(p.detach()) != 0 for name, p in parameters.items()}

    def renewed(self, parameters: "Mapping[str, torch.Tensor]") -> "Masks":
        """Return the masks of the same parameters as they are now."""
        return Masks({name: parameters[name] for name in self._kept})

    def on_gradients(self, parameters: "Mapping[str, torch.Tensor]") -> None:
        """Set gradients of what stays zero to zero."""
        import torch

        with torch.no_grad():
            for name in self._kept:
                gradient = parameters[name].grad
                if gradient is not None:
                    _local(gradient).mul_(self._of(name, gradient))

    def on_weights(self, parameters: "Mapping[str, torch.Tensor]") -> None:
        """Set weights that stay zero to zero, whatever the optimiser did."""
        import torch

        with torch.no_grad():
            for name in self._kept:
                weight = parameters[name]
                _local(weight).mul_(self._of(name, weight))

    def _of(self, name: str, like: "torch.Tensor") -> "torch.Tensor":
        """Return the mask as it lies beside a tensor here."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        kept = self._kept[name].to(_local(like).device)
        if isinstance(like, DTensor) and tuple(kept.shape) != tuple(_local(like).shape):
            mesh, places = like.device_mesh, like.placements
            # Every process has the whole mask, so that none has to send it.
            kept = distribute_tensor(kept, mesh, places, src_data_rank=None).to_local()
        self._kept[name] = kept
        return kept


def _local(tensor: "torch.Tensor") -> "torch.Tensor":
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def keep_zeros(layer: Any) -> None:  # noqa: ANN401 - peft's layer
    """Make a LoRA layer of peft add its product to weights other than zero only.

    The layer computes with W + M * (scale * B A), M being 1 where W is not zero, in the forward
    pass as well as when it is merged: what is trained is what is written.

    Source: MaskLoRA of "PERP", arXiv 2312.15230, section 3.2.
    """
    layer.__class__ = _masked(type(layer))


def _masked(kind: type) -> type:
    from peft.tuners.lora.layer import ParamWrapper

    return _masked_experts(kind) if issubclass(kind, ParamWrapper) else _masked_linear(kind)


def _masked_linear(kind: Any) -> type:  # noqa: ANN401
    import torch

    class MaskedLinear(kind):  # type: ignore[misc]
        """A linear layer whose zeros stay zero."""

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            """Return the product where the weight is not zero."""
            weight, product = self.get_base_layer().weight, super().get_delta_weight(adapter)
            kept: torch.Tensor = product * (weight != 0)
            return kept

        def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            """Shapes: [..., in] to [..., out]."""
            if self.disable_adapters or self.merged:
                plain: torch.Tensor = super().forward(x, *args, **kwargs)
                return plain
            base = self.get_base_layer()
            change = self.get_delta_weight(self.active_adapters[0])
            change = change.T if self.fan_in_fan_out else change
            result: torch.Tensor = base(x, *args, **kwargs)
            return result + torch.nn.functional.linear(x, change.to(x.dtype)).to(result.dtype)

    return MaskedLinear


def _masked_experts(kind: Any) -> type:  # noqa: ANN401
    import torch
    from peft.tuners.lora.layer import _LoraParameterProxy
    from torch.nn.utils import parametrize

    class MaskedExperts(kind):  # type: ignore[misc]
        """Experts held as one parameter, whose zeros stay zero."""

        def get_delta_weight(
            self, adapter_name: str, *args: object, **kwargs: object
        ) -> torch.Tensor:
            """Return the products where the weights are not zero."""
            product = super().get_delta_weight(adapter_name, *args, **kwargs)
            kept: torch.Tensor = product * (self.get_param() != 0)
            return kept

        @contextmanager
        def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
            base, name = self.get_base_layer(), self.parameter_name
            proxy = _LoraParameterProxy(self.get_delta_weight(active_adapters[0]))
            trains = self.get_param().requires_grad
            parametrize.register_parametrization(base, name, proxy)
            base.parametrizations[name].original.requires_grad_(trains)
            try:
                with parametrize.cached():
                    yield
            finally:
                self._remove_parametrizations()

    return MaskedExperts
