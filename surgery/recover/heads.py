"""The last linear map of a language model, and the states that go into it.

Axis letters: b rows of a batch, t tokens of a row, n scored tokens, d width, v vocabulary.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import RecipeError, TrainError

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
NORMS = ("norm", "final_layernorm", "ln_f", "final_norm", "norm_f", "layer_norm")
PROBED = 60.0  # logits from minus to plus this; caps bend them, whatever a model usually says
TOLERANCE = 0.02  # of the largest; logits may be rounded to bfloat16 on their way


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits of hidden states: `cap(scale * (weight @ h + bias))`.

    `cap(x)` is `softcap * tanh(x / softcap)` where there is a soft-cap, and `x` elsewhere.

    Attributes:
        weight: [v, d]; the model's own parameter, so that a tied one collects both gradients.
        bias: [v].
        softcap: bound of the logits.
        scale: factor of the logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return self.weight.shape[0]

    def logits(self, hidden_nd: Tensor) -> Tensor:
        """Return all logits, [n, v]: for few tokens and for tests."""
        raw = nn.functional.linear(hidden_nd, self.weight, self.bias)
        return self.bent(raw)

    def bent(self, raw: Tensor) -> Tensor:
        """Return what scale and soft-cap make of the linear map's outputs."""
        scaled = raw if self.scale == 1 else raw * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def detached(self) -> "Head":
        """Return the same head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def renewed(self, model: nn.Module) -> "Head":
        """Return the head with the parameters that the model holds now: sharding changes them."""
        linear = _linear(model)
        return replace(self, weight=linear.weight, bias=linear.bias)


@dataclass(frozen=True, slots=True)
class States:
    """What a forward pass leaves for the losses.

    Attributes:
        hidden: what the head gets, [n, d].
        layers: after each decoder layer, [n, d] each; empty unless asked for.
        loops: what the head would get after each loop but the last, [n, d] each; likewise.
    """

    hidden: Tensor
    layers: tuple[Tensor, ...] = ()
    loops: tuple[Tensor, ...] = ()


def head_of(model: nn.Module) -> Head:
    """Read the head of a causal language model of transformers, before it is sharded.

    What the model does to the outputs of its last linear map is measured: it is run over two
    tokens with known numbers in their place. Scales and soft-caps that its config names are
    recognised.

    Raises:
        TrainError: the model has no plain linear head, or does something else to the logits.
    """
    linear = _linear(model)
    raw = torch.linspace(-PROBED, PROBED, 2 * linear.weight.shape[0], device=linear.weight.device)
    raw_btv = raw.view(1, 2, -1)
    found = _probe(model, raw_btv).float()
    heads = [Head(linear.weight, linear.bias, cap, scale) for scale, cap in _candidates(model)]
    if found.shape == raw_btv.shape:
        errors = [_error(found, head.bent(raw_btv)) for head in heads]
        if min(errors) <= TOLERANCE:
            return heads[errors.index(min(errors))]
    fact = "does to its logits what is not known here, neither a scale nor a soft-cap"
    raise TrainError(_name(model), fact, "it cannot be trained on parts of its logits")


def states_of(
    model: nn.Module,
    inputs: Mapping[str, Any],
    keep_bt: Tensor | None = None,
    *,
    layers: bool = False,
    loops: bool = False,
) -> States:
    """Run a model up to its head, and return the states of its tokens, row after row.

    Args:
        model: a causal language model; its head does not run.
        inputs: `input_ids`, `position_ids` and what else it takes.
        keep_bt: which tokens to return, booleans; None for all.
        layers: also after each layer.
        loops: also after each loop of a recursive model.

    Raises:
        RecipeError: `loops` of a model whose early exits are not defined.
    """
    if loops:
        check_exits(model)
    asked: dict[str, Any] = {"output_hidden_states": True} if layers else {}
    asked |= {"output_loop_states": True} if loops else {}
    with _headless(model) as seen:
        output = model(**inputs, use_cache=False, **asked)
    (hidden_btd,) = seen
    norm = _final_norm(model) if loops else None
    return States(
        _taken(hidden_btd, keep_bt),
        tuple(_taken(x, keep_bt) for x in output.hidden_states[1:]) if layers else (),
        tuple(norm(_taken(x, keep_bt)) for x in output.loop_states[:-1]) if norm else (),
    )


def _taken(states_btd: Tensor, keep_bt: Tensor | None) -> Tensor:
    return states_btd.flatten(0, 1) if keep_bt is None else states_btd[keep_bt]


def check_exits(model: nn.Module) -> None:
    """Refuse early exits where a loop's state is not what the head gets when that loop is last.

    Raises:
        RecipeError: the model has no loops, or layers follow them.
    """
    uses: Sequence[int] = getattr(model.config, "layer_map", None) or ()
    if len(set(uses)) == len(uses):
        raise RecipeError("--loss early_exit", "the student has no loops", "leave it out")
    if uses.count(uses[-1]) == 1:
        fact = "layers follow the student's loops, so that no loop ends at the head"
        raise RecipeError("--loss early_exit", fact, "leave it out")


def check_vocabularies(student: Head, teacher: Head, name: object) -> None:
    """Refuse a teacher that speaks of other tokens.

    Raises:
        RecipeError: the logits differ in width.
    """
    mine, theirs = student.vocabulary, teacher.vocabulary
    if mine != theirs:
        fact = f"has logits for {theirs} tokens, the student for {mine}"
        raise RecipeError(name, fact, "a teacher needs the student's vocabulary")


def _linear(model: Any) -> nn.Linear:  # noqa: ANN401 - transformers' or peft's
    found = model.get_output_embeddings()
    saved = getattr(found, "modules_to_save", None)  # peft's copy of a module that trains whole
    if saved is not None:
        (found,) = saved.values()
    if type(found) is not nn.Linear:
        fact = f"has no plain linear head ({type(found).__name__})"
        raise TrainError(_name(model), fact, "leave the head out of adapters and quantisation")
    return found


def _candidates(model: Any) -> Iterator[tuple[float, float | None]]:  # noqa: ANN401
    config = model.config
    held = (config, config.get_text_config(decoder=True))
    caps, factors = ([float(v) for v in _told(held, names)] for names in (CAPS, FACTORS))
    return product((1.0, *factors, *(1 / factor for factor in factors)), (None, *caps))


def _told(configs: Sequence[object], names: Sequence[str]) -> Iterator[float]:
    for config, name in product(configs, names):
        if value := getattr(config, name, None):
            yield value


@torch.no_grad()
def _probe(model: Any, raw_btv: Tensor) -> Tensor:  # noqa: ANN401
    ids = torch.zeros((1, 2), dtype=torch.int64, device=raw_btv.device)
    was = model.training
    model.eval()
    try:
        with _replaced(model, lambda _: raw_btv):
            found: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was)
    return found


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@contextmanager
def _headless(model: nn.Module) -> Iterator[list[Tensor]]:
    """Let the head keep its input and return nothing of size, for one forward pass."""
    seen: list[Tensor] = []

    def keep(hidden_btd: Tensor) -> Tensor:
        seen.append(hidden_btd)
        return hidden_btd.new_zeros((*hidden_btd.shape[:-1], 1))

    with _replaced(model, keep):
        yield seen


@contextmanager
def _replaced(model: Any, forward: Any) -> Iterator[None]:  # noqa: ANN401
    module = model.get_output_embeddings()
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _final_norm(model: Any) -> nn.Module:  # noqa: ANN401
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    trunk = getattr(inner, inner.base_model_prefix)
    for name in NORMS:
        if isinstance(norm := getattr(trunk, name, None), nn.Module):
            return norm
    raise TrainError(_name(model), "has no last norm that is known here", "leave out early_exit")


def _name(model: Any) -> str:  # noqa: ANN401
    return str(getattr(model.config, "name_or_path", "") or type(model).__name__)


def accepts_positions(model: nn.Module) -> bool:
    """Tell whether a model takes `position_ids`, which keep packed documents apart."""
    return "position_ids" in inspect.signature(model.forward).parameters
