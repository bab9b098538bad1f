"""Stands for flash-linear-attention where there is no GPU."""

from __future__ import annotations

import torch

B = 2


def recurrence(q, k, v, *, decay, beta, scale, state):
    """A token at a time in the package's layout: [b, t, h, width], decay [b, t, h, k or 1]."""
    b, _, h, wide = q.shape
    state = q.new_zeros(b, h, wide, v.shape[-1]) if state is None else state
    outs = []
    for i in range(q.shape[1]):
        state = state * decay[:, i].exp()[..., None]
        new = v[:, i]
        if beta is not None:
            new = (new - torch.einsum("bhk,bhkv->bhv", k[:, i], state)) * beta[:, i][..., None]
        state = state + k[:, i][..., None] * new[:, :, None]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, i] * scale, state))
    return torch.stack(outs, 1), state


class Package:
    """Stands for the package: every kernel by the names and arguments that it has there."""

    def __init__(self):
        self.called = []

    def kernel(self, name):
        def run(*, q, k, v, scale, initial_state, output_final_state, beta=None, **more):
            self.called.append(name)
            assert all(x.is_contiguous() and x.dtype == torch.float32 for x in (q, k, v))
            assert output_final_state
            if "linear_attn" in name:
                assert more.pop("normalize") is False
            decay = more.pop("gk" if name == "fused_recurrent_gla" else "g", None)
            assert not more
            decay = torch.zeros_like(q[..., 0]) if decay is None else decay
            decay = decay if decay.dim() == 4 else decay[..., None]
            assert (decay.shape[-1] > 1) == name.endswith(("chunk_gla", "recurrent_gla"))
            return recurrence(q, k, v, decay=decay, beta=beta, scale=scale, state=initial_state)

        return run


def drawn(*shape):
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=made)
