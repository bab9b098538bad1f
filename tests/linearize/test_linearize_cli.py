"""`surgery linearize` as a user types it: what is written, what is told, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli.main import main
from surgery.checkpoint import open_checkpoint
from surgery.provenance import read_record

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, TEXT, RECALL = (
    FIXTURES / "base",
    *(FIXTURES / "heldout" / f"{name}.jsonl" for name in ("mix", "recall")),
)
SMALL = {
    "transfer-tokens": 1024, "tokens": 1024, "kd-tokens": 1024, "context": 64,
    "batch-tokens": 256, "transfer-lr": 1e-3, "lr": 1e-3,
}  # fmt: skip


def words(out: Path, *more: str, method: str = "lolcats", model: Path = BASE) -> list[str]:
    window = () if method in {"hedgehog", "t2r", "gla", "gated-delta"} else ("--window", "16")
    return ["linearize", str(model), "--method", method, *window, "-o", str(out), *more]


def trained(out: Path, *more: str, method: str = "lolcats") -> list[str]:
    small = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    return words(out, "--data", str(TEXT), *small, *more, method=method)


def told_by(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_without_stages_the_converted_model_is_written_and_made_again(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(words(out, "--stage", "none", "--json")) == 0
    assert told_by(capsys)["facts"]["linear_layers"] == [0, 1, 2, 3]
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert "identical" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dry_run_tells_stages_and_state_and_writes_nothing(tmp_path, capsys) -> None:
    assert main(trained(tmp_path / "out", "--dry-run", "--json")) == 0
    told = told_by(capsys)
    assert [stage["stage"] for stage in told["stages"]] == ["transfer", "lora"]
    assert [stage["steps"] for stage in told["stages"]] == [4, 4]
    assert told["state_bytes"] <= told["break_even"] * told["kv_bytes_per_token"]
    assert told["state_bytes"] > (told["break_even"] - 1) * told["kv_bytes_per_token"]
    assert told["new_parameters"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_in_words_tells_what_it_is_asked_for(tmp_path, capsys) -> None:
    assert main(trained(tmp_path / "out", "--dry-run", "--keep-softmax", "kl:1")) == 0
    out = capsys.readouterr().out
    assert "LoRA of rank 8, alpha 16, on q_proj, k_proj, v_proj, o_proj" in out
    assert "the 1 of them that cost most" in out
    assert "new parameters" in out
    assert "bytes a row, however long" in out
    assert "nothing will be measured" in out
    assert "nothing of it is trained" not in out


WRONG = [
    ((), "there is no text to train on", 2),
    (("--stage", "none", "--data", str(TEXT)), "is read by no stage", 2),
    (("--stage", "transfer,sft", "--data", str(TEXT)), "names 'sft'", 2),
    (("--stage", "lora,transfer", "--data", str(TEXT)), "is not in the order", 2),
    (("--stage", "lora,lora", "--data", str(TEXT)), "is not in the order", 2),
    (("--stage", "lora,full", "--data", str(TEXT)), "recovers twice", 2),
    (("--stage", "none,lora", "--data", str(TEXT)), "names 'none'", 2),
    (("--stage", "none", "--keep-softmax", "kl:1"), "after the transfer stage", 2),
    (("--data", str(TEXT), "--keep-softmax", "kl:4"), "keeps 4 of the 4 layers", 2),
    (("--data", str(TEXT), "--keep-softmax", "kl:0"), "keeps 0 of the 4 layers", 2),
    (("--stage", "none", "--keep-softmax", "every:9"), "--keep-softmax every:9", 2),
    (("--stage", "none", "--keep-softmax", "7"), "names layer 7", 2),
    (("--stage", "none", "--keep-softmax", "0-3"), "keeps every layer", 2),
    (("--stage", "none", "--sinks", "4"), "--sinks 4", 2),
    (("--stage", "none", "--feature-map", "cubic"), "is no feature map", 2),
    (("--stage", "none", "--blocks", "2"), "of the transfer stage", 2),
    (("--stage", "none", "--attention-weight", "1"), "of the transfer stage", 2),
    (("--data", str(TEXT), "--blocks", "0"), "is no number of layers", 2),
    (("--data", str(TEXT), "--attention-weight", "-1"), "is no weight", 2),
    (("--data", str(TEXT), "--tokens", "many"), "many", 2),
    (("--data", str(TEXT), "--lr", "-1"), "is not a positive number", 2),
    (("--data", str(TEXT), "--memory", "x"), "is not a size", 2),
    (("--data", "none.txt"), "none.txt: does not exist", 1),
    (("--stage", "none", "--held-out", "none.txt"), "none.txt: does not exist", 1),
    (("--data", str(FIXTURES)), "is a directory", 1),
    (("--data", os.devnull), "holds no text", 1),
    (("--data", str(BASE / "model.safetensors")), "is not UTF-8", 1),
    (("--data", str(TEXT), "--held-out", os.devnull), "holds no text", 1),
    (("--data", str(TEXT), "--held-out", str(BASE / "model.safetensors")), "is not UTF-8", 1),
    (("--data", str(TEXT), "--lr", "0"), "--lr 0: is not a positive number", 2),
    (("--data", str(TEXT), "--transfer-lr", "-1"), "--transfer-lr -1: is not a", 2),
    (("--data", str(TEXT), "--transfer-lr", "0"), "--transfer-lr 0: is not a", 2),
    (("--data", str(TEXT), "--kd-lr", "nan"), "--kd-lr nan: is not a positive", 2),
    (("--data", str(TEXT), "--lora-alpha", "0"), "--lora-alpha 0: is not a positive", 2),
    (("--data", str(TEXT), "--rank", "0"), "--rank 0: is below 1", 2),
    (("--data", str(TEXT), "--context", "0"), "--context 0: is below 8", 2),
    (("--data", str(TEXT), "--context", "129"), "base reads, 128 tokens; give 128", 2),
    (("--data", str(TEXT), "--batch-tokens", "0"), "--batch-tokens 0: is below 8", 2),
    (("--data", str(TEXT), "--seed", "-1"), "--seed -1: is below 0", 2),
    (("--data", str(TEXT), "--device", "abacus"), "abacus is not a device", 2),
    (("--stage", "none", "--feature-dim", "0"), "is too small; give 1 or more", 2),
]


@pytest.mark.parametrize(("more", "fact", "code"), WRONG)
def test_a_wrong_ask_is_refused_in_one_sentence(more, fact, code, tmp_path, capsys) -> None:
    assert main(words(tmp_path / "out", *more)) == code
    said = capsys.readouterr().err
    assert fact in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "more", "fact"),
    [
        ("liger", ("--stage", "transfer", "--data", str(TEXT)), "has no new parameters"),
        ("swa-sink", ("--stage", "transfer", "--data", str(TEXT)), "has no new parameters"),
        ("swa-sink", ("--data", str(TEXT)), "is read by no stage"),
        ("swa-sink", ("--window", "3"), "--sinks 4: leaves no room for near tokens"),
        ("based", ("--data", str(TEXT), "--attention-weight", "1"), "are not defined"),
    ],
)
def test_methods_refuse_what_they_cannot(method, more, fact, tmp_path, capsys) -> None:
    assert main(words(tmp_path / "out", *more, method=method)) == 2
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("deepseek_v3", "layer 0: compresses keys and values into a latent (MLA)"),
        ("bert", "is no causal language model"),
    ],
)
def test_models_that_cannot_be_linearized_are_refused(
    name, fact, structure, tmp_path, capsys
) -> None:
    assert main(words(tmp_path / "out", "--stage", "none", model=structure(name))) == 1
    said = capsys.readouterr().err
    assert fact in said
    assert said.count("\n") == 1


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(trained(tmp_path / "out")) == 2
    assert "runs its stages in one process" in capsys.readouterr().err


def test_a_wrong_ask_loads_no_torch(tmp_path) -> None:
    argv = words(tmp_path / "out", "--data", str(TEXT), "--lr", "-1")
    code = f"import sys; from cli.main import main; c = main({argv!r}); "
    code += "print(c, 'torch' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.split() == ["2", "False"]


def test_a_model_that_stands_there_is_not_replaced(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(words(out, "--stage", "none")) == 0
    assert main(words(out, "--stage", "none")) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(words(out, "--stage", "none", "--force")) == 0


def test_a_trained_model_is_measured_recorded_and_made_again(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(trained(out, "--held-out", str(RECALL), "--json")) == 0
    told = told_by(capsys)
    names = [row["name"] for row in told["table"]["rows"]]
    ends = ["transfer", "lora", "no linear branch"]
    assert names == ["teacher", "swa-sink", "untrained", *ends]
    rows = {row["name"]: row for row in told["table"]["rows"]}
    assert rows["teacher"]["bits_per_byte"] < rows["lora"]["bits_per_byte"]
    assert rows["lora"]["low"] < rows["lora"]["more"] < rows["lora"]["high"]
    assert rows["lora"]["closed"]["untrained"]["share"] > 0
    record = read_record(open_checkpoint(out)) or {}
    assert record["facts"]["table"] == told["table"]
    assert [stage["stage"] for stage in record["facts"]["stages"]] == ["transfer", "lora"]
    assert "training after surgery (transfer, lora)" in (out / "README.md").read_text()
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0
    assert "identical" in capsys.readouterr().out


def test_without_json_the_table_is_printed(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(trained(out, "--held-out", str(RECALL), "--stage", "transfer")) == 0
    said = capsys.readouterr().out
    assert "teacher (base)" in said
    assert "no linear branch" in said
    assert "95% intervals" in said
    assert said.splitlines()[-1].endswith("lolcats, transfer")


def test_without_held_out_text_it_says_that_nothing_was_measured(tmp_path, capsys) -> None:
    assert main(trained(tmp_path / "out", "--stage", "lora", method="liger")) == 0
    assert "nothing was measured" in capsys.readouterr().out
