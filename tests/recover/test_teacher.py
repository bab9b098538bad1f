"""Teachers that run along, and answers that were kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cli.main import main
from surgery.errors import CheckpointError, PlanError, RecipeError, SurgeryError, TrainError
from surgery.evaluate.load import Loaded, load, open_source
from surgery.recover.answers import Size
from surgery.recover.data import Rows, open_rows
from surgery.recover.heads import Head, head_of, states_of
from surgery.recover.losses import Objective, TeacherHidden
from surgery.recover.sources import Source
from surgery.recover.teacher import CachedTeacher, OnlineTeacher, cache_teacher, top_of

CONTEXT = 48


@dataclass(frozen=True)
class Fed:
    indices: tuple[int, ...]
    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class Case:
    """A loaded teacher, its data and their rows."""

    loaded: Loaded
    data: tuple[Source, ...]
    rows: Rows
    root: Path

    def fed(self, *indices: int) -> Fed:
        rows = [self.rows.row(index) for index in indices]
        ids, positions = (
            torch.from_numpy(np.stack([getattr(row, name) for row in rows]))
            for name in ("ids", "positions")
        )
        targets = torch.from_numpy(np.concatenate([row.targets for row in rows]))
        return Fed(indices, ids, positions, targets)

    def student(self) -> Head:
        """The head of a student that is not the teacher."""
        head = head_of(self.loaded.model)
        draw = torch.Generator().manual_seed(3)
        noise = torch.randn(head.weight.shape, generator=draw) * head.weight.std() * 0.2
        return Head((head.weight + noise).detach())


@pytest.fixture(scope="module")
def case(fixtures_dir: Path) -> Case:
    root = fixtures_dir / "base"
    data = (Source(fixtures_dir / "heldout" / "mix.jsonl"),)
    with ExitStack() as scratch:
        source = open_source(root, scratch)
        loaded = load(source, device=torch.device("cpu"), dtype=torch.float32)
        rows = open_rows(data, source.tokenizer, context=CONTEXT, seed=0, mark=source.mark)
    return Case(loaded, data, rows, root)


def cached(case: Case, out: Path, **options: Any) -> Any:
    return cache_teacher(case.root, case.data, out, **({"context": CONTEXT} | options))


def test_a_teacher_that_runs_along_gives_its_own_logits_and_takes_no_gradient(case: Case) -> None:
    teacher = OnlineTeacher(case.loaded, student=case.loaded, layers=True)
    fed = case.fed(0, 3)
    found = teacher.batch(fed)
    with torch.no_grad():
        logits = case.loaded.model(input_ids=fed.ids, position_ids=fed.positions).logits
    torch.testing.assert_close(found.head.logits(found.hidden), logits.flatten(0, 1))
    assert not found.hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training
    assert len(found.layers) == case.loaded.model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["kl", "jsd"])
def test_all_tokens_but_one_kept_tell_as_much_as_the_teacher_itself(
    case: Case, tmp_path: Path, name: str
) -> None:
    cached(case, tmp_path / "c.safetensors", top_k=case.loaded.vocabulary - 1, batch_tokens=100)
    kept = CachedTeacher(tmp_path / "c.safetensors", case.rows, student=case.loaded)
    online = OnlineTeacher(case.loaded, student=case.loaded)
    later = len(case.rows) + 1  # of the second epoch, which has an order of its own
    fed, head = case.fed(1, 0, later), case.student()
    hidden = states_of(case.loaded.model, {"input_ids": fed.ids}).hidden
    few, whole = (
        float(Objective({name: 1.0})(hidden, head, fed.targets, t.batch(fed)).total)
        for t in (kept, online)
    )
    assert whole > 1
    assert few == pytest.approx(whole, rel=2e-3)


def test_few_tokens_kept_bound_the_divergence_from_below_and_more_are_closer(
    case: Case, tmp_path: Path
) -> None:
    head, fed = case.student(), case.fed(2, 1)
    online = OnlineTeacher(case.loaded, student=case.loaded).batch(fed)
    found = [float(Objective({"kl": 1.0})(online.hidden, head, fed.targets, online).total)]
    for top_k in (64, 16, 4):
        out = tmp_path / f"{top_k}.safetensors"
        cached(case, out, top_k=top_k)
        kept = CachedTeacher(out, case.rows, student=case.loaded).batch(fed)
        found.append(float(Objective({"kl": 1.0})(online.hidden, head, fed.targets, kept).total))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4
    assert found[1] > 0.8 * found[0]


def test_what_is_kept_is_the_top_of_whole_logits_and_the_rest(case: Case) -> None:
    fed = case.fed(0)
    teacher: TeacherHidden = OnlineTeacher(case.loaded, student=case.loaded).batch(fed)
    ids, logits, tail = top_of(teacher.hidden, teacher.head, 5)
    logp = teacher.head.logits(teacher.hidden).log_softmax(-1).detach()
    wanted, places = logp.topk(5)
    assert torch.equal(ids, places)
    torch.testing.assert_close(logits, wanted)
    rest = 1 - wanted.double().exp().sum(-1)
    torch.testing.assert_close(tail.exp().double(), rest, rtol=1e-3, atol=1e-6)


def test_the_file_takes_the_bytes_that_are_told(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "c.safetensors"
    found = cached(case, out, top_k=8)
    tensors = load_file(out)
    assert found.nbytes == out.stat().st_size
    assert found.bytes_per_token == 8 * 4 + 4
    assert sum(t.nbytes for n, t in tensors.items() if n != "starts") == 36 * found.tokens
    assert found.tokens == sum(int((case.rows.at(i).targets >= 0).sum()) for i in range(found.rows))
    assert (tensors["ids"].dtype, tensors["logits"].dtype) == (torch.uint16, torch.float16)


def test_ids_of_large_vocabularies_take_four_bytes() -> None:
    size = Size(counts=np.array([3]), top_k=64, vocabulary=128_256)
    assert (size.bytes_per_token, size.specs()["ids"].dtype) == (64 * 6 + 4, "I32")


def test_batches_do_not_change_what_is_kept(case: Case, tmp_path: Path) -> None:
    for tokens in (1, 500):
        cached(case, tmp_path / f"{tokens}.safetensors", top_k=4, batch_tokens=tokens)
    one, other = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 500))
    assert torch.equal(one["ids"], other["ids"])
    torch.testing.assert_close(one["logits"], other["logits"], rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"top_k": 0}, RecipeError, "--top-k 0: is below 1"),
        ({"top_k": 100_000}, RecipeError, "--top-k 100000: leaves nothing of the teacher's"),
        ({"context": 1}, RecipeError, "--context 1: is below 2"),
        ({"context": 10**7}, RecipeError, "--context 10000000: is more than "),
        ({"batch_tokens": 0}, RecipeError, "--batch-tokens 0: is below 1"),
        ({"device": "nowhere"}, RecipeError, "--device: nowhere is not a device"),
    ],
)
def test_wrong_asks_are_one_sentence_and_leave_nothing(
    case: Case, tmp_path: Path, options: dict[str, Any], kind: type[SurgeryError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        cached(case, tmp_path / "c.safetensors", **options)
    assert str(caught.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_files_are_not_replaced_unasked_and_need_their_ending(case: Case, tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"mine")
    with pytest.raises(RecipeError, match="exists already"):
        cached(case, tmp_path / "c.safetensors")
    with pytest.raises(RecipeError, match=r"does not end in \.safetensors"):
        cached(case, tmp_path / "c")
    cached(case, tmp_path / "c.safetensors", force=True, top_k=2)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_small_disk_is_told_before_the_work(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PlanError, match=r"needs 0\.\d\d GB, and 0\.00 GB are free"):
        cached(case, tmp_path / "c.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_damaged_teacher_leaves_no_file(case: Case, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(case.root, root)
    tensors = load_file(root / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, root / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainError):
        cache_teacher(root, case.data, tmp_path / "c.safetensors", context=CONTEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def other_seed(case: Case, path: Path) -> None:
    cached(case, path, seed=1, top_k=2)


def other_data(case: Case, path: Path) -> None:
    text = path.with_name("other.txt")
    text.write_text("Other words than those. " * 40)
    cache_teacher(case.root, [Source(text)], path, context=CONTEXT, top_k=2)


def other_vocabulary(case: Case, path: Path) -> None:
    cached(case, path, top_k=2)
    with safe_open(path, "pt") as file:
        told = file.metadata() | {"vocabulary": "7"}
    save_file(load_file(path), path, told)


def no_cache(case: Case, path: Path) -> None:
    save_file({"tail": torch.zeros(3)}, path)


def torn(case: Case, path: Path) -> None:
    cached(case, path, top_k=2)
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "kind", "fact"),
    [
        (other_seed, RecipeError, "holds answers to other rows"),
        (other_data, RecipeError, "holds answers to other rows"),
        (other_vocabulary, RecipeError, "has logits for 7 tokens, the student for"),
        (no_cache, CheckpointError, "is no file of a teacher's answers"),
        (torn, CheckpointError, "truncated"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(
    case: Case,
    tmp_path: Path,
    spoil: Callable[[Case, Path], None],
    kind: type[SurgeryError],
    fact: str,
) -> None:
    path = tmp_path / "c.safetensors"
    spoil(case, path)
    with pytest.raises(kind, match=fact):
        CachedTeacher(path, case.rows, student=case.loaded)


def test_a_teacher_of_another_vocabulary_is_refused(case: Case) -> None:
    from dataclasses import replace

    student = replace(case.loaded, vocabulary=7)
    with pytest.raises(RecipeError, match="a teacher needs the student's vocabulary"):
        OnlineTeacher(case.loaded, student=student)


def test_the_command_tells_bytes_a_token(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(case.data[0].path), str(tmp_path / "c.safetensors")
    words = ["teacher", "cache", str(case.root), "--data", data, "-o", out, "--top-k", "16"]
    assert main([*words, "--context", str(CONTEXT), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes_per_token"] == 68
    assert main([*words, "--context", str(CONTEXT), "--force"]) == 0
    assert "68 bytes a token" in capsys.readouterr().out
    CachedTeacher(Path(out), case.rows, student=case.loaded)
