"""How flash-linear-attention calls its recurrences, and their agreement with the torch forms.

Axis letters: b rows, h KV heads, r query heads a KV head, t tokens, k feature width, v value width.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, pad

from .linear_core import State, linear_attention
from .linear_delta import delta_rule

FORMAT = 1  # of what checkpoints hold; a change that old ones do not follow counts it up
TOKENS = 100  # of the texts that kernels are checked on: more than one chunk of 64, and a rest
OUTPUTS, GRADIENTS = 1e-2, 2e-2  # how far they may be off, as a share of the norm
TORCH = "take kernels torch"


class Kernel(NamedTuple):
    """Where the package has a recurrence, and how it calls the gate.

    Attributes:
        chunk, step: for texts, and for one token without gradients.
        gates: the argument of each for logarithms of gates.
    """

    place: str
    chunk: str
    step: str
    gates: tuple[str, str] = ("g", "g")
    more: Mapping[str, Any] = {}


FLA = {
    "none": Kernel(
        "fla.ops.linear_attn",
        "chunk_linear_attn",
        "fused_recurrent_linear_attn",
        more={"normalize": False},
    ),
    "scalar": Kernel("fla.ops.simple_gla", "chunk_simple_gla", "fused_recurrent_simple_gla"),
    "vector": Kernel("fla.ops.gla", "chunk_gla", "fused_recurrent_gla", ("g", "gk")),
    "delta": Kernel(
        "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"
    ),
}


class Given(NamedTuple):
    """What a recurrence is given: [b, h, r or 1, t, width]."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None
    beta: Tensor | None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Given":
        """Change every tensor."""
        return Given(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]

    @property
    def kind(self) -> str:
        """The key of `FLA` that computes it."""
        if self.beta is not None:
            return "delta"
        if self.gate is None:
            return "none"
        return "scalar" if self.gate.shape[-1] == 1 else "vector"

    @property
    def states(self) -> int:
        """How many states a KV head has."""
        return max(x.shape[2] for x in self[1:] if x is not None)


