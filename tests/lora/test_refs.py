"""`BASE+ADAPTER` wherever a model is named: what is opened, what every command makes of it."""

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
from surgery.checkpoint import open_checkpoint
from surgery.checkpoint.refs import pinned, split_ref
from surgery.errors import CheckpointError, RecipeError
from surgery.lora.fuse import fuse

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(scope="module")
def pair(lab, tmp_path_factory):
    """A directory with `base`, and an adapter of it; read them, never write to them."""
    root = tmp_path_factory.mktemp("pair")
    shutil.copytree(lab.structure("llama"), root / "base")
    adapter = lab.train(root / "base", r=4, target_modules=["q_proj", "up_proj"])
    shutil.copytree(adapter, root / "tuned")
    return root


@pytest.fixture
def copy(pair, tmp_path):
    """The same, to be broken."""
    shutil.copytree(pair, tmp_path / "pair")
    return tmp_path / "pair"


@pytest.mark.parametrize(
    ("names", "ref", "expected"),
    [
        (["a", "b"], "a+b", ["a", "b"]),
        (["a+b"], "a+b", ["a+b"]),
        (["a+b", "a", "b"], "a+b", ["a+b"]),
        (["a+b", "c"], "a+b+c", ["a+b", "c"]),
        (["a", "b+c"], "a+b+c", ["a", "b+c"]),
        (["a"], "a+org/lora@v1+org/more", ["a", "org/lora@v1", "org/more"]),
        ([], "org/base", ["org/base"]),
    ],
)
def test_an_existing_path_wins_over_a_plus(names, ref, expected, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        (tmp_path / name).mkdir()
    assert list(split_ref(ref)) == expected


@pytest.mark.parametrize(
    ("ref", "revision", "expected"),
    [
        ("org/a", None, "org/a"),
        ("org/a@main", "c1", "org/a@c1"),
        ("org/a@main+org/b", "c1+c2", "org/a@c1+org/b@c2"),
        ("./a+org/b", "+c2", "./a+org/b@c2"),
    ],
)
def test_a_hub_ref_is_pinned_part_by_part(ref, revision, expected) -> None:
    assert pinned(ref, revision) == expected


def test_the_checkpoint_has_both_sources_and_the_base_s_files(pair) -> None:
    base, found = open_checkpoint(pair / "base"), open_checkpoint(f"{pair}/base+{pair}/tuned")
    assert found.ref == f"{pair}/base+{pair}/tuned"
    assert found.name == "base+tuned"
    assert [file.name for file in found.files] == ["model.safetensors", "adapter_model.safetensors"]
    assert found.stamps.keys() == set(found.files)
    assert (found.config, found.carried, found.root) == (base.config, base.carried, base.root)
    assert found.tensors.keys() == base.tensors.keys()
    assert found.notes == ()


def test_a_bare_file_takes_an_adapter(pair, lab) -> None:
    whole = lab.tensors(lab.write(fuse(open_checkpoint(f"{pair}/base+{pair}/tuned"))))
    bare = open_checkpoint(f"{pair}/base/model.safetensors+{pair}/tuned")
    out = lab.write(fuse(bare), "out.safetensors")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_file(out).items())


def test_an_adapter_alone_is_refused_with_the_remedy(pair) -> None:
    with pytest.raises(CheckpointError, match=r"LoRA adapter, not a model; .* BASE\+.*tuned"):
        open_checkpoint(pair / "tuned")


def test_a_model_is_no_adapter(pair) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        open_checkpoint(f"{pair}/base+{pair}/base")


def test_there_must_be_an_adapter_to_fuse(pair) -> None:
    with pytest.raises(RecipeError, match="names no adapter"):
        fuse(open_checkpoint(pair / "base"))


