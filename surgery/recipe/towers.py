"""Which tensors a module of a recipe means: the text tower, the vision tower, what joins them."""

import re
from collections.abc import Callable, Sequence

from surgery.anatomy import OTHER_TOWERS
from surgery.errors import PlanError
from surgery.recipe.inputs import Model
from surgery.recipe.schema import Module

TEXT = ("text_decoder", "text", "language_model", "text_model")
VISION = ("vision_tower", "vision_model", "vision", "visual")
JOINING = ("multi_modal_projector", "projector")
PROJECTOR = re.compile(r"(^|\.)(multi_modal_projector|\w*projector|connector|merger)(\.|$)")
TEXT_WORDS = re.compile(r"(^|\.)(language_model|text_model|llm)(\.|$)")


def tower(module: Module, donor: Model) -> Callable[[str], bool]:
    """Return what tells whether a tensor belongs to a module.

    Raises:
        PlanError: the donor has no such module.
    """
    belongs = _rule(module.name)
    if not any(belongs(name) for name in donor.tensors):
        known = ", ".join(_known(donor))
        fact = f"names the module {module.name!r}, which {donor.ref} has not"
        raise PlanError(module.place, fact, f"it has {known}")
    return belongs


def _rule(name: str) -> Callable[[str], bool]:
    if name == "default":
        return lambda _: True
    if name in TEXT:
        return _is_text
    if name in JOINING:
        return lambda tensor: PROJECTOR.search(tensor) is not None
    if name in VISION:
        return _is_vision
    return lambda tensor: f".{name}." in f".{tensor}."


def _is_text(name: str) -> bool:
    if TEXT_WORDS.search(name):
        return True
    return not OTHER_TOWERS.search(name) and not PROJECTOR.search(name)


def _is_vision(name: str) -> bool:
    apart = TEXT_WORDS.search(name) or PROJECTOR.search(name)
    return OTHER_TOWERS.search(name) is not None and not apart


def _known(donor: Model) -> Sequence[str]:
    found = [n for n in (TEXT[0], VISION[0], JOINING[0]) if any(map(_rule(n), donor.tensors))]
    first = dict.fromkeys(name.partition(".")[0] for name in donor.tensors)
    return [*found, *(name for name in first if name not in found)]
