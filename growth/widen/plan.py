"""Compile a widening to a plan: every tensor is a view of its old self."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from growth.dimensions import NORM, NORM_OF_ALL_HEADS, Axis, Dimensions, find_dimensions
from growth.resized import Mix, resized
from growth.widen.asked import check_asked, check_family, plan_widths, widths
from growth.widen.config import widened_config
from growth.widen.families import GEMMAS, TIED_UNTOLD
from growth.widen.maps import Widening, copies
from growth.widen.shares import split_inputs
from growth.widen.views import blended, gains_times
from surgery.anatomy import dig
from surgery.checkpoint import Checkpoint, TensorInfo
from surgery.errors import PlanError
from surgery.plan import Plan, Step, TensorSpec, check_plan

WHY = "widen"
EMBEDS = re.compile("embed", re.IGNORECASE)
WIDE = ("F32", "F64")


def widen(
    base: Checkpoint,
    *,
    factor: int | None = None,
    to: int | None = None,
    intermediate_size: int | None = None,
    method: Literal["fpi", "aki"] = "fpi",
    noise: float = 0.0,
    seed: int = 0,
) -> Plan:
    """Multiply a model's width, or grow it to a size, by copying its units.

    With `factor` n the residual stream becomes n copies of itself, heads and feed-forward units
    likewise; linear maps divide their inputs by n. The function stays the same, also with noise:
    what is added to the inputs of one copy is taken from the others.

    With `to`, units beyond the old width are copies of randomly chosen ones, whole heads with
    their key-value head, and inputs are divided by how often their unit was copied. Exact where
    all units of the stream are copied equally often; otherwise its norms see another mean square.

    Args:
        base: a decoder or BERT.
        factor: multiply all widths but those of a head.
        to: the new width of the residual stream.
        intermediate_size: of feed-forward layers, with `to`; grows in proportion by default.
        method: `aki` takes copies of outputs inside layers from the layer above, as they are there.
        noise: with `factor`, the standard deviation of copies' weights, of their size.
        seed: of choices and noise.

    Raises:
        RecipeError: a size that is none, or breaks heads.
        PlanError: an architecture whose widths are not known well enough.

    Source: HyperCloning, arXiv 2409.12903, section 3; LEMON, arXiv 2310.07999, section 4;
        bert2BERT, arXiv 2110.07143, sections 3.2 (FPI) and 3.3 (AKI). Deviations: noise is uniform
        and in proportion to each weight; random units are drawn without replacement, so that
        numbers of copies differ by one at most; the gains of the last norm carry the division
        where the head is the embedding.
    """
    check_asked(factor=factor, to=to, inner=intermediate_size, method=method, noise=noise)
    found = find_dimensions(base)
    check_family(base, found)
    options: dict[str, Any] = {"factor": factor, "to": to, "noise": noise, "seed": seed}
    how = plan_widths(found, inner=intermediate_size, method=method, **options)
    work = _Work(base, found, how)
    made = {name: work.widened(tensor) for name, tensor in base.tensors.items()}
    return check_plan(
        Plan(
            operation="widen",
            parameters=options | {"intermediate_size": intermediate_size, "method": method},
            sources=(base,),
            steps=tuple(_step(name, tensor) for name, tensor in made.items()),
            order=tuple(made),
            config=widened_config(dict(base.config or {}), found, how),
            carried=base.carried,
            facts={"widths": widths(found, how)},
            notes=(*base.notes, *work.notes()),
        )
    )


def _step(name: str, tensor: TensorInfo) -> Step:
    return Step(
        inputs=(tensor,),
        outputs=((name, TensorSpec(tensor.dtype, tensor.shape)),),
        why=getattr(tensor, "why", "copy"),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    base: Checkpoint
    found: Dimensions
    how: Widening

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding, as a head that is stored beside it may be."""
        parts, config = self.found.parts, self.base.config or {}
        if parts.head is None:
            return parts.tied or any("predictions." in name for name in self.base.tensors)
        text = dig(config, parts.section)
        told = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
        return self.found.heads.family in TIED_UNTOLD if told is None else bool(told)

    @property
    def root(self) -> float:
        """How much more the wider model multiplies its embedding by."""
        rooted = self.found.heads.family in GEMMAS
        return sqrt(self.how.ratios.get("hidden", 1)) if rooted else 1.0

    @property
    def tile(self) -> int:
        """Number of copies where all units have that many, else 0."""
        return int(self.how.ratios["hidden"]) if self.how.method == "tile" else 0

    def widened(self, tensor: TensorInfo) -> TensorInfo:
        """Return a tensor in its new shape."""
        parts, axes = self.found.parts, self.found.axes[tensor.name]
        layer = (parts.locate(tensor.name) or (None,))[0]
        if tensor.name == parts.embedding or (tensor.name == parts.head and self.tied):
            return self._embedding(tensor)
        if tensor.name.rpartition(".")[0] == self._last_norm():
            return self._gains(tensor)
        if self.how.method == "aki" and layer is not None:
            return self._advanced(tensor, layer)
        return self._plain(tensor, axes, layer)

    def _plain(
        self, tensor: TensorInfo, axes: tuple[Axis, ...], layer: int | None, *, own: int = 0
    ) -> TensorInfo:
        """Copy outputs and share inputs; with `own`, outputs are chosen as that many layers back.

        A power of two divides without rounding, and the shares may then be equal.
        """
        back = None if layer is None else layer - own
        sides = {"in": layer, "out": back}
        mixes = tuple(self.how.mix(axis, sides[axis.side]) for axis in axes)
        inputs = [n for n, axis in enumerate(axes) if axis.side == "in"]
        if not self.tile or not inputs or not (self.how.noise or self.tile & (self.tile - 1)):
            return resized(tensor, mixes, why=WHY)
        (axis,) = inputs
        return split_inputs(
            tensor,
            count=self.tile,
            inputs=axis,
            outputs=mixes[1 - axis],
            noise=self.how.noise,
            seed=self.how.seed,
        )

    def _stream(self) -> Mix | None:
        return self.how.mix(_stream_of(self.found), None)

    def _embedding(self, tensor: TensorInfo) -> TensorInfo:
        mix = self._stream()
        if mix is None:
            return tensor
        import numpy as np

        scaled = mix if self.root == 1 else mix.scaled(np.full(mix.size, 1 / self.root))
        return resized(tensor, (None, scaled), why=WHY)

    def _last_norm(self) -> str | None:
        """Return the module whose gains divide what a tied head adds up; None without one.

        Raises:
            PlanError: there is none, so that nothing can.
        """
        if not self.tied or "hidden" not in self.how.ratios:
            return None
        every = {n.rpartition(".")[0] for n in self.base.tensors if NORM.search(n)}
        outside = {n for n in every if self.found.parts.locate(f"{n}.weight") is None}
        before_head = {n for n in outside if "predictions.transform" in n}
        last = before_head or {n for n in outside if not EMBEDS.search(n.rpartition(".")[2])}
        last = {n for n in last if "embeddings." not in n}
        if len(last) != 1:
            fact = "ties its head to the embedding, and has no norm before it that could divide"
            raise PlanError(self.base.root / "config.json", fact)
        return last.pop()

    def _gains(self, tensor: TensorInfo) -> TensorInfo:
        """Divide by the number of copies, which the tied head adds up."""
        mix = self._stream()
        assert mix is not None  # noqa: S101 - or there is no last norm
        factors = self.root / copies(mix.sources[:, 0])
        if self.found.heads.family in GEMMAS:
            return gains_times(resized(tensor, (mix,), why=WHY), factors)
        if self.tile & (self.tile - 1):
            return split_inputs(tensor, count=self.tile, inputs=0)
        return resized(tensor, (mix.scaled(factors),), why=WHY)

    def _advanced(self, tensor: TensorInfo, layer: int) -> TensorInfo:
        """Take the copies among outputs from the next layer, where it has such a tensor."""
        axes = self.found.axes[tensor.name]
        plain = self._plain(tensor, axes, layer)
        rest = (self.found.parts.locate(tensor.name) or (0, ""))[1]
        other = self.base.tensors.get(self.found.parts.stack.name(layer + 1, rest))
        outs = [n for n, axis in enumerate(axes) if axis.side == "out"]
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            return plain
        mix = self.how.mix(axes[outs[0]], layer)
        if mix is None or NORM.search(rest) or layer + 1 >= self.found.parts.layers:
            return plain
        above = self._plain(other, self.found.axes[other.name], layer + 1, own=1)
        return blended(plain, above, axis=outs[0], flags=_repeated(axes[outs[0]], self.how))

    def notes(self) -> Iterator[str]:
        """Yield what the user should know."""
        stream = self._stream()
        if self.how.method == "aki":
            yield "copies from the next layer do not keep the function; training starts from them"
            return
        uneven = [] if stream is None else sorted(set(copies(stream.sources[:, 0]).tolist()))
        if len(uneven) > 1:
            yield (
                f"units of the stream are copied {uneven[0]} or {uneven[-1]} times: its norms see "
                "another mean square, so the function is near and not the same"
            )
        elif self.found.heads.family in NORM_OF_ALL_HEADS and self.how.method != "tile":
            yield "norms over all heads see another mean square if heads are copied unevenly"
        if self.how.noise:
            yield "the embedding's copies are alike; training sets them apart by what reads them"
        if self.how.method == "fpi" and max(uneven, default=1) > 2 and self._is_narrow():  # noqa: PLR2004
            yield "weights are divided by three or more copies and rounded to their dtype"
        if self._rounds():
            yield "the embedding's factor and the last norm's gains are rounded to their dtype"

    def _rounds(self) -> bool:
        return self.found.heads.family in GEMMAS and self.tied and self._is_narrow()

    def _is_narrow(self) -> bool:
        return self.base.tensors[self.found.parts.embedding or ""].dtype not in WIDE


def _stream_of(found: Dimensions) -> Axis:
    return found.axes[found.parts.embedding or ""][1]


def _repeated(axis: Axis, how: Widening) -> Any:  # noqa: ANN401 - an array of flags
    """Tell which new indices of an axis are copies: those beyond the old number of units."""
    import numpy as np

    flags = []
    for segment in axis.segments:
        size = how.size(segment.dimension, segment.units)
        flags.append(np.arange(size * segment.width) >= segment.units * segment.width)
    return np.concatenate(flags)
