"""Losses on hidden states: which layers answer to which, and how far they are apart.

Axis letters: n scored tokens, d width.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.errors import RecipeError
from surgery.recover.fused import TeacherHidden


def layer_map(student: int, teacher: int) -> list[int]:
    """Return for each layer of the student the teacher's layer that it is compared with, from 0.

    Models of one depth go by number. Else layer i of l (from 1) has the teacher's layer
    round(i L / l), so that the last has the last.

    Raises:
        RecipeError: one of them has no layers.

    Source: MiniLM-like even spacing, as TinyBERT, arXiv 1909.10351, section 3.1 (g(m) = 3 m).
    """
    if student < 1 or teacher < 1:
        raise RecipeError("--loss", "hidden states of a model without layers are asked for")
    return [max((2 * i * teacher + student) // (2 * student), 1) - 1 for i in range(1, student + 1)]


def make_projector(student: int, teacher: int) -> nn.Linear:
    """Return a linear map from the student's width to the teacher's, to be trained along.

    It starts as the identity on the widths that both have.

    Raises:
        RecipeError: the widths are one, so that states can be compared as they are.
    """
    if student == teacher:
        fact = f"is of no use: student and teacher are both {student} wide"
        raise RecipeError("a projector", fact, "compare the states as they are")
    made = nn.Linear(student, teacher, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.eye(teacher, student))
    return made


def mse(mine_nd: Tensor, theirs_nd: Tensor) -> Tensor:
    """Return the sum over tokens of the mean square of the difference, in at least float32.

    Source: TinyBERT, arXiv 1909.10351, equation 8, for the mean over the width.
    """
    mine_nd, theirs_nd = _exact(mine_nd), _exact(theirs_nd)
    return (mine_nd - theirs_nd).square().mean(-1).sum()


def cosine(mine_nd: Tensor, theirs_nd: Tensor) -> Tensor:
    """Return the sum over tokens of one minus the cosine, in at least float32.

    Source: DistilBERT, arXiv 1910.01108, section 3.
    """
    mine_nd, theirs_nd = _exact(mine_nd), _exact(theirs_nd)
    return (1 - nn.functional.cosine_similarity(mine_nd, theirs_nd, dim=-1)).sum()


HIDDEN = {"hidden_mse": mse, "hidden_cos": cosine}


def hidden_losses(
    names: Sequence[str],
    last_nd: Tensor,
    layers: Sequence[Tensor],
    teacher: TeacherHidden,
    scored: Tensor,
    *,
    projector: nn.Module | None,
) -> Mapping[str, Tensor]:
    """Return each loss, a sum over scored tokens and a mean over the pairs of layers.

    Where both models give the states after their layers, those are compared by `layer_map`;
    else what goes into the heads.

    Raises:
        RecipeError: the widths differ and nothing maps one on the other, or a projector is given
            where they do not.
    """
    pairs = [(last_nd, teacher.hidden)]
    if layers and teacher.layers:
        chosen = layer_map(len(layers), len(teacher.layers))
        pairs = [(mine, teacher.layers[at]) for mine, at in zip(layers, chosen, strict=True)]
    check_widths(pairs[0][0].shape[-1], pairs[0][1].shape[-1], projected=projector is not None)
    sums = {name: last_nd.new_zeros((), dtype=_exact(last_nd[:0]).dtype) for name in names}
    for mine, theirs in pairs:
        seen = mine[scored] if projector is None else projector(mine[scored])
        for name in names:
            sums[name] = sums[name] + HIDDEN[name](seen, theirs[scored].detach()) / len(pairs)
    return sums


def check_widths(student: int, teacher: int, *, projected: bool) -> None:
    """Refuse states of two widths without a projector, and of one width with it.

    Raises:
        RecipeError: either.
    """
    if student != teacher and not projected:
        fact = f"compares states of width {student} with the teacher's of {teacher}"
        raise RecipeError("--loss hidden", fact, "compare logits: kl, rkl, jsd, tvd")
    if student == teacher and projected:
        fact = f"is of no use: student and teacher are both {student} wide"
        raise RecipeError("a projector", fact, "compare the states as they are")


def _exact(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
