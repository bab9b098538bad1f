"""The forms of attention that benchmarks.attention compares, on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

Tensors = dict[str, Any]  # torch is loaded late
Call = Callable[[], Any]

GATES = {"linear": "", "linear, scalar gate": "scalar", "linear, vector gate": "vector"}
OURS = (*GATES, "window")
SOFTMAX, FLASH = "softmax (SDPA)", "softmax (flash-attn)"
KERNELS = {"fla linear": "linear", "fla scalar gate": "linear, scalar gate",
           "fla vector gate": "linear, vector gate"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of one layer."""

    heads: int
    kv_heads: int
    width: int
    window: int
    dtype: str
    device: str

    def kept(self, form: str, context: int) -> int:
        """Bytes of one row that decoding keeps."""
        sums = self.kv_heads * self.width**2 * 4
        shared = form not in KERNELS
        token = 2 * self.kv_heads * self.width * (4 if self.dtype == "float32" else 2)
        if form in {SOFTMAX, FLASH}:
            return context * token
        if form == "window":
            return (self.window - 1) * token
        return sums if shared else sums * self.heads // self.kv_heads


def forms(device: str) -> list[str]:
    """Those that can run here, torch's own first."""
    found = [SOFTMAX, *OURS]
    if device == "cuda":
        found += [FLASH] if find_spec("flash_attn") else []
        found += KERNELS if find_spec("fla") and find_spec("triton") else []
    return found


def inputs(sizes: Sizes, rows: int, t: int) -> Tensors:
    """Seeded queries, keys, values and gates, a gate of its own for every KV head."""
    import torch

    torch.manual_seed(0)
    kind: dict[str, Any] = {"dtype": getattr(torch, sizes.dtype), "device": sizes.device}
    h, r, d = sizes.kv_heads, sizes.heads // sizes.kv_heads, sizes.width
    q, k, v = (torch.randn(rows, h, n, t, d, **kind) for n in (r, 1, 1))
    scalar, vector = (-torch.rand(rows, h, 1, t, n, **kind) / 16 for n in (1, d))
    return {"q": q * d**-0.5, "k": k, "v": v, "scalar": scalar, "vector": vector}


def used(form: str, given: Tensors) -> Tensors:
    """The inputs of a form, in the order and layout that it takes."""
    gate = GATES.get(KERNELS.get(form, form))
    chosen = {name: given[name] for name in ("q", "k", "v", *([gate] if gate else []))}
    if form in {*KERNELS, FLASH}:
        chosen = {name: tokens_first(x) for name, x in chosen.items()}
    if form in KERNELS:  # one key for each query head
        r = given["q"].shape[2]
        chosen = {
            n: x if n == "q" else x.repeat_interleave(r, 2).contiguous() for n, x in chosen.items()
        }
        chosen = {n: x[..., 0] if n == "scalar" else x for n, x in chosen.items()}
    if form == SOFTMAX:
        copies = {} if given["q"].is_cuda else {"k": given["q"].shape[2], "v": given["q"].shape[2]}
        chosen = {n: x.expand(-1, -1, copies.get(n, -1), -1, -1).flatten(1, 2).contiguous()
                  for n, x in chosen.items()}  # fmt: skip
    return chosen


def tokens_first(x: Any) -> Any:  # noqa: ANN401
    """Shapes: [b, h, r, t, w] to [b, t, h r, w]."""
    return x.flatten(1, 2).transpose(1, 2).contiguous()


def heads_first(x: Any, kv_heads: int) -> Any:  # noqa: ANN401
    """Shapes: [b, t, h r, w] to [b, h, r, t, w]."""
    return x.transpose(1, 2).unflatten(1, (kv_heads, -1))


def attend(form: str, sizes: Sizes, x: Tensors) -> Any:  # noqa: ANN401
    """One pass over a whole sequence; the scale is in the queries."""
    import torch.nn.functional as F

    if form == SOFTMAX:
        grouped = sizes.device == "cuda"
        return F.scaled_dot_product_attention(*x.values(), is_causal=True, scale=1,
                                              enable_gqa=grouped)  # fmt: skip
    if form == FLASH:
        from flash_attn import flash_attn_func

        return flash_attn_func(*x.values(), causal=True, softmax_scale=1.0)
    if form in KERNELS:
        return kernel(form)(*x.values(), scale=1.0)[0]
    from surgery.models.linear_core import linear_attention, window_attention

    if form == "window":
        found = window_attention(*x.values(), window=sizes.window, scale=1)
        return found.num / found.den
    return linear_attention(*x.values())[0]


def kernel(form: str) -> Callable[..., Any]:
    """The chunked kernel of flash-linear-attention."""
    if form == "fla scalar gate":
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla
    if form == "fla vector gate":
        from fla.ops.gla import chunk_gla

        return chunk_gla
    from functools import partial

    from fla.ops.linear_attn import chunk_linear_attn

    return partial(chunk_linear_attn, normalize=False)


def decoder(form: str, sizes: Sizes, rows: int, context: int) -> Call | None:
    """A call that attends with one new token after `context` others; None where there is none.

    Softmax has its cache ready and full, appending to it is not counted, and the queries of a KV
    head are rows of one product; states go on from call to call.
    """
    import torch

    one = inputs(sizes, rows, 1)
    if form == SOFTMAX:
        h, d = sizes.kv_heads, sizes.width
        k, v = torch.randn(2, rows, h, context, d, dtype=one["q"].dtype, device=sizes.device)
        q = one["q"][..., 0, :]
        return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1)
    if form == FLASH or form in KERNELS:
        return fast_decoder(form, sizes, rows, context, one)
    from surgery.models.linear_core import State, linear_attention, window_attention

    if form == "window":
        k, v = (inputs(sizes, rows, sizes.window)[n] for n in "kv")
        near = {"window": sizes.window, "scale": 1, "lead": sizes.window - 1}
        return lambda: window_attention(one["q"], k, v, **near)
    shape = (rows, sizes.kv_heads, 1, sizes.width, sizes.width)
    docs = torch.zeros(rows, dtype=torch.long, device=sizes.device)
    held = [State(torch.zeros(shape, device=sizes.device), docs)]
    chosen = used(form, one)

    def step() -> Any:  # noqa: ANN401
        out, held[0] = linear_attention(*chosen.values(), state=held[0])
        return out

    return step


def fast_decoder(form: str, sizes: Sizes, rows: int, context: int, one: Tensors) -> Call | None:
    """The same with kernels that are made for it; of fla's, the one with a vector gate."""
    import torch

    if form == FLASH:
        from flash_attn import flash_attn_with_kvcache

        shape = (2, rows, context, sizes.kv_heads, sizes.width)
        k, v = torch.randn(*shape, dtype=one["q"].dtype, device=sizes.device)
        q = tokens_first(one["q"])
        return lambda: flash_attn_with_kvcache(q, k, v, softmax_scale=1.0)
    if form != "fla vector gate":
        return None
    from fla.ops.gla import fused_recurrent_gla

    q, k, v, gate = used(form, one).values()
    held = [torch.zeros(rows, sizes.heads, sizes.width, sizes.width, device=sizes.device)]

    def step() -> Any:  # noqa: ANN401
        out, held[0] = fused_recurrent_gla(
            q, k, v, gk=gate, scale=1.0, initial_state=held[0], output_final_state=True
        )
        return out

    return step
