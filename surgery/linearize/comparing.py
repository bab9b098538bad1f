"""One pass through the layers: every linear one beside the softmax attention that it was.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, s keys, d head width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.models.linear_layer import converted, set_mode
from surgery.models.linear_seen import Seen

LEAST = 1e-12  # below it a weight counts as that, in logarithms
Each = Callable[[int, "Pair"], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """Outputs of one layer for the same input.

    Attributes:
        student, teacher: [b, t, heads * d], before the output projection; the teacher's has no
            gradient.
        keep: bool [b, t], which tokens are no padding.
        module: the attention of the layer.
        seen: what its mixer got.
    """

    student: Tensor
    teacher: Tensor
    keep: Tensor
    module: Any
    seen: Seen


class _Reached(Exception):
    """The pass is where it should end."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def decoder_of(model: Any) -> Any:  # noqa: ANN401 - a transformers model
    """Return the part of a model that has the layers."""
    return getattr(model, model.base_model_prefix)


def pass_through(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    each: Each | None,
    end: int,
) -> Tensor:
    """Run the teacher up to a layer; return [b, t, hidden], what that layer would get.

    The head never runs, and no graph leads from one layer to the next: what `each` does with a
    layer is done, and can be dropped, before the next layer begins.

    Args:
        inputs: of the decoder: `input_ids` or `inputs_embeds`, and `position_ids`.
        each: is given every converted layer on the way; None for the teacher alone.
        end: number of the layer that does not run; the count of layers for none.
    """
    decoder = decoder_of(model)
    after = decoder.layers[end] if end < len(decoder.layers) else decoder.norm
    try:
        with _hooks(model, after, each):
            decoder(**inputs, use_cache=False)
    except _Reached as reached:
        return reached.hidden.detach()
    raise RuntimeError(f"the forward pass does not get to layer {end}")


@contextmanager
def _hooks(model: nn.Module, after: nn.Module, each: Each | None) -> Iterator[None]:
    """Compare, or run the teacher alone, and stop where it should; leave the model as it was."""
    modules, training = converted(model), model.training
    model.eval()  # dropout would give another teacher every time
    set_mode(model, "teacher" if each is None else "compare")
    handles = [after.register_forward_pre_hook(_stop, prepend=True, with_kwargs=True)]
    if each is not None:
        for layer, module in modules.items():
            handles += _watch(layer, module, each)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        set_mode(model, "linear")
        model.train(training)


def _stop(_: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    raise _Reached(given[0] if given else named["hidden_states"])


def _watch(layer: int, module: Any, each: Each) -> Iterator[Any]:  # noqa: ANN401
    seen: list[Seen] = []

    def note(_: nn.Module, given: tuple[Seen, ...]) -> None:
        seen.append(given[0])

    def tell(*_: object) -> None:
        found, module.compared = module.compared, None
        each(layer, Pair(found.student, found.teacher, found.keep, module, seen.pop()))

    yield module.mixer.register_forward_pre_hook(note)
    yield module.register_forward_hook(tell)


def relative_error(pair: Pair) -> Tensor:
    """Return the mean square of the difference over the teacher's variance, in at least float32.

    The variance of every channel is over the kept tokens; 1 is what their mean would cost.

    Source: LoLCATs, arXiv 2410.10254, attention transfer: 1000 times the mean square of outputs
    before their projection, in its code. Deviation: one over the variance stands for the 1000, so
    that layers of large outputs (its errors of layers of one model are from 0.02 to 48.7) do not
    count for more.
    """
    student, teacher = (_exact(x)[pair.keep] for x in (pair.student, pair.teacher))
    spread = (teacher - teacher.mean(0)).square().mean()
    error = (student - teacher).square().mean()
    return error / spread.clamp(min=torch.finfo(spread.dtype).tiny)


def attention_entropy(pair: Pair) -> Tensor:
    """Return the mean over tokens and heads of the cross-entropy of attention weights, in nats.

    A mixer's output is linear in the values, so that values of the identity give its weights.
    Quadratic in the tokens of a row.

    Source: LoLCATs, arXiv 2410.10254, the cross-entropy part of attention transfer; its code has
    it as `xent_factor`, 0 by default.
    """
    seen, shape = pair.seen, pair.module.mixer.shape
    b, h, r, t, _ = seen.q.shape
    unit = torch.eye(t, dtype=seen.v.dtype, device=seen.v.device).expand(b, h, 1, t, t)
    given = Seen(
        x=seen.x, q=seen.q, k=seen.k, v=unit, q_rope=seen.q_rope, k_rope=seen.k_rope, docs=seen.docs
    )
    mixed: Tensor = pair.module.mixer.forward(given, None)
    student = _exact(mixed).view(b, t, h * r, t).transpose(1, 2)
    teacher = _weights(pair, shape.scale).view(b, h * r, t, t)
    cost = -(teacher * student.clamp(min=LEAST).log()).sum(-1)
    return cost.transpose(1, 2)[pair.keep].mean()


@torch.no_grad()
def _weights(pair: Pair, scale: float) -> Tensor:
    """Return the weights of softmax attention, [b, h, r, t, s]."""
    seen = pair.seen
    scores = _exact(seen.q_rope) @ _exact(seen.k_rope).transpose(-1, -2) * scale
    t = scores.shape[-1]
    places = torch.arange(t, device=scores.device)
    distance = places[:, None] - places
    window = getattr(pair.module, "sliding_window", None) or t
    visible = (distance >= 0) & (distance < window)
    if seen.docs is not None:
        same = seen.docs[:, :, None] == seen.docs[:, None, :]
        visible = (visible & same)[:, None, None]
    return scores.masked_fill(~visible, float("-inf")).softmax(-1)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