CONFIGS = [
    ({"peft_type": "IA3"}, "is an adapter of the type 'IA3'; only LORA"),
    ({"peft_type": "PREFIX_TUNING"}, "is an adapter of the type 'PREFIX_TUNING'"),
    ({"init_lora_weights": "pissa_niter_4"}, "was started by pissa_niter_4"),
    ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    ({"alora_invocation_tokens": [1]}, "activated LoRA"),
    ({"kasa_config": {"beta": 1}}, "KaSA"),
    ({"layer_replication": [[0, 2]]}, "replicates layers"),
    ({"r": 5}, "has rank 4 and 4 for .*, its config says 5"),
    ({"r": 2}, "the base has"),
    ({"r": 0}, "has rank 0"),
    ({"r": "4"}, "has rank '4'"),
    ({"lora_alpha": float("inf")}, "has alpha inf"),
    ({"rank_pattern": {"(": 3}}, "has a pattern '\\(' that is none"),
    ({"rank_pattern": [3]}, "rank_pattern that is no table"),
    ({"use_dora": True}, "DoRA without a magnitude"),
]


@pytest.mark.parametrize(("change", "message"), CONFIGS)
def test_what_cannot_be_added_is_refused_in_one_sentence(change, message, copy) -> None:
    place = copy / "tuned" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(f"{copy}/base+{copy}/tuned")
    assert "\n" not in str(error.value)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
WEIGHTS = [
    ({A: None}, "has no 'base_model.model.model.layers.0.self_attn.q_proj.lora_A'"),
    ({A: torch.zeros(4, 31)}, r"of shape \[32, 31\], the base has \[32, 32\]"),
    ({A: torch.zeros(4, 32, 1)}, "only matrices are added"),
    ({A: torch.zeros(0, 32)}, "only matrices are added"),
    ({A: torch.zeros(4, 32, dtype=torch.int8)}, "as I8, which is not computed with"),
    ({A.replace(".0.", ".9."): torch.zeros(4, 32)}, "has no"),
    (
        {A.replace(".0.", ".9."): torch.zeros(4, 32), B.replace(".0.", ".9."): torch.zeros(32, 4)},
        "changes 'model.layers.9.self_attn.q_proj.weight', which the base does not hold",
    ),
    ({"base_model.model.lm_head.weight": torch.zeros(3, 32)}, r"of shape \[3, 32\]"),
    (
        {"base_model.model.lm_head.weight": torch.zeros(264, 32, dtype=torch.int8)},
        "'lm_head.weight' as I8, the base as F32",
    ),
    ({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(9)}, r"\[9\] \(magnitude\)"),
    ({A.replace("lora_A", "lora_A.other"): torch.zeros(4, 32)}, "holds two adapters of"),
    ({B.replace("weight", "bias"): torch.zeros(32)}, "q_proj.bias', which the base does not hold"),
    (
        {
            "base_model.model.lm_head.weight": torch.zeros(264, 32),
            "base_model.model.lm_head.modules_to_save.weight": torch.zeros(264, 32),
        },
        "holds 'lm_head.weight' twice",
    ),
    ({"base_model.model.other.weight": torch.zeros(3, 32)}, "'other.weight', which the base does"),
    ({A.replace("lora_A", "lora_C"): torch.zeros(3)}, "no part of a LoRA that is known"),
    (
        {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": torch.zeros(2, 32)},
        "does not tell which tokens",
    ),
]


@pytest.mark.parametrize(("change", "message"), WEIGHTS)
def test_weights_that_do_not_fit_are_refused_when_opened(change, message, copy) -> None:
    place = copy / "tuned" / "adapter_model.safetensors"
    kept = load_file(place) | change
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, place)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(f"{copy}/base+{copy}/tuned")


def test_new_tokens_lie_inside_the_embedding(copy) -> None:
    place = copy / "tuned" / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    save_file(load_file(place) | {key: torch.zeros(1, 32)}, place)
    config = copy / "tuned" / "adapter_config.json"
    told = json.loads(config.read_text()) | {"trainable_token_indices": [264]}
    config.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match=r"\(tokens\), the base has \[264, 32\]"):
        open_checkpoint(f"{copy}/base+{copy}/tuned")


