"""Where a mixture's experts are stored: one tensor each, or all of a layer in one."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.anatomy import NUMBER, TEXT_SECTIONS
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.checkpoint.header import quoted
from surgery.errors import CheckpointError
from surgery.pieces import run_of_rows

GATE, UP, DOWN = "gate", "up", "down"
# What a tensor of one expert, or of all, is to the expert: its roles, stacked in this order.
ROLES = {
    "gate_proj": (GATE,), "up_proj": (UP,), "down_proj": (DOWN,),
    "w1": (GATE,), "w3": (UP,), "w2": (DOWN,),
    "fc1": (GATE,), "fc3": (UP,), "fc2": (DOWN,),
    "gate_up_proj": (GATE, UP),
    "input_linear": (GATE, UP), "output_linear": (DOWN,),
}  # fmt: skip
SINGLE = re.compile(
    r"^(?P<block>.+)\.experts\.(?P<expert>\d+)"
    r"\.(?P<proj>(?:gate|up|down)_proj|w[123]|fc[123])\.(?P<what>weight|bias)$"
)
FUSED = re.compile(
    r"^(?P<block>.+)\.(?:experts\.(?P<proj>gate_up_proj|(?:gate|up|down)_proj)"
    r"(?P<ending>\.weight|\.bias|_bias)?|(?P<linear>(?:input|output)_linear)\.weight)$"
)
# Families that mix the rows of gate and up: gate 0, up 0, gate 1, up 1, ...
INTERLEAVED = {"gpt_oss"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Tensors of one layer that hold one role of its experts, or two.

    Attributes:
        tensors: one per expert, or a single one for all, [experts, ...].
        roles: what the rows of an expert are, in order.
        bias: they are vectors.
        inputs_first: an expert's matrix is [inputs, outputs].
        interleaved: the rows of the roles alternate.
    """

    tensors: tuple[TensorInfo, ...]
    roles: tuple[str, ...]
    bias: bool
    fused: bool
    inputs_first: bool = False
    interleaved: bool = False

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.tensors[0].shape[0] if self.fused else len(self.tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one role of one expert: [outputs, inputs], or [outputs] of a bias."""
        own = self.tensors[0].shape[self.fused :]
        outputs, *inputs = own[::-1] if self.inputs_first else own
        return (outputs // len(self.roles), *inputs)

    def expert(self, number: int) -> TensorInfo:
        """Return what is stored of one expert: a matrix, of a bias one row."""
        if not self.fused:
            return self.tensors[number]
        whole = self.tensors[0]
        rows = 1 if self.bias else whole.shape[1]
        return run_of_rows(whole, number * rows, rows, label=str(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The mixture of one layer.

    Attributes:
        prefix: what the names of its tensors start with, without the dot.
        stores: where its experts lie, in the order of their files.
    """

    prefix: str
    stores: tuple[Store, ...]

    @property
    def experts(self) -> int:
        """How many there are."""
        return self.stores[0].experts

    @property
    def names(self) -> frozenset[str]:
        """All tensors that hold experts."""
        return frozenset(tensor.name for store in self.stores for tensor in store.tensors)

    def find(self, role: str, *, bias: bool) -> Store | None:
        """Return where one role lies."""
        fitting = (s for s in self.stores if role in s.roles and s.bias == bias)
        return next(fitting, None)

    @property
    def place(self) -> tuple[str, int]:
        """Stack and number of its layer."""
        return layer_of(self.prefix)


def layer_of(prefix: str) -> tuple[str, int]:
    """Return the stack that a name belongs to, and the layer in it: the first number."""
    words = prefix.split(".")
    at = next((i for i, word in enumerate(words) if i and NUMBER.fullmatch(word)), None)
    return (prefix, -1) if at is None else (".".join(words[:at]), int(words[at]))


def find_blocks(checkpoint: Checkpoint) -> tuple[Block, ...]:
    """Return every layer's experts, in the order of the files.

    Raises:
        CheckpointError: an expert is missing, or the parts of a layer do not fit together.
    """
    single: dict[str, dict[tuple[str, bool], dict[int, TensorInfo]]] = {}
    fused: dict[str, dict[tuple[str, bool], TensorInfo]] = {}
    for name, tensor in checkpoint.tensors.items():
        if found := SINGLE.match(name):
            parts = single.setdefault(found["block"], {})
            slot = parts.setdefault((found["proj"], found["what"] == "bias"), {})
            slot[int(found["expert"])] = tensor
        elif (found := FUSED.match(name)) and len(tensor.shape) > 1:
            bias = "bias" in (found["ending"] or "")
            if len(tensor.shape) == 3 - bias:
                fused.setdefault(found["block"], {})[found["proj"] or found["linear"], bias] = (
                    tensor
                )
    blocks = [_single_block(checkpoint, prefix, parts) for prefix, parts in single.items()]
    blocks += [_fused_block(checkpoint, prefix, parts) for prefix, parts in fused.items()]
    order = {name: place for place, name in enumerate(checkpoint.tensors)}
    blocks.sort(key=lambda block: min(order[name] for name in block.names))
    return tuple(_checked(checkpoint, block) for block in blocks)


def _roles(proj: str, known: Iterable[tuple[str, bool]]) -> tuple[str, ...]:
    """Return what a projection is; an expert without a gate names its first one fc1 too."""
    gated = any(name == "fc3" for name, _ in known)
    return (UP,) if proj == "fc1" and not gated else ROLES[proj]


def _single_block(
    checkpoint: Checkpoint, prefix: str, parts: Mapping[tuple[str, bool], dict[int, TensorInfo]]
) -> Block:
    stores = []
    for (proj, bias), found in parts.items():
        missing = next((n for n in range(len(found)) if n not in found), None)
        if missing is not None:
            fact = f"has no {prefix}.experts.{missing}.{proj}, but later experts"
            raise CheckpointError(checkpoint.ref, fact, "the checkpoint is incomplete")
        tensors = tuple(found[n] for n in range(len(found)))
        roles = _roles(proj, parts)
        stores.append(Store(tensors=tensors, roles=roles, bias=bias, fused=False))
    return Block(prefix=prefix, stores=tuple(stores))


def _fused_block(
    checkpoint: Checkpoint, prefix: str, parts: Mapping[tuple[str, bool], TensorInfo]
) -> Block:
    inputs_first = _inputs_first(parts)
    interleaved = _interleaved(checkpoint.config, parts)
    stores = [
        Store(
            tensors=(tensor,),
            roles=ROLES[proj],
            bias=bias,
            fused=True,
            inputs_first=inputs_first and not bias,
            interleaved=interleaved and len(ROLES[proj]) > 1,
        )
        for (proj, bias), tensor in parts.items()
    ]
    return Block(prefix=prefix, stores=tuple(stores))


def _inputs_first(parts: Mapping[tuple[str, bool], TensorInfo]) -> bool:
    """Tell the axes apart: what gate and up put out, twice over, is what down takes in.

    Of [experts, a, b] and [experts, c, d] outputs come first where a = 2d, inputs where a = d.
    """
    weights = {ROLES[proj]: tensor.shape for (proj, bias), tensor in parts.items() if not bias}
    both, down = weights.get((GATE, UP)), weights.get((DOWN,))
    return both is not None and down is not None and both[1] == down[2]


def _interleaved(
    config: Mapping[str, Any] | None, parts: Mapping[tuple[str, bool], TensorInfo]
) -> bool:
    if config is None:  # a bare file: of those known, only the interleaved ones have a bias
        return ("gate_up_proj", True) in parts
    sections = [
        config,
        *(config[key] for key in TEXT_SECTIONS if isinstance(config.get(key), dict)),
    ]
    return any(section.get("model_type") in INTERLEAVED for section in sections)


def _checked(checkpoint: Checkpoint, block: Block) -> Block:
    def bad(fact: str) -> CheckpointError:
        told = f"{quoted(block.prefix)} {fact}"
        return CheckpointError(
            checkpoint.ref, told, "the checkpoint is damaged, or of another kind"
        )

    if len({store.experts for store in block.stores}) > 1:
        raise bad("has more experts of one kind than of another")
    up, down = block.find(UP, bias=False), block.find(DOWN, bias=False)
    if up is None or down is None:
        raise bad("has experts without up or down projection")
    if any(len({tensor.shape for tensor in store.tensors}) > 1 for store in block.stores):
        raise bad("has experts of several shapes")
    if up.shape != down.shape[::-1]:
        raise bad(f"has projections of {list(up.shape)} and {list(down.shape)}, which do not meet")
    return block
