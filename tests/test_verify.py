"""What `surgery verify` finds, and that it finds nothing in what is sound."""

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.main import main
from growth.stack import stack
from structures import STRUCTURES
from surgery.checkpoint import open_checkpoint, read_header
from surgery.errors import CheckpointError, SurgeryError
from surgery.loading import CannotTell, loading_problems
from surgery.run import run
from surgery.verify import verify

FLIPS = 200


ONCE_DENSE = {"deepseek_v3": "0-3,1-3"}  # its config can only say that the first layers are


def stacked(source, out, *, layers=None):
    run(stack(open_checkpoint(source), factor=None if layers else 2, layers=layers), out)
    return out


@pytest.fixture(scope="module")
def made(structure, tmp_path_factory):
    """A directory of two shards with a record; read it, never write to it."""
    out = tmp_path_factory.mktemp("verify") / "made"
    run(stack(open_checkpoint(structure("llama")), factor=2), out, shard_size=200_000)
    return out


@pytest.fixture(scope="module")
def bare(structure, tmp_path_factory):
    """A bare file with its record inside; read it, never write to it."""
    out = tmp_path_factory.mktemp("verify") / "made.safetensors"
    return stacked(structure("llama") / "model.safetensors", out)


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def failures(path, *, load=False):
    """Problems by check, or what kept the checkpoint from being opened."""
    try:
        checks = verify(open_checkpoint(path), load=load, workers=2)
    except SurgeryError as error:
        return {"open": (str(error),)}
    return {check.name: check.problems for check in checks if check.status == "failed"}


def statuses(path, *, load=True):
    return {c.name: c.status for c in verify(open_checkpoint(path), load=load, workers=2)}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_stacked_structure_is_sound(name, structure, tmp_path):
    out = stacked(structure(name), tmp_path / "out", layers=ONCE_DENSE.get(name))
    assert set(statuses(out).values()) == {"ok"}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_without_record_is_sound(name, structure):
    found = statuses(structure(name))
    assert found == dict.fromkeys(("headers", "anatomy", "values", "loading"), "ok") | {
        "record": "skipped"
    }


def test_a_bare_file_is_sound_as_far_as_it_can_be_told(bare):
    assert statuses(bare) == {
        "headers": "ok",
        "anatomy": "skipped",
        "values": "ok",
        "record": "ok",
        "loading": "skipped",
    }


def test_a_bare_file_may_be_renamed(bare, tmp_path):
    shutil.copy(bare, tmp_path / "other.safetensors")
    assert failures(tmp_path / "other.safetensors") == {}


def flip(path, at, bit):
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def test_any_flipped_byte_of_the_data_is_detected(copy):
    rng = random.Random(0)
    shards = sorted(copy.glob("*.safetensors"))
    assert len(shards) == 2
    places = [
        (file, rng.randrange(read_header(file).data_start, file.stat().st_size))
        for file in rng.choices(shards, k=FLIPS)
    ]
    for file, at in places:
        bit = 1 << rng.randrange(8)
        tensors = read_header(file).tensors
        name = next(t.name for t in tensors if t.offset <= at < t.offset + t.nbytes)
        flip(file, at, bit)
        assert f"{name}: differs from the record" in failures(copy)["record"]
        flip(file, at, bit)
    assert failures(copy) == {}


def test_any_flipped_byte_of_any_file_is_detected(copy):
    rng = random.Random(1)
    files = sorted(path for path in copy.iterdir() if path.is_file())
    assert {"surgery.json", "config.json", "README.md", "tokenizer.json"} < {f.name for f in files}
    for _ in range(FLIPS):
        file = rng.choice(files)
        at, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
        flip(file, at, bit)
        assert failures(copy) != {}, (file.name, at, bit)
        flip(file, at, bit)
    assert failures(copy) == {}


def test_any_flipped_byte_of_a_bare_files_header_is_detected(bare, tmp_path):
    rng = random.Random(2)
    path = tmp_path / "made.safetensors"
    shutil.copy(bare, path)
    for _ in range(FLIPS):
        at, bit = rng.randrange(read_header(bare).data_start), 1 << rng.randrange(8)
        flip(path, at, bit)
        assert failures(path) != {}, (at, bit)
        flip(path, at, bit)
    assert failures(path) == {}


