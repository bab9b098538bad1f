"""How far a student's distribution is from a teacher's, and which way is down.

Axis letters: n tokens, m outcomes: the whole vocabulary, or the teacher's k likeliest tokens and
one more outcome for all the rest. Every divergence here is an f-divergence, so over fewer
outcomes it is a lower bound of what it is over all of them (data processing inequality).
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

BETA = 0.5  # of the Jensen-Shannon divergence: the plain, symmetric one

Divergence = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(
    logq_nm: Tensor, logp_nm: Tensor, q_nm: Tensor, p_nm: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(p || q) of teacher p and student q: sum of p (log p - log q).

    Returns:
        The divergence of each token, [n], in nats, and its derivative by log q, [n, m].

    Source: Hinton et al., arXiv 1503.02531, section 2; Minitron, arXiv 2407.14679, section 3.
    """
    del q_nm
    return (logp_nm - logq_nm).mul_(p_nm).sum(-1), -p_nm


def reverse_kl(
    logq_nm: Tensor, logp_nm: Tensor, q_nm: Tensor, p_nm: Tensor
) -> tuple[Tensor, Tensor]:
    """KL(q || p) of teacher p and student q: sum of q (log q - log p).

    Returns:
        As `forward_kl`.

    Source: MiniLLM, arXiv 2306.08543, section 2.1, for single tokens of given text instead of
    whole sampled answers.
    """
    del p_nm
    gap = logq_nm - logp_nm
    return (q_nm * gap).sum(-1), gap.add_(1).mul_(q_nm)


def jensen_shannon(
    logq_nm: Tensor, logp_nm: Tensor, q_nm: Tensor, p_nm: Tensor
) -> tuple[Tensor, Tensor]:
    """B KL(p || m) + (1 - B) KL(q || m), with m = B p + (1 - B) q and B = 1/2.

    Returns:
        As `forward_kl`.

    Source: GKD, arXiv 2306.13649, equation 1.
    """
    # log m from the logarithms: where both underflow, the ratio is still known.
    logm = torch.logaddexp(logp_nm, logq_nm).add_(math.log(BETA))
    gap = logq_nm - logm
    value = BETA * (p_nm * (logp_nm - logm)).sum(-1) + (1 - BETA) * (q_nm * gap).sum(-1)
    return value, gap.mul_(q_nm).mul_(1 - BETA)


def total_variation(
    logq_nm: Tensor, logp_nm: Tensor, q_nm: Tensor, p_nm: Tensor
) -> tuple[Tensor, Tensor]:
    """Half the sum of |p - q|; at p = q the derivative is taken as zero.

    Returns:
        As `forward_kl`.

    Source: Wen et al., "f-divergence minimization for sequence-level knowledge distillation",
    arXiv 2307.15190, section 3.
    """
    del logq_nm, logp_nm
    gap = q_nm - p_nm
    return gap.abs().sum(-1) / 2, gap.sign_().mul_(q_nm).div_(2)


DIVERGENCES: Mapping[str, Divergence] = {
    "kl": forward_kl,
    "rkl": reverse_kl,
    "jsd": jensen_shannon,
    "tvd": total_variation,
}