def test_a_base_that_is_not_stored_in_floats_is_refused(copy) -> None:
    place = copy / "base" / "model.safetensors"
    name = "model.layers.0.self_attn.q_proj.weight"
    stored = load_file(place)
    save_file(stored | {name: stored[name].to(torch.float8_e4m3fn)}, place)
    with pytest.raises(CheckpointError, match="is stored as F8_E4M3, to which an adapter cannot"):
        open_checkpoint(f"{copy}/base+{copy}/tuned")


def test_an_empty_folder_of_an_adapter_is_told(copy) -> None:
    (copy / "tuned" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model.safetensors"):
        open_checkpoint(f"{copy}/base+{copy}/tuned")


def test_experts_that_shapes_do_not_tell_apart_are_refused(lab, tmp_path) -> None:
    experts = torch.ones(4, 8, 8)
    stem = "model.layers.0.mlp.experts"
    base = tmp_path / "base.safetensors"
    save_file({f"{stem}.gate_up_proj": experts, f"{stem}.down_proj": experts + 1}, base)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    key = f"base_model.model.{stem}.lora_"
    factors = {f"{key}A.weight": torch.ones(8, 8), f"{key}B.weight": torch.ones(8, 8)}
    save_file(factors, adapter / "adapter_model.safetensors")
    named = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"peft_type": "LORA", "r": 2, "target_parameters": named}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="that its shapes do not tell"):
        open_checkpoint(f"{base}+{adapter}")
    config["target_parameters"] = named[:1]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert open_checkpoint(f"{base}+{adapter}").tensors[f"{stem}.gate_up_proj"].shape == (4, 8, 8)


def test_a_pickled_adapter_is_named_with_the_way_to_convert_it(copy) -> None:
    (copy / "tuned" / "adapter_model.safetensors").unlink()
    (copy / "tuned" / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"surgery convert .*adapter_model.bin -o"):
        open_checkpoint(f"{copy}/base+{copy}/tuned")


