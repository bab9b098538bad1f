"""Files made anew beside the weights, such as a merged tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from growth.stack import stack
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError
from surgery.plan import Plan, check_plan, fingerprint
from surgery.preflight import preflight
from surgery.run import dry_digests, run
from surgery.verify import verify

NEW = {
    "tokenizer.json": b'{"new": 1}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    base = open_checkpoint(tiny.write(tmp_path / "base"))
    return dataclasses.replace(stack(base, factor=2), written=NEW)


def test_a_written_file_takes_the_place_of_a_carried_one(plan: Plan, tmp_path: Path) -> None:
    assert any(path.name == "tokenizer.json" for path in plan.carried)
    run(plan, tmp_path / "out")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in NEW} == NEW


def test_the_record_holds_the_digest_of_a_written_file(plan: Plan, tmp_path: Path) -> None:
    record = run(plan, tmp_path / "out").record
    told = {name: hashlib.sha256(data).hexdigest() for name, data in NEW.items()}
    assert told.items() <= record["files"].items()
    assert told.items() <= dry_digests(plan)["files"].items()
    checks = verify(open_checkpoint(tmp_path / "out"), load=False)
    assert [check.problems for check in checks if check.name == "record"] == [()]


def test_other_bytes_make_another_fingerprint(plan: Plan) -> None:
    other = dataclasses.replace(plan, written={**NEW, "tokenizer.json": b"{}"})
    assert fingerprint(other, 1) != fingerprint(plan, 1)


def test_the_disk_needed_counts_written_files(plan: Plan, tmp_path: Path) -> None:
    larger = dataclasses.replace(plan, written={**NEW, "tokenizer.json": bytes(1000)})
    grown = 1000 - len(NEW["tokenizer.json"])
    assert preflight(larger, tmp_path / "x").disk == preflight(plan, tmp_path / "x").disk + grown


@pytest.mark.parametrize(
    "name",
    ["config.json", "surgery.json", "model.safetensors", "../x.json", "a/x.json", "README.md", ""],
)
def test_a_plan_may_not_write_what_the_run_makes(plan: Plan, name: str) -> None:
    with pytest.raises(PlanError, match="may not write"):
        check_plan(dataclasses.replace(plan, written={name: b""}))


def test_a_bare_output_has_no_files_beside_it(tmp_path: Path) -> None:
    file = tiny.write(tmp_path / "base") / "model-00001-of-00002.safetensors"
    plan = stack(open_checkpoint(file), factor=2)
    with pytest.raises(PlanError, match="no other file"):
        check_plan(dataclasses.replace(plan, written=NEW))


def test_a_resumed_run_writes_them_too(plan: Plan, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(Exception, match="interrupted"):
        run(plan, out, progress=stop)
    run(plan, out)
    assert json.loads((out / "tokenizer.json").read_text()) == {"new": 1}
