"""`surgery recover` as a user types it: what is written, what is told, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from healing import LOADING, load, tensors
from recovering import BASE, FIXTURES, RECALL, TEXT, figures, losses, words
from surgery.checkpoint import open_checkpoint
from surgery.provenance import read_record

TAUGHT = ("--teacher", str(BASE))


def told_by(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def record_of(out: Path) -> dict:
    return read_record(open_checkpoint(out)) or {}


@pytest.mark.parametrize("mode", ["lora", "full", "norms", "half"])
def test_each_mode_heals_and_loads_whole(mode, student, tmp_path, capsys) -> None:
    out, rate = tmp_path / "out", {"full": 1e-3, "half": 1e-3}.get(mode, 3e-3)
    more = (*TAUGHT, "--held-out", str(TEXT), "--json")
    assert main(words(student("pruned"), out, *more, train=mode, lr=rate)) == 0
    told = told_by(capsys)
    assert told["held_out"]["after"] < told["held_out"]["before"] - 0.02
    assert told["steps"] == len(told["losses"]) == 8
    assert not any(load(out)[1][key] for key in LOADING)


@pytest.mark.parametrize(
    "loss",
    [
        *("ce=1", "kl=1"),
        *(pytest.param(f"{loss}=1", marks=pytest.mark.slow) for loss in ("rkl", "jsd", "tvd")),
        "kl=1,hidden_mse=0.1",
        "kl=0.5,ce=0.5,hidden-cos",
    ],
)
def test_each_loss_falls(loss, student, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    teacher = () if loss == "ce=1" else TAUGHT
    more = ("--loss", loss, "--json", *teacher)
    # One row is trained on again and again, so that the loss falls whatever the data.
    line = json.loads(TEXT.read_text().splitlines()[1])
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": line["text"][:90]}))
    one = {"data": tmp_path / "one.jsonl", "batch_tokens": 64, "tokens": 64 * 12}
    assert main(words(student("pruned"), out, *more, **one)) == 0
    found = [value for _, value in told_by(capsys)["losses"]]
    assert found[-1] < 0.9 * found[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tied", {}),
        pytest.param("tied", {"train": "full"}, marks=pytest.mark.slow),
        ("tied", {"loss": "ce=1,early_exit"}),
        ("relaxed", {}),
        ("sparse", {}),
        ("sparse", {"train": "full"}),
        ("upcycled", {}),
        pytest.param("upcycled", {"train": "full"}, marks=pytest.mark.slow),
        ("expanded", {"train": "new"}),
    ],
)
def test_students_of_every_kind_are_healed(name, options, student, tmp_path, capsys) -> None:
    path, out = student(name), tmp_path / "out"
    more = ("--held-out", str(TEXT), "--json")
    assert main(words(path, out, *more, **{"lr": 1e-3, **options})) == 0
    told = told_by(capsys)
    assert told["held_out"]["after"] < told["held_out"]["before"]
    assert not any(load(out)[1][key] for key in LOADING)
    assert main(["verify", str(out)]) == 0
    old, new = tensors(path), tensors(out)
    assert {n: (t.shape, t.dtype) for n, t in old.items()} == {
        n: (t.shape, t.dtype) for n, t in new.items()
    }
    if name == "sparse":
        assert all(bool((new[n][old[n] == 0] == 0).all()) for n in record_masked(path))


def record_masked(path: Path) -> list[str]:
    return [f"{module}.weight" for module in record_of(path)["facts"]["masked"]]


def test_new_layers_train_alone(student, tmp_path, capsys) -> None:
    path, out = student("expanded"), tmp_path / "out"
    assert main(words(path, out, train="new")) == 0
    old, new = tensors(path), tensors(out)
    changed = {n.split(".")[2] for n in old if not torch.equal(old[n], new[n])}
    assert changed == {str(n) for n in record_of(path)["facts"]["trainable_layers"]}


@pytest.mark.parametrize("mode", ["lora", "norms"])
def test_what_is_written_verifies_and_is_reproduced(mode, student, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(words(student("pruned"), out, train=mode)) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert "identical" in capsys.readouterr().out


def test_the_record_tells_data_curve_and_figures(student, tmp_path) -> None:
    out = tmp_path / "out"
    assert main(words(student("pruned"), out, "--held-out", str(RECALL), *TAUGHT)) == 0
    facts = record_of(out)["facts"]
    assert facts["data"]["files"][0]["sha256"]
    assert [loss for _, loss in facts["losses"]] == losses(out)
    assert facts["held_out"]["before"] > 0
    assert facts["speed"]["tokens_per_second"] > 0
    assert facts["settings"]["losses"] == {"kl": 1.0}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_the_adapter_is_kept_and_gives_the_same_model(student, tmp_path) -> None:
    from peft import PeftModel

    out = tmp_path / "out"
    assert main(words(student("pruned"), out, "--keep-adapter", lr=3e-3)) == 0
    whole, base = load(out)[0], load(student("pruned"))[0]
    adapted = PeftModel.from_pretrained(base, tmp_path / "out-adapter").eval()
    ids = torch.arange(48).reshape(2, 24)
    with torch.no_grad():
        difference = (whole(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max()
    assert float(difference) < 0.2  # bfloat16 on disk


def test_a_dry_run_checks_and_writes_nothing(student, tmp_path, capsys) -> None:
    path = student("pruned")
    assert main(words(path, tmp_path / "out", "--dry-run", "--json")) == 0
    told = told_by(capsys)
    assert (told["steps"], told["rows_per_step"]) == (8, 4)
    assert list(tmp_path.iterdir()) == []
    assert main(words(tmp_path / "none", tmp_path / "out", "--dry-run")) == 1


def test_without_json_a_few_lines_are_told(student, tmp_path, capsys) -> None:
    path = student("pruned")
    assert main(words(path, tmp_path / "out", "--held-out", str(TEXT))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["loss", "held"]
    assert "8 steps" in lines[-1]


def test_held_out_text_is_measured_on_the_way(student, tmp_path) -> None:
    out = tmp_path / "out"
    assert main(words(student("pruned"), out, "--held-out", str(RECALL), eval_steps=3)) == 0
    assert [one["step"] for one in figures(out) if "held_out" in one] == [2, 5]


def test_selected_documents_alone_are_trained_on(student, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    more = ("--select", "paser", "--select-share", "0.25", "--json", *TAUGHT)
    assert main(words(student("pruned"), out, *more)) == 0
    told = told_by(capsys)
    assert 8 <= len(told["selection"]["documents"]) <= 16
    assert told["data"]["rows"] < 40
    before = losses(out)
    assert main(words(student("pruned"), out, *more, "--force", tokens=9 * 256)) == 0
    assert losses(out)[:6] == before[:6]  # chosen once, extended with the same documents


def test_a_cached_teacher_teaches(student, tmp_path, capsys) -> None:
    cache, out = tmp_path / "answers.safetensors", tmp_path / "out"
    common = ["--data", str(TEXT), "--context", "64", "--top-k", "32", "-o", str(cache)]
    assert main(["teacher", "cache", str(BASE), *common]) == 0
    capsys.readouterr()
    more = ("--teacher-cache", str(cache), "--held-out", str(TEXT), "--json")
    assert main(words(student("pruned"), out, *more, lr=3e-3)) == 0
    told = told_by(capsys)
    assert told["held_out"]["after"] < told["held_out"]["before"]
    other = words(student("pruned"), tmp_path / "other", *more, seed=5)
    assert main(other) == 2
    assert "holds answers to other rows" in capsys.readouterr().err
    assert not (tmp_path / "other.surgery-run").exists()


def broken(path: Path, out: Path, change) -> Path:
    """A copy of a model whose weights or config were changed."""
    shutil.copytree(path, out)
    held, config = (
        load_file(out / "model.safetensors"),
        json.loads((out / "config.json").read_text()),
    )
    change(held, config)
    save_file(held, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def put_nan(held, _) -> None:
    held["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def quantise(_, config) -> None:
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}


def widen_vocabulary(held, config) -> None:
    name = "model.embed_tokens.weight"
    held[name] = torch.cat([held[name], held[name][:8]])
    config["vocab_size"] = len(held[name])


def shrink_vocabulary(held, config) -> None:
    name = "model.embed_tokens.weight"
    held[name] = held[name][:300].clone()
    config["vocab_size"] = 300


CASES = {
    "no data": ({"data": "{tmp}/empty.txt"}, (), "empty.txt: the file holds no text"),
    "data that is not there": ({"data": "{tmp}/none.jsonl"}, (), "none.jsonl: does not exist"),
    "held-out text that is not there": ({"held_out": "{tmp}/none"}, (), "none: does not exist"),
    "a long context": ({"context": 256}, (), "--context 256: is more than"),
    "kl alone": ({"loss": "kl=1"}, (), "kl compares with a teacher, and there is none"),
    "a teacher for nothing": ({"loss": "ce=1"}, TAUGHT, "is asked by no loss"),
    "select alone": ({"select": "paser"}, (), "compares the student with its parent"),
    "an unknown loss": ({"loss": "mse=1"}, (), "--loss mse: is no loss"),
    "a weight that is none": ({"loss": "kl=a"}, TAUGHT, "'a' is not a number"),
    "no alpha": ({"lora_alpha": 0}, (), "--lora-alpha 0: is not a positive number"),
    "a seed below zero": ({"seed": -1}, (), "--seed -1: is below 0"),
    "a directory of data": ({"data": "{tmp}"}, (), "is a directory; name a file of text"),
    "no rate": ({"lr": 0}, (), "--lr 0: is not a positive number"),
    "a strange device": ({"device": "moon"}, (), "moon is not a device of this machine"),
    "no tokens": ({"tokens": "0"}, (), "--tokens 0"),
    "shares above one": ({"warmup": 0.9, "decay": 0.2}, (), "is above 1"),
    "a small spike": ({"spike": 0.5}, (), "--spike 0.5"),
    "a share of nothing": ({"select_share": 0}, (), "--select-share"),
    "an adapter of norms": ({"train": "norms"}, ("--keep-adapter",), "keeps what --train lora"),
    "new layers of none": ({"train": "new"}, (), "has none; take lora"),
    "muon for norms": ({"train": "norms", "optimizer": "muon"}, (), "trains none; take adamw"),
    "eight bits": ({"optimizer": "adamw8bit"}, (), "neither is installed"),
    "hidden states of a cache": (
        {"loss": "hidden_mse=1", "teacher_cache": "{tmp}/empty.txt"}, (), "hidden",
    ),
    "two teachers": ({"teacher_cache": "{tmp}/empty.txt"}, TAUGHT, "name the teacher twice"),
    "no cache": ({"teacher_cache": "{tmp}/none"}, (), "none: does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_asks_are_refused_in_a_sentence(case, student, tmp_path, capsys) -> None:
    options, more, message = CASES[case]
    (tmp_path / "empty.txt").write_text("")
    filled = {n: v.format(tmp=tmp_path) if isinstance(v, str) else v for n, v in options.items()}
    refused(words(student("pruned"), tmp_path / "out", *more, **filled), message, capsys)


STUDENTS = {
    "nan": (put_nan, (), "holds NaN or infinity in model.layers.1.mlp.up_proj"),
    "quantised": (quantise, (), "is quantised"),
    "another vocabulary": (widen_vocabulary, TAUGHT, "has logits for 1024 tokens, the student for"),
    "too small a vocabulary": (shrink_vocabulary, (), "of the data has no embedding"),
}


@pytest.mark.parametrize("case", STUDENTS)
def test_students_that_cannot_be_healed_are_refused(case, student, tmp_path, capsys) -> None:
    change, more, message = STUDENTS[case]
    path = broken(student("pruned"), tmp_path / "student", change)
    refused(words(path, tmp_path / "out", *more), message, capsys)


def test_a_teacher_of_another_tokenizer_is_refused(student, tmp_path, capsys) -> None:
    other = broken(BASE, tmp_path / "other", lambda *_: None)
    told = json.loads((other / "tokenizer.json").read_text())
    table = told["model"]["vocab"]
    first, second = list(table)[700:702]
    table[first], table[second] = table[second], table[first]
    (other / "tokenizer.json").write_text(json.dumps(told))
    line = words(student("pruned"), tmp_path / "out", "--teacher", str(other))
    refused(line, "the tokenizers differ", capsys)


def test_an_adapter_as_the_student_is_refused(student, tmp_path, capsys) -> None:
    assert main(words(student("pruned"), tmp_path / "first", "--keep-adapter")) == 0
    ref = Path(f"{student('pruned')}+{tmp_path / 'first-adapter'}")
    refused(words(ref, tmp_path / "out"), "surgery lora fuse", capsys)


def test_an_output_that_is_there_is_refused_before_training(student, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    shutil.copytree(BASE, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(words(student("pruned"), out)) == 1
    assert "exists already" in capsys.readouterr().err
    assert not (tmp_path / "out.surgery-run").exists()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main(words(student("pruned"), out, "--force")) == 0
    assert record_of(out)["operation"] == "recover"


@pytest.mark.parametrize("which", ["student", "parent"])
def test_an_output_that_is_an_input_is_refused(which, student, tmp_path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(student("pruned") if which == "student" else BASE, copy)
    first = copy if which == "student" else student("pruned")
    line = words(first, copy, "--force", "--teacher", str(BASE if which == "student" else copy))
    assert main(line) == 1
    assert not (tmp_path / "copy.surgery-run").exists()


def refused(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence, and nothing is left: neither an output nor a run."""
    out = Path(line[line.index("-o") + 1])
    capsys.readouterr()
    assert main(line) in {1, 2}
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert len(told.err.strip().splitlines()) == 1
    assert [path.name for path in out.parent.iterdir() if path.name.startswith("out")] == []


def test_plan_time_errors_need_no_torch(tmp_path) -> None:
    code = (
        "import sys; from cli.main import main\n"
        f"code = main(['recover', {str(FIXTURES / 'base')!r}, '--data', '/none', '-o', 'x'])\n"
        "assert code == 1 and 'torch' not in sys.modules"
    )
    subprocess.run((sys.executable, "-c", code), check=True, timeout=60, cwd=tmp_path)