def test_a_dtype_swapped_for_another_of_the_same_size_is_detected(copy):
    path = next(copy.glob("*.safetensors"))
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    assert f"{path.name}: its header differs from the record" in failures(copy)["record"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "README.md"])
def test_a_removed_file_is_missed(name, copy):
    (copy / name).unlink()
    assert f"{name}: missing, the record names it" in failures(copy)["record"]


def test_a_tensor_more_and_one_less_than_the_record_are_named(structure, tmp_path):
    out = stacked(structure("llama"), tmp_path / "out")

    def edit(tensors):
        tensors["model.layers.9.extra"] = tensors.pop("model.norm.weight")

    edit_tensors(out, edit)
    found = failures(out)["record"]
    assert "model.norm.weight: missing, the record names it" in found
    assert "model.layers.9.extra: not in the record" in found


def test_a_record_that_leads_out_of_the_model_is_refused(copy):
    record = json.loads((copy / "surgery.json").read_text())
    record["files"]["../../../../../../etc/passwd"] = "0" * 64
    (copy / "surgery.json").write_text(json.dumps(record))
    assert "link out of the model" in failures(copy)["record"][0]


@pytest.mark.parametrize("text", ["{}", "[]", '{"surgery": 99}', '{"surgery": 1, "outputs": 3}'])
def test_a_broken_record_is_a_failure(text, copy):
    (copy / "surgery.json").write_text(text)
    assert "record" in failures(copy)


CHANGES = {
    "llama": "model.layers.1.mlp.up_proj.weight",
    "llama_bias": "model.layers.2.self_attn.o_proj.bias",
    "qwen3": "model.layers.0.self_attn.q_norm.weight",
    "gemma3_text": "model.layers.3.pre_feedforward_layernorm.weight",
    "gpt2": "transformer.h.1.attn.c_attn.weight",
    "gpt_neox": "gpt_neox.layers.3.attention.query_key_value.weight",
    "phi3": "model.layers.2.mlp.gate_up_proj.weight",
    "mixtral": "model.layers.3.block_sparse_moe.experts.2.w1.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.3.down_proj.weight",
    "gpt_oss": "model.layers.1.self_attn.sinks",
    "llava": "language_model.model.layers.3.mlp.up_proj.weight",
    "bert": "bert.encoder.layer.3.attention.self.query.weight",
}


@pytest.mark.parametrize("change", ["missing", "extra", "another shape"])
@pytest.mark.parametrize("name", CHANGES)
def test_transformers_is_asked_for_what_does_not_fit(name, change, structure, tmp_path):
    tensor = CHANGES[name]
    extra = f"{tensor.rsplit('.', 1)[0]}.bogus"

    def edit(tensors):
        if change == "missing":
            del tensors[tensor]
        elif change == "extra":
            tensors[extra] = torch.zeros(3)
        else:
            stored = tensors[tensor]
            tensors[tensor] = torch.zeros(stored.shape[0] + 1, *stored.shape[1:])

    path = shutil.copytree(structure(name), tmp_path / "model")
    edit_tensors(path, edit)
    found = failures(path, load=True)["loading"]
    word = {"missing": "missing", "extra": "left over", "another shape": "shape"}[change]
    told = (word, "cannot be put together", "has shape")  # experts on disk are joined in memory
    assert any(word in problem for problem in found for word in told)