def test_a_resized_embedding_is_taken_and_told(copy, lab) -> None:
    base = lab.tensors(copy / "base")
    rows = {
        f"base_model.model.{name}": torch.cat([base[name], torch.ones(8, 32)])
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    place = copy / "tuned" / "adapter_model.safetensors"
    save_file(load_file(place) | rows, place)
    found = open_checkpoint(f"{copy}/base+{copy}/tuned")
    assert found.config is not None
    assert found.config["vocab_size"] == 272
    assert "from 264 to 272 rows" in found.notes[0]
    out = lab.write(fuse(found))
    assert lab.load(out).get_input_embeddings().weight.shape == (272, 32)


def test_an_embedding_resized_without_its_head_is_refused(copy, lab) -> None:
    base = lab.tensors(copy / "base")["model.embed_tokens.weight"]
    rows = {"base_model.model.model.embed_tokens.weight": torch.cat([base, base[:8]])}
    place = copy / "tuned" / "adapter_model.safetensors"
    save_file(load_file(place) | rows, place)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' of shape \[272, 32\]"):
        open_checkpoint(f"{copy}/base+{copy}/tuned")


def test_stacking_an_adapted_model_is_stacking_the_fused_one(pair, lab, tmp_path) -> None:
    fused = lab.write(fuse(open_checkpoint(f"{pair}/base+{pair}/tuned")))
    out = tmp_path / "out", tmp_path / "expected"
    for ref, path in zip((f"{pair}/base+{pair}/tuned", fused), out, strict=True):
        assert main(["stack", str(ref), "--factor", "2", "-o", str(path)]) == 0
    found, expected = map(lab.tensors, out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_diff_measures_an_adapted_model_as_the_fused_one(pair, lab, capsys) -> None:
    ref, fused = (
        f"{pair}/base+{pair}/tuned",
        lab.write(fuse(open_checkpoint(f"{pair}/base+{pair}/tuned"))),
    )
    assert main(["diff", ref, str(fused), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
    totals = []
    for other in (ref, str(fused)):
        assert main(["diff", f"{pair}/base", other, "--json"]) == 0
        totals.append(json.loads(capsys.readouterr().out)["total"])
    assert totals[0] == totals[1]
    assert totals[0]["relative_l2"] > 0


def test_inspect_lists_the_files_of_both(pair, capsys) -> None:
    assert main(["inspect", f"{pair}/base+{pair}/tuned", "--tensors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = [file["name"] for file in told["files"]]
    assert {"model.safetensors", "adapter_model.safetensors", "config.json"} <= set(names)


def test_verify_reads_the_adapted_values(pair, capsys) -> None:
    assert main(["verify", f"{pair}/base+{pair}/tuned", "--json"]) == 0
    checks = {c["name"]: c["status"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["values"] == "ok"
    assert checks["record"] == checks["loading"] == "skipped"


def test_eval_scores_a_base_with_its_adapter_as_one_model(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    base, uni, text = (str(FIXTURES / name) for name in ("base", "uni", "heldout/uni.jsonl"))
    adapter, fused = str(tmp_path / "adapter"), str(tmp_path / "fused")
    assert main(["lora", "extract", base, uni, "--rank", "8", "-o", adapter]) == 0
    assert main(["lora", "fuse", base, adapter, "-o", fused]) == 0
    capsys.readouterr()
    assert main(["eval", base, fused, f"{base}+{adapter}", "--text", text, "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    scored = [model["overall"]["bits_per_byte"] for model in models]
    assert scored[1] == scored[2] < scored[0]
    assert list((tmp_path / "scratch").glob("surgery-*")) == []


def test_a_fused_model_is_reproduced_from_both_sources(pair, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["lora", "fuse", f"{pair}/base", f"{pair}/tuned", "-o", str(out)]) == 0
    assert main(["verify", str(out)]) == 0
    assert main(["reproduce", str(out)]) == 0
    record = json.loads((out / "surgery.json").read_text())
    assert list(record["inputs"][0]["files"]) == ["model.safetensors", "adapter_model.safetensors"]
    shutil.copytree(pair, tmp_path / "moved")
    moved = f"{pair}/base+{pair}/tuned={tmp_path}/moved/base+{tmp_path}/moved/tuned"
    assert main(["reproduce", str(out), "--input", moved]) == 0
    save_file({}, tmp_path / "moved" / "tuned" / "adapter_model.safetensors")
    assert main(["reproduce", str(out), "--input", moved]) == 1


def snapshot(cache, folder, commit):
    """Put a directory into a hub cache as `org/` and its name, at one commit."""
    repo = cache / f"models--org--{folder.name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repo / "snapshots" / commit)


def test_hub_refs_stand_on_both_sides_and_are_pinned(pair, tmp_path) -> None:
    cache = tmp_path / "cache"
    snapshot(cache, pair / "base", "b" * 40)
    snapshot(cache, pair / "tuned", "c" * 40)
    out = tmp_path / "out"
    repo = Path(__file__).resolve().parents[2]
    settings = {"PYTHONPATH": str(repo), "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    for words in (
        ("lora", "fuse", "org/base", "org/tuned@main", "-o", str(out)),
        ("reproduce", str(out)),
    ):
        command = [sys.executable, "-m", "surgery", *words]
        done = subprocess.run(
            command, env=settings, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
    (told,) = json.loads((out / "surgery.json").read_text())["inputs"]
    assert told["ref"] == "org/base+org/tuned@main"
    assert told["revision"] == f"{'b' * 40}+{'c' * 40}"
    card = (out / "README.md").read_text()
    assert '- "org/base"' in card
    assert '- "org/tuned"' in card
