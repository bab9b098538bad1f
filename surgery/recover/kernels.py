"""Faster kernels of another package, taken only after they computed what torch computes."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError, TrainError
from surgery.recover.distributed import World, gradient_norm
from surgery.recover.settings import Settings

if TYPE_CHECKING:
    import torch

DEVICES = ("cuda",)  # that Liger's kernels run on
# How far loss and gradient norm of the first batch may be off, as shares: bfloat16 has 8 bits.
CLOSE = {False: 1e-3, True: 2e-2}
Backward = Callable[[], float]


def check_kernels(settings: Settings, device: str) -> None:
    """Refuse kernels that cannot run here, before torch is loaded.

    Raises:
        RecipeError: no GPU is asked for, or the package is not installed.
    """
    if settings.kernels is None:
        return
    option = f"--kernels {settings.kernels}"
    if device.partition(":")[0] not in DEVICES:
        fact = f"runs on CUDA alone, and --device is {device}"
        raise RecipeError(option, fact, "leave it out, or give --device cuda")
    if find_spec("liger_kernel") is None:
        fact = "needs the liger-kernel package, which is not installed"
        raise RecipeError(option, fact, "run: pip install 'model-surgery[liger]'")


def use_kernels(
    model: Any,  # noqa: ANN401 - of transformers
    parameters: "list[torch.nn.Parameter]",
    backward: Backward,
    world: World,
    *,
    half: bool,
) -> dict[str, float]:
    """Put Liger's kernels into a model, and keep them if the first batch comes out the same.

    Cross-entropy is not taken from there: no loss of ours makes whole logits.

    Args:
        parameters: whose gradients are compared; left without any.
        backward: adds the gradients of the first batch, and returns its loss.
        half: whether bfloat16 is computed in.

    Returns:
        Loss and gradient norm without and with the kernels.

    Raises:
        TrainError: the package has no kernels for the model, or they compute something else.
    """
    from surgery.evaluate.load import first_line  # with numpy, which help does without

    option = "--kernels liger"
    plain = _measure(parameters, backward, world)
    before = _forwards(model)
    try:
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            _apply_liger_kernel_to_instance as apply,
        )

        apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    except Exception as error:  # another package, which may not fit this transformers or driver
        fact = f"cannot be applied ({first_line(error)})"
        raise TrainError(option, fact, "leave it out") from error
    if _forwards(model) == before:
        fact = f"has no kernels for models of type {model.config.model_type}"
        raise TrainError(option, fact, "leave it out")
    fast = _measure(parameters, backward, world)
    for name, wanted, found in zip(("loss", "gradient norm"), plain, fast, strict=True):
        if not abs(found - wanted) <= CLOSE[half] * abs(wanted):
            fact = f"computes a {name} of {found:.6g} on the first batch, and torch {wanted:.6g}"
            raise TrainError(option, fact, "leave it out")
    return {
        "loss": plain[0],
        "loss_with": fast[0],
        "gradient_norm": plain[1],
        "gradient_norm_with": fast[1],
    }


def _measure(
    parameters: "list[torch.nn.Parameter]", backward: Backward, world: World
) -> tuple[float, float]:
    """Return loss and gradient norm of the first batch; the run's random numbers stay."""
    import torch

    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        torch.manual_seed(0)
        (loss,) = world.total(backward())
    norm = gradient_norm(parameters, world)
    for parameter in parameters:
        parameter.grad = None
    return loss, norm


def _forwards(model: "torch.nn.Module") -> dict[str, int]:
    """Return what runs for every module, by number."""
    return {
        name: id(getattr(module.forward, "__func__", module.forward))
        for name, module in model.named_modules()
    }
