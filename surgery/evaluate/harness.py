"""Tasks of lm-evaluation-harness, run in this process on a model that is already loaded."""

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, RecipeError, TrainError
from surgery.evaluate.choices import read_questions
from surgery.evaluate.load import Loaded, first_line
from surgery.evaluate.tasks import Outcome, numbered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = {".yaml", ".yml", ".jsonl"}
# What stands for a task where the harness gives several figures, the first that it has.
_FIRST = ("acc", "exact_match", "f1", "bits_per_byte", "word_perplexity", "perplexity")


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse tasks that cannot be run, before a model is loaded.

    Raises:
        RecipeError: The harness is not installed, or a task is named twice.
        CheckpointError: A file is missing, or its lines are no questions.
    """
    for place, task in enumerate(tasks):
        if task in tasks[:place]:
            raise RecipeError("--task", f"{task} is named twice", "name each task once")
    files = [Path(task) for task in tasks if Path(task).suffix in _FILES]
    for path in files:
        if not path.is_file():
            raise CheckpointError(path, "no such file or directory", "name a task or its file")
    read_questions([path for path in files if path.suffix == ".jsonl"])
    if tasks and find_spec("lm_eval") is None:
        remedy = "pip install 'model-surgery[eval]', or give questions to --pairs"
        raise RecipeError("--task", "lm-evaluation-harness is not installed", remedy)


def run_tasks(
    loaded: Loaded,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    context: int,
    batch_tokens: int,
    seed: int,
) -> list[Outcome]:
    """Run tasks by name or file; a group gives an outcome for each of its tasks.

    A file of JSON lines is multiple choice, in the format of `--pairs`; nothing is put between
    a prompt and its choice. The harness's own bootstrap is off: intervals are ours.

    Raises:
        TrainError: The harness does not know a task, or fails.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    by_name = any(Path(task).suffix not in _FILES for task in tasks)
    with _quiet():
        try:
            model = HFLM(
                pretrained=loaded.model,
                tokenizer=tokenizer,
                device=str(loaded.device),
                batch_size=max(1, batch_tokens // context),
                max_length=context,
            )
            found: Any = simple_evaluate(
                model=model,
                tasks=[_spec(task) for task in tasks],
                task_manager=TaskManager(include_defaults=by_name),
                bootstrap_iters=0,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except Exception as error:  # the harness and its tasks raise nearly any type
            fact = f"lm-evaluation-harness fails ({first_line(error)})"
            raise TrainError(", ".join(tasks), fact, "see whether its own command runs it") from (
                error
            )
    names = sorted(found["samples"])
    return [_outcome(name, found["results"][name], found["samples"][name]) for name in names]


def _spec(task: str) -> str | dict[str, Any]:
    path = Path(task)
    if path.suffix != ".jsonl":
        return task
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt if prompt else ''}}",
        "doc_to_choice": "{{choices if choices else [good, bad]}}",
        "doc_to_target": "{{answer if answer else 0}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    }


def _outcome(
    name: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> Outcome:
    """Return the first figure of a task, and its value for every document that has one."""
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in results.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in key
    }
    kept = _first_filter(samples)
    had = [metric for each in kept[:1] for metric in each.get("metrics", ())]
    metric = next((m for m in _FIRST if m in had), had[0] if had else "none")
    hashes = numbered([str(each["doc_hash"]) for each in kept])
    values = {
        digest: float(each[metric])
        for digest, each in zip(hashes, kept, strict=True)
        if isinstance(each.get(metric), int | float)
    }
    told = [value for key, value in metrics.items() if key.split(",")[0] == metric]
    mean = sum(values.values()) / len(values) if values else float("nan")
    return Outcome(
        task=name,
        kind="harness",
        metric=metric,
        value=told[0] if told else mean,
        documents=values,
        metrics=metrics,
    )


def _first_filter(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Keep each document once: a task with several filters lists it once for each."""
    first = samples[0].get("filter") if samples else None
    return [each for each in samples if each.get("filter") == first]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from printing and logging; its bars are drawn where a person looks."""
    from lm_eval import evaluator

    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    # Outside a repository git complains on the terminal, past every redirection.
    name = "get_git_commit_hash"
    git = getattr(evaluator, name, None)
    try:
        if git is not None:
            setattr(evaluator, name, lambda: None)
        with redirect_stdout(io.StringIO()), redirect_stderr(bars):
            yield
    finally:
        if git is not None:
            setattr(evaluator, name, git)
        logging.disable(before)