def test_the_missing_tensor_is_named(structure, tmp_path):
    path = shutil.copytree(structure("llama"), tmp_path / "model")
    edit_tensors(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    problem = "model.layers.1.mlp.up_proj.weight: missing, the config asks for it"
    assert failures(path, load=True) == {"loading": (problem,)}


CONFIGS = [
    ({"num_hidden_layers": 3}, "num_hidden_layers = 3"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
    ({"vocab_size": 300}, "has 264 rows, but the config has vocab_size = 300"),
]


@pytest.mark.parametrize(("changes", "told"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_config_of_another_model_is_noticed(changes, told, structure, tmp_path):
    path = shutil.copytree(structure("llama"), tmp_path / "model")
    edit_json(path / "config.json", **changes)
    assert any(told in problem for problem in failures(path)["anatomy"])


def test_an_untied_config_without_head_is_noticed(structure, tmp_path):
    path = shutil.copytree(structure("llama_tied"), tmp_path / "model")
    edit_json(path / "config.json", tie_word_embeddings=False)
    assert "output head" in failures(path)["anatomy"][0]


def test_a_directory_without_config_fails(structure, tmp_path):
    path = shutil.copytree(structure("llama"), tmp_path / "model")
    (path / "config.json").unlink()
    assert "config.json: missing" in failures(path)["anatomy"][0]


def test_a_truncated_file_is_told_in_one_sentence(structure, tmp_path, capsys):
    path = shutil.copytree(structure("llama"), tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(path.parent)]) == 3
    said = capsys.readouterr().err
    assert "truncated" in said
    assert said.startswith(f"surgery: {path.parent}: model.safetensors: ")


def test_a_model_with_its_own_code_is_not_loaded(structure, tmp_path):
    path = shutil.copytree(structure("llama"), tmp_path / "model")
    (path / "modeling_own.py").write_text("raise SystemExit('this code was run')\n")
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_json(path / "config.json", model_type="own", auto_map=own)
    with pytest.raises(CannotTell, match="needs its own code"):
        loading_problems(open_checkpoint(path))


def test_an_unheard_of_number_of_layers_in_any_part_is_refused_before_it_is_built(
    structure, tmp_path
):
    path = shutil.copytree(structure("llava"), tmp_path / "model")
    vision = json.loads((path / "config.json").read_text())["vision_config"]
    edit_json(path / "config.json", vision_config=vision | {"num_hidden_layers": 10**12})
    with pytest.raises(CheckpointError, match="num_hidden_layers = 1e"):
        loading_problems(open_checkpoint(path))


def test_a_config_that_transformers_does_not_know_is_a_problem(structure, tmp_path):
    path = shutil.copytree(structure("llama"), tmp_path / "model")
    edit_json(path / "config.json", model_type="no_such_type", architectures=["NoSuchModel"])
    assert "transformers cannot build the model" in failures(path, load=True)["loading"][0]


def test_without_architectures_the_auto_class_is_asked(structure, tmp_path):
    path = shutil.copytree(structure("llama"), tmp_path / "model")
    edit_json(path / "config.json", architectures=None)
    assert failures(path, load=True) == {}


def test_the_command_tells_each_check_and_exits_with_3(copy, capsys):
    assert main(["verify", str(copy), "--no-load"]) == 0
    out = capsys.readouterr().out
    checks = ("headers", "anatomy", "values", "record", "loading")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["skipped" if name == "loading" else "ok", name] for name in checks
    ]
    (copy / "README.md").write_text("another card\n")
    assert main(["verify", str(copy), "--no-load"]) == 3
    captured = capsys.readouterr()
    assert "failed  record" in captured.out
    assert "README.md: differs from the record" in captured.err


def test_json_lists_every_problem(copy, capsys):
    for name in ("README.md", "config.json"):
        (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    assert main(["verify", str(copy), "--no-load", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    record = next(check for check in told["checks"] if check["name"] == "record")
    assert set(record) == {"name", "status", "detail", "problems"}
    assert record["problems"] == [
        "config.json: differs from the record",
        "README.md: differs from the record",
    ]


def test_without_loading_torch_is_not_imported(made):
    code = (
        "import sys; from cli.main import main; "
        f"code = main(['verify', {str(made)!r}, '--no-load']); "
        "sys.exit(9 if {'torch', 'transformers'} & set(sys.modules) else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=__file__.rsplit("/", 2)[0], timeout=60, check=False
    )
    assert done.returncode == 0


def test_nothing_is_written(copy):
    before = {path: path.stat().st_mtime_ns for path in (copy, *copy.rglob("*"))}
    verify(open_checkpoint(copy))
    assert {path: path.stat().st_mtime_ns for path in (copy, *copy.rglob("*"))} == before
