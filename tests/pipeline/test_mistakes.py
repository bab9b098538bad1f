"""A mistake anywhere in a pipeline file is said in one sentence before anything runs."""

from pathlib import Path

import pytest

from pipeline import bench

ONE = "steps:\n  x: {%s}\n"
CASES = [
    ("steps: []\n", "p.yml, line 1, steps: is no table of named steps"),
    ("steps: {}\n", "is no table of named steps"),
    ("steps:\n  x: 1\n", "steps.x: has no command"),
    (ONE % "base: a", "steps.x: has no command; write for instance command: stack"),
    (ONE % "command: stak, base: a", "'stak' is no command; did you mean stack?"),
    (ONE % "command: merge, models: [a]", "merge needs a further word; it has"),
    (ONE % "command: merge liner, models: [a]", "is no merge method; did you mean linear?"),
    (ONE % "command: stack deep, base: a", "stack has no command 'deep'"),
    (ONE % "command: demo", "neither writes a checkpoint nor measures"),
    (ONE % "command: stack, base: a, factr: 2", "stack has no option 'factr'; did you mean factor"),
    (ONE % "command: stack, base: a, factor: two", "stack: Invalid value for '--factor'"),
    (ONE % "command: stack, base: a, factor:", "steps.x.factor: has no value"),
    (ONE % "command: stack, factor: 2", "stack: Missing argument 'BASE'"),
    (ONE % "command: stack, base: [a, b], factor: 2", "takes one value, not 2"),
    (ONE % "command: stack, base: a, factor: 2, order: abba", "Invalid value for '--order'"),
    (ONE % "command: stack, base: a, factor: 2, verbose: 3", "3 is neither true nor false"),
    (ONE % "command: stack, base: a, factor: 2, output: y", "output is the pipeline's own"),
    (ONE % "command: stack, base: a, factor: 2, dry_run: true", "is the pipeline's own"),
    (ONE % "command: stack, base: a, factor: {a: 1}", "neither a value nor a list of values"),
    (ONE % "command: stack, base: a, factor: 2, keep: 1", "1 is neither true nor false"),
    (ONE % "command: stack, base: a, factor: 2, keep: false", "but no step uses its output"),
    (ONE % "command: verify, path: a, keep: false", "for steps that write a checkpoint"),
    (ONE % "command: stack, base: x, factor: 2", "steps.x: uses its own output"),
    (ONE % "command: stack, base: a", "exactly one of --factor, --dus and --map"),
    (ONE % "command: merge linear, models: [a], weight: 1, explain: true", "makes no checkpoints"),
    (ONE % "command: stack, base: nowhere, factor: 2", "step 'x', nowhere: does not exist"),
    (ONE % "command: run, file: p.yml", "is a pipeline, which is no step of another"),
    ("steps:\n  a: {command: stack, base: ./a, factor: 2}\n  y: {command: prune, base: a, "
     "layers: 0}\n", "'a' is both a step and a path; write ./a for the path"),
    ("steps:\n  x/y: {command: stack, base: a, factor: 2}\n", "'x/y' is no name for a step"),
    ("steps:\n  x: {command: stack, base: y, factor: 2}\n  y: {command: stack, base: a, "
     "factor: 2}\n", "uses 'y', which is defined only after it; move 'y' above 'x'"),
    ("steps:\n  x: {command: stack, base: a, factor: 2}\n  x: {command: verify, path: a}\n",
     "the key 'x' stands twice"),
    ("stps: {}\nsteps:\n  x: {command: stack, base: a, factor: 2}\n", "did you mean"),
    ("steps:\n  x: {command: stack, base: a, factor: 2}\n---\nsteps: {}\n", "more than one docu"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "told"), CASES, ids=[told[:40] for _, told in CASES])
def test_it_is_said_and_nothing_is_written(here: Path, capsys, text: str, told: str) -> None:
    bench.write(text)
    before = sorted(here.rglob("*"))
    said = bench.refused(capsys, code=1 if "does not exist" in told else 2)
    assert told in said.splitlines()[-1]
    assert said.count("surgery: ") == 1
    written = [p for p in sorted(here.rglob("*")) if p not in before]
    assert not [p for p in written if p.suffix in (".safetensors", ".json")] or all(
        ".surgery-pipeline" in str(p) for p in written
    )


def test_a_later_step_that_cannot_be_planned_stops_the_first(here: Path, capsys) -> None:
    bench.write(layers="99")
    assert "step 'shallow'" in bench.refused(capsys)
    assert not Path("p/soup").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--explain"], "--explain: is for recipes"),
        (["--weights", "x"], "--weights: is for one checkpoint"),
        (["--only", "nothing"], "is no step of the pipeline; there are soup, deep"),
        (["--memory", "lots"], "is not a size"),
    ],
)
def test_an_option_that_a_pipeline_has_no_use_for_is_refused(here, capsys, words, told) -> None:
    bench.write()
    assert told in bench.refused(capsys, *words)


def test_only_is_for_pipelines(here, capsys) -> None:
    bench.write("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n")
    assert "--only: is for pipelines" in bench.refused(capsys, "--only", "x")
