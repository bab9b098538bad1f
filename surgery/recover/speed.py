"""What makes a run faster or smaller and leaves its figures: compiled or recomputed layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import RecipeError
from surgery.recover.distributed import World
from surgery.recover.settings import Settings

if TYPE_CHECKING:
    import torch

PAYS = 300  # steps of a run on a GPU that compiling takes less time than it saves


def compiles(settings: Settings, world: World) -> bool:
    """Return whether layers are compiled: as asked, or in long runs on a GPU."""
    if settings.compile is not None:
        return settings.compile
    return world.device.type == "cuda" and settings.steps >= PAYS


def compile_layers(layers: "Sequence[torch.nn.Module]") -> None:
    """Compile each decoder layer where it is: names and parameters stay as they are."""
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, 4 * len(layers))
    for layer in layers:
        layer.compile()


def save_memory(model: Any, settings: Settings) -> None:  # noqa: ANN401 - a transformers model
    """Recompute layers in the backward pass, if asked to; the model trains from here on.

    Raises:
        RecipeError: this one cannot.
    """
    if settings.checkpointing:
        if not model.supports_gradient_checkpointing:
            fact = f"is not possible with {type(model).__name__}"
            raise RecipeError("--checkpointing", fact, "leave it out")
        # Newer versions of transformers have another name for it.
        older = model.gradient_checkpointing_enable
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    model.train()
