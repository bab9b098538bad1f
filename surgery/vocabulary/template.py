"""Which chat template an output has: kept, a named one, a model's, or as written."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from surgery.checkpoint import Checkpoint
from surgery.checkpoint.jsonfile import read_json_object, read_small_file
from surgery.errors import RecipeError
from surgery.vocabulary.builtin_templates import BUILTIN

FILE = "chat_template.jinja"
# Where else a template may stand; a new one takes the place of these.
TEMPLATE_FILES = (FILE, "chat_template.json")
PLACE = "chat_template"


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template, and by which rule it was chosen; `text` is None where there is none."""

    text: str | None
    rule: str


def find_template(checkpoint: Checkpoint) -> str | None:
    """Return the chat template of a checkpoint, wherever it is kept: its default one."""
    here = {path.name: path for path in checkpoint.carried}
    if FILE in here:
        return read_small_file(here[FILE]).decode("utf-8", "replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        held = read_json_object(here[name]).get("chat_template") if name in here else None
        if isinstance(held, list):
            held = {e.get("name"): e.get("template") for e in held if isinstance(e, dict)}
            held = held.get("default")
        if isinstance(held, str):
            return held
    return None


def choose_template(choice: str, models: Sequence[Checkpoint], names: Sequence[str]) -> Template:
    """Return the template that a recipe asks for.

    Args:
        choice: `auto` (the one that most models have, of several the first), the name of a
            built-in one, the name of a model, or Jinja.
        names: how the recipe calls each model.

    Raises:
        RecipeError: no such name, a model without a template, or Jinja that does not parse.
    """
    if choice == "auto":
        return _most(models, names)
    if choice in BUILTIN:
        return Template(BUILTIN[choice], f"built-in {choice}")
    if choice in names:
        found = find_template(models[list(names).index(choice)])
        if found is None:
            raise RecipeError(PLACE, f"{choice} has no chat template", "name another model")
        return Template(found, f"that of {choice}")
    if "{{" in choice or "{%" in choice:
        return Template(_checked(choice), "as written in the recipe")
    known = ["auto", *BUILTIN, *names]
    close = get_close_matches(choice, known, 1)
    remedy = f"did you mean {close[0]!r}?" if close else f"choose {', '.join(known)}, or Jinja"
    raise RecipeError(PLACE, f"{choice!r} is no template", remedy)


def _most(models: Sequence[Checkpoint], names: Sequence[str]) -> Template:
    texts = [find_template(model) for model in models]
    counts = Counter(text for text in texts if text is not None)
    if not counts:
        return Template(None, "auto: no model has one")
    text, count = counts.most_common(1)[0]
    return Template(
        text, f"auto: that of {names[texts.index(text)]}, which {count} of {len(texts)} have"
    )


def _checked(text: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)  # noqa: S701 - parsed only
    except TemplateSyntaxError as error:
        fact = f"is no Jinja (line {error.lineno}: {error.message})"
        raise RecipeError(PLACE, fact, "correct the template") from error
    return text


def template_files(text: str, settings: Mapping[str, Any], names: Set[str]) -> dict[str, bytes]:
    """Return the files that hold a new template.

    It goes into chat_template.jinja, which transformers reads first; the key that older versions
    read is taken out of tokenizer_config.json, and a processor's own copy is replaced.

    Args:
        settings: tokenizer_config.json as it is.
        names: files that there are.
    """
    files = {FILE: text.encode()}
    if "chat_template" in settings:
        kept = {key: value for key, value in settings.items() if key != "chat_template"}
        files["tokenizer_config.json"] = _pretty(kept)
    if "chat_template.json" in names:
        files["chat_template.json"] = _pretty({"chat_template": text})
    return files


def _pretty(document: object) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
