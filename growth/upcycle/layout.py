"""The mixture layouts that a dense model may get, and which of them hold its attention."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from surgery.errors import PlanError, RecipeError

Name = Literal["mixtral", "qwen3-moe", "qwen2-moe"]
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
SHARED = frozenset(
    {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{each}_proj.weight" for each in "qkvo"),
    }
)
HEAD_NORMS = frozenset({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
QKV_BIAS = frozenset(f"self_attn.{each}_proj.bias" for each in "qkv")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a family of mixtures names its tensors on disk, and what its attention can be.

    Attributes:
        block: the module of a layer that is the mixture.
        projections: what an expert's gate, up and down projection are called.
        needed: names within a layer, beside those of every family, that must be there.
        biases: names that may be there, all or none.
        mixed: layers may differ in their attention window.
        partial: layers may keep a dense feed-forward.
        shared: each block has a shared expert beside the routed ones.
    """

    name: Name
    model_type: str
    architecture: str
    block: str
    projections: Mapping[str, str]
    needed: frozenset[str] = frozenset()
    biases: frozenset[str] = frozenset()
    mixed: bool = False
    partial: bool = True
    shared: bool = False

    def expert(self, number: int, projection: str) -> str:
        """Return the name within a layer of an expert's projection."""
        return f"{self.block}.experts.{number}.{self.projections[projection]}.weight"

    @property
    def router(self) -> str:
        """The name within a layer of the router."""
        return f"{self.block}.gate.weight"

    def objection(
        self, names: Collection[str], *, windows: Sequence[int | None], whole: bool
    ) -> str | None:
        """Say why layers with these tensors outside their feed-forward do not fit, or None."""
        own = set(names)
        missing = sorted((SHARED | self.needed) - own)
        extra = sorted(own - SHARED - self.needed - self.biases)
        some = sorted(self.biases - own) if own & self.biases else []
        if extra:
            return f"has no place for {extra[0]}"
        if missing or some:
            return f"needs {(missing or some)[0]}"
        if len(set(windows)) > 1 and not self.mixed:
            return "has one attention window for all layers"
        if not whole and not self.partial:
            return "makes every layer a mixture"
        return None


_PLAIN = {name: name for name in FEED_FORWARD}
LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            name="mixtral",
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            block="block_sparse_moe",
            projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
            partial=False,
        ),
        Layout(
            name="qwen3-moe",
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            block="mlp",
            projections=_PLAIN,
            needed=HEAD_NORMS,
            biases=QKV_BIAS | {"self_attn.o_proj.bias"},
        ),
        Layout(
            name="qwen2-moe",
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            block="mlp",
            projections=_PLAIN,
            biases=QKV_BIAS,
            mixed=True,
            shared=True,
        ),
    )
}


def choose_layout(
    asked: str | None,
    names: Collection[str],
    *,
    place: str,
    windows: Sequence[int | None],
    whole: bool,
) -> Layout:
    """Return the layout that was asked for, or the first that holds the model exactly.

    Args:
        names: within a layer, outside the feed-forward.
        place: the model, for errors.
        windows: the attention window of each layer, None where all is seen.
        whole: every layer becomes a mixture.

    Raises:
        RecipeError: there is no layout of that name.
        PlanError: it, or none, holds the model exactly.
    """
    if asked is not None and asked not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise RecipeError(f"--layout {asked}", "is no mixture layout", f"there are {known}")
    tried = [LAYOUTS[asked]] if asked else list(LAYOUTS.values())
    against = {
        layout.name: layout.objection(names, windows=windows, whole=whole) for layout in tried
    }
    found = next((name for name, why in against.items() if why is None), None)
    if found is not None:
        return LAYOUTS[found]
    told = "; ".join(f"{name} {why}" for name, why in against.items())
    remedy = "leave out --layout, or give another" if asked else "no stock class could load it"
    raise PlanError(place, f"fits no mixture layout exactly: {told}", remedy)
