"""What models write behind the same prompts, always the likeliest token, and how they repeat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from surgery.errors import TrainError
from surgery.evaluate.documents import Document
from surgery.evaluate.load import Loaded, Source, first_line

if TYPE_CHECKING:
    import torch

NEW_TOKENS = 64
_PROMPT = 200  # characters at most
_GRAM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What a model goes on with behind the beginning of a document.

    Attributes:
        document: The document.
        prompt: Its beginning, which is what the model was given.
        text: What the model wrote, without special tokens.
        tokens: How many tokens that took.
        repetition: Share of its 4-grams of tokens that it had written before; None below four
            tokens.
    """

    document: str
    prompt: str
    text: str
    tokens: int
    repetition: float | None


def repetition(ids: Sequence[int], *, gram: int = _GRAM) -> float | None:
    """Return 1 - distinct n-grams / n-grams; None where there is no n-gram.

    Source: Welleck et al., "Neural Text Generation with Unlikelihood Training", 2019, arXiv
    1908.04319, section 6, the metric seq-rep-n.
    """
    grams = [tuple(ids[i : i + gram]) for i in range(len(ids) - gram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def prompts(documents: Sequence[Document], count: int) -> list[tuple[str, str]]:
    """Return names and beginnings of `count` documents, spread evenly.

    A beginning is the first half of the text, 200 characters at most, cut behind a space where
    there is one.
    """
    places = np.linspace(0, len(documents) - 1, min(count, len(documents))).round().astype(int)
    return [(documents[i].name, _beginning(documents[i].text)) for i in places]


def _beginning(text: str) -> str:
    head = text[: min(_PROMPT, -(-len(text) // 2))]
    kept, space, _ = head.rpartition(" ")
    return kept if space and kept.strip() else head


def write_samples(
    loaded: Loaded, source: Source, given: Sequence[tuple[str, str]], *, context: int
) -> tuple[Sample, ...]:
    """Let a model go on behind each prompt for up to 64 tokens.

    The prompt is cut on the left where prompt and answer together exceed the context.

    Raises:
        TrainError: The model cannot generate.
    """
    return tuple(_sample(loaded, source, name, prompt, context=context) for name, prompt in given)


def _sample(loaded: Loaded, source: Source, name: str, prompt: str, *, context: int) -> Sample:
    import torch

    tokenizer, mark = source.tokenizer, source.mark
    new = min(NEW_TOKENS, max(1, context // 2))
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    head = [] if mark.token is None else [mark.token]
    kept = ids[-max(1, context - new - len(head)) :]
    row = torch.tensor([[*head, *kept]], dtype=torch.long, device=loaded.device)
    written = _greedy(loaded, row, new)
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return Sample(
        document=name, prompt=prompt, text=text, tokens=len(written), repetition=repetition(written)
    )


def _greedy(loaded: Loaded, row: "torch.Tensor", new: int) -> list[int]:
    import torch

    own = loaded.model.generation_config
    end = own.eos_token_id if own is not None else None
    asked = {"max_new_tokens": new, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    pad = end[0] if isinstance(end, list) else end
    try:
        with torch.inference_mode():
            out = loaded.model.generate(
                row, attention_mask=torch.ones_like(row), pad_token_id=pad or 0, **asked
            )
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        fact = f"cannot generate text ({first_line(error)})"
        raise TrainError(loaded.path, fact, "leave --samples out") from error
    ids: list[int] = out[0, row.shape[1] :].tolist()
    return ids
