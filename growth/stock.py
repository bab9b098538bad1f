"""What our own model classes build on: a plain decoder that transformers knows."""

from surgery.anatomy import HEADED
from surgery.checkpoint import Checkpoint
from surgery.errors import PlanError


def check_stock(base: Checkpoint, *, verb: str, result: str, quantised: str) -> None:
    """Refuse what no class of ours can be made of.

    Args:
        verb: what is done, for the remedy.
        result: what comes out.
        quantised: why a quantised model will not do.

    Raises:
        PlanError: with the reason.
    """
    config = base.config or {}
    named = [str(name) for name in config.get("architectures") or ()]
    if config.get("is_encoder_decoder") or (named and not named[0].endswith(HEADED)):
        told = f" ({named[0]})" if named else ""
        raise PlanError(base.ref, f"is no causal language model{told}", "name a decoder")
    if config.get("quantization_config"):
        remedy = f"{verb} the model it was quantised from"
        raise PlanError(base.ref, f"is quantised, {quantised}", remedy)
    if config.get("auto_map"):
        fact = f"has code of its own, which the {result} model cannot build on"
        raise PlanError(base.ref, fact, "use an architecture that transformers knows")
