"""The example of the guide is a pipeline whose every command and option there is."""

import re
from pathlib import Path

from cli.steps import read_steps
from surgery.pipeline import check_order
from surgery.recipe.reader import parse_documents

GUIDE = Path(__file__).parents[2] / "docs" / "pipeline.md"


def test_the_guides_example_is_sound() -> None:
    text = re.search(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    (document,) = parse_documents(text, source="build.yml")
    steps = read_steps(document)
    uses = {step.name: step.uses for step in steps}
    check_order(uses)
    assert uses == {"soup": (), "deep": ("soup",), "merged": (), "score": ("deep", "merged")}


def test_the_guides_program_runs(here: Path, monkeypatch) -> None:
    """With small models in place of its own, and nothing measured."""
    code = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
    Path("a").rename("base")
    monkeypatch.setattr("surgery.evaluate.evaluate", lambda *_: {"bits": 1})
    names: dict = {}
    exec(compile(code, str(GUIDE), "exec"), names)
    assert names["deep"] == Path("build/deep")
    assert names["scores"] == {"bits": 1}
