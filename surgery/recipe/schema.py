"""What a recipe asks for, validated: the intent, before any model is opened."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.recipe.reader import Document
from surgery.recipe.settings import Settings

# Names of dtypes in recipes, and in files.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model as an input of a slice.

    Attributes:
        model: the reference as written.
        layers: first layer and the one behind the last; None for all of them.
    """

    model: str
    place: str
    layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Layers of the output, made of as many layers of each source."""

    sources: tuple[Source, ...]
    place: str
    base: str | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A part of a model, such as the text tower; `default` is all of it.

    Attributes:
        whole: written as `models`, each with all its layers, rather than as slices.
    """

    name: str
    place: str
    slices: tuple[Slice, ...]
    whole: bool
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSource:
    """Where the embedding of one token comes from.

    Attributes:
        kind: "model" (the same token of a model), "model_token" (another token of it), "zero";
            None leaves it to the rule.
        force: also for models that have the token.
    """

    kind: str | None = None
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerChoice:
    """Which vocabulary the output has.

    Attributes:
        source: "union", "base", or a model's reference.
        tokens: per token of the output where its embedding comes from.
        place: where it was written.
    """

    source: str
    place: str
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def models(self) -> Iterator[str]:
        """The models that it names."""
        if self.source not in ("union", "base"):
            yield self.source
        yield from (token.model for token in self.tokens.values() if token.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A merge.

    Attributes:
        name: what later documents of the file call the result.
        match_experts: put experts where the base has like ones before merging.
        dtype: what the peer would compute in; here it names the output's dtype only.
        notes: what was accepted and changes nothing.
        document: as it was written, for the record and for places.
    """

    method: str
    modules: tuple[Module, ...]
    document: Document
    base: str | None = None
    donor_model: str | None = None
    settings: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    match_experts: bool = False
    seed: int = 0
    name: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def slices(self) -> Iterator[tuple[Module, Slice]]:
        """Every slice with its module."""
        for module in self.modules:
            for slice_ in module.slices:
                yield module, slice_

    @property
    def donor(self) -> str:
        """The model that config, other towers and files come from.

        It is the one named as donor, else the base, else the first model.
        """
        if self.donor_model:
            return self.donor_model
        if self.base:
            return self.base
        bases = [slice_.base for _, slice_ in self.slices if slice_.base]
        return bases[0] if bases else next(s for _, s in self.slices).sources[0].model

    @property
    def models(self) -> tuple[str, ...]:
        """Every model named, once: the donor, then by first mention."""
        named = [self.donor]
        named += [source.model for _, slice_ in self.slices for source in slice_.sources]
        named += [slice_.base for _, slice_ in self.slices if slice_.base]
        named += list(self.tokenizer.models) if self.tokenizer else []
        return tuple(dict.fromkeys(named))

    @property
    def as_written(self) -> dict[str, Any]:
        """The document's own table."""
        return self.document.value