class Run(NamedTuple):
    """A kernel, with our layout around it."""

    kernel: Callable[..., tuple[Tensor, Tensor]]
    gate: str
    more: Mapping[str, Any]
    step: bool

    def __call__(self, given: Given, sums: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return [b, h, r, t, v] and the sums [b, h, r or 1, k, v], float32."""
        h, r, states = given.q.shape[1], given.q.shape[2], given.states
        # One state for r queries: they are r tokens, and all but the first write nothing.
        in_turn = self.step and states == 1
        with torch.autocast(given.q.device.type, enabled=False):
            given = given.each(lambda x: x.float().expand(-1, h, -1, -1, -1))
            laid = given.each(lambda x: _in_turn(x, r) if in_turn else _side_by_side(x, r))
            if sums is not None:
                shape = (-1, -1, 1 if in_turn else r, -1, -1)
                sums = sums.float().expand(shape).flatten(1, 2).contiguous()
            out, after = self.kernel(
                q=laid.q,
                k=laid.k,
                v=laid.v,
                **self._gates(laid),
                **self.more,
                scale=1.0,
                initial_state=sums,
                output_final_state=True,
            )
        if in_turn:
            return out.float().permute(0, 2, 1, 3)[:, :, :, None], after.float()[:, :, None]
        out = torch.unflatten(out.float(), 2, (h, r)).permute(0, 2, 3, 1, 4)
        return out, torch.unflatten(after.float(), 1, (h, r))[:, :, :states].contiguous()

    def _gates(self, laid: Given) -> dict[str, Tensor]:
        gates = {} if laid.gate is None else {self.gate: laid.gate}
        if laid.kind != "vector":
            gates = {name: gate[..., 0] for name, gate in gates.items()}
        return gates if laid.beta is None else {**gates, "beta": laid.beta[..., 0]}


def _side_by_side(x: Tensor, r: int) -> Tensor:
    """Shapes: [b, h, r or 1, t, w] to [b, t, h r, w]."""
    return x.expand(-1, -1, r, -1, -1).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def _in_turn(x: Tensor, r: int) -> Tensor:
    """Shapes: [b, h, r or 1, 1, w] to [b, r, h, w]; zeros where there is no own entry."""
    return pad(x[:, :, :, 0], (0, 0, 0, r - x.shape[2])).transpose(1, 2).contiguous()


_READY: dict[tuple[object, ...], Run] = {}  # what was checked, by kind and shape


def checked(given: Given) -> Run:
    """Return the kernel for what is given, once it agreed with the torch form."""
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    step = given.q.shape[3] == 1 and not trains
    shapes = tuple(None if x is None else (*x.shape[1:3], x.shape[-1]) for x in given)
    key = (given.kind, step, given.q.device, shapes)
    if key not in _READY:
        kernel = FLA[given.kind]
        name = kernel.step if step else kernel.chunk
        run = Run(_find(kernel.place, name), kernel.gates[step], kernel.more, step)
        _compare(name, run, given)
        _READY[key] = run
    return _READY[key]


def _find(place: str, name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    try:
        found: Callable[..., tuple[Tensor, Tensor]] = getattr(import_module(place), name)
    except (ImportError, AttributeError) as error:
        fact = f"the installed flash-linear-attention lacks {name} ({error})"
        raise ValueError(f"kernels fla: {fact}: {TORCH}") from error
    return found


def _compare(name: str, run: Run, given: Given) -> None:
    """Run both on random tensors of the same widths.

    Raises:
        ValueError: the kernel fails, or differs.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        sample, sums = _sample(given, 1 if run.step else TOKENS)
        expected = _results(_torch_form, sample, sums, gradients=not run.step)
        try:
            found = _results(run, sample, sums, gradients=not run.step)
        except Exception as error:
            fact = f"{name} does not run here ({type(error).__name__}: {error})"
            raise ValueError(f"kernels fla: {fact}: {TORCH}") from error
    for what, right in expected.items():
        off = float((found[what] - right).norm() / right.norm())
        most = OUTPUTS if what in {"out", "sums"} else GRADIENTS
        if not off <= most:  # so that NaN is refused
            fact = f"{name} differs from the torch form by {off:.2g} in {what}, {most} is allowed"
            raise ValueError(f"kernels fla: {fact}: {TORCH}")


def _sample(given: Given, t: int) -> tuple[Given, Tensor]:
    """Random inputs of those widths for one row, and sums of tokens before."""
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(given.q.device)

    q, k, v, gate, beta = given.each(lambda x: drawn(1, *x.shape[1:3], t, x.shape[-1]))
    gate = None if gate is None else logsigmoid(3 * gate)
    beta = None if beta is None else beta.sigmoid()
    sample = Given(normalize(q, dim=-1), normalize(k, dim=-1), v, gate, beta)
    sums = drawn(1, q.shape[1], given.states, q.shape[-1], v.shape[-1])
    return sample, sums


def _torch_form(given: Given, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, gate, beta = given
    state = None if sums is None else State(sums, torch.zeros_like(q[:, 0, 0, 0, 0]).long())
    if gate is None or beta is None:
        out, after = linear_attention(q, k, v, gate, state=state)
    else:
        out, after = delta_rule(q, k, v, gate, beta, state=state)
    return out, after.sums


def _results(
    run: "Run | Callable[[Given, Tensor | None], tuple[Tensor, Tensor]]",
    given: Given,
    sums: Tensor,
    *,
    gradients: bool,
) -> dict[str, Tensor]:
    """Outputs and sums, and how weighted totals of them depend on what was given."""
    given = given.each(lambda x: x.detach().requires_grad_(gradients))
    sums = sums.detach().requires_grad_(gradients)
    out, after = run(given, sums)
    found = {"out": out.detach(), "sums": after.detach()}
    if gradients:
        total = (out * _waves(out)).sum() + (after * _waves(after)).sum()
        names = {**given._asdict(), "state": sums}
        asked = {f"the gradient of {n}": x for n, x in names.items() if x is not None}
        found |= zip(asked, torch.autograd.grad(total, list(asked.values())), strict=True)
    return found


def _waves(x: Tensor) -> Tensor:
    """Weights that differ from entry to entry."""
    return torch.arange(x.numel(), device=x.device, dtype=x.dtype).cos().view(x.shape)
