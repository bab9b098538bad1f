"""`surgery convert` keeps every byte of a pickled checkpoint, and runs nothing in it."""

import io
import json
import shutil
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cli.main import main
from structures import load
from surgery.checkpoint import open_checkpoint
from surgery.convert import DTYPES, convert, open_pickle
from surgery.errors import CheckpointError
from surgery.verify import verify

NEWER = {name for name in DTYPES if name.startswith(("float8", "uint"))} - {"uint8"}
LAYOUTS = [
    *((name, True) for name in DTYPES),
    *((name, False) for name in DTYPES if name not in NEWER),  # torch cannot write those so
]
EMPTY = b"\x80\x02}q\x00."  # protocol 2, an empty dict


def poison(canary):
    """A pickle that makes a file when it is loaded without restrictions."""
    command = f"touch '{canary}'".encode()
    return b"\x80\x02cposix\nsystem\nX" + len(command).to_bytes(4, "little") + command + b"\x85R."


def reduced(canary):
    """A pickle of protocol 0 that runs source text."""
    return f"c__builtin__\nexec\n(V__import__('pathlib').Path('{canary}').touch()\ntR.".encode()


def archive(pickled):
    """A pickle in the zip layout of torch.save."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", b"3\n")
    return out.getvalue()


def some(dtype, *shape):
    """Random bits of a dtype; of bool only the two that there are."""
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(count))
    if dtype == torch.bool:
        return (raw % 2 == 0).reshape(shape)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def raw_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def converted(path, *words):
    """Convert and return the output, which must verify."""
    out = path.parent / "out" / ("made" if path.is_dir() else "made.safetensors")
    out.parent.mkdir()
    assert main(["convert", str(path), "-o", str(out), *words]) == 0
    problems = [p for c in verify(open_checkpoint(out), load=False) for p in c.problems]
    assert [p for p in problems if "NaN" not in p] == []
    return out


def stored(path):
    """Dtype, shape and bytes of every tensor of one safetensors file."""
    found = load_file(path)
    return {n: (t.dtype, tuple(t.shape), raw_bytes(t)) for n, t in found.items()}


def expected(tensors):
    return {n: (t.dtype, tuple(t.shape), raw_bytes(t)) for n, t in tensors.items()}


def pickled_model(source, folder, *, shards=1, **extra):
    """Turn a structure into a pickled checkpoint in a new folder."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for name, same in extra.items():
        tensors[name.replace("__", ".")] = tensors[same]
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    names, mapping = list(tensors), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: tensors[name].clone() for name in names[i::shards]}
        torch.save(part, folder / file)
        mapping |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": mapping}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(("name", "zipped"), LAYOUTS)
def test_every_dtype_keeps_its_bytes(name, zipped, tmp_path):
    dtype = getattr(torch, name)
    tensors = {"a": some(dtype, 7, 33), "b": some(dtype, 1), "c": some(dtype, 0, 3)}
    tensors |= {"scalar": some(dtype), "large": some(dtype, 3, 500_000)}
    path = tmp_path / "some.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert stored(converted(path)) == expected(tensors)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old layout"])
def test_views_of_a_storage_come_out_in_order(zipped, tmp_path):
    whole = torch.arange(3_000_000, dtype=torch.float64).reshape(1000, 3000)
    tensors = {
        "transposed": whole.T,
        "columns": whole[:, 5:1500],
        "rows": whole[2:7],
        "every third": whole[::3, ::2],
        "permuted": whole.reshape(10, 100, 3000).permute(2, 0, 1),
    }
    path = tmp_path / "some.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert stored(converted(path)) == expected(tensors)


def test_parameters_and_buffers_of_a_module_are_taken(tmp_path):
    module = torch.nn.BatchNorm1d(4)
    path = tmp_path / "module.bin"
    torch.save(dict(module.named_parameters()) | dict(module.named_buffers()), path)
    assert set(stored(converted(path))) == set(module.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_nested_state_dict_is_taken_with_a_note(key, tmp_path):
    tensors = {"a": torch.ones(3)}
    path = tmp_path / "some.pt"
    torch.save({key: tensors, "epoch": 3, "optimizer": {}}, path)
    (note,) = open_pickle(path).notes
    assert repr(key) in note
    assert "epoch, optimizer" in note
    assert stored(converted(path)) == expected(tensors)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "bert", "llava"])
def test_a_directory_loads_as_the_original_does(name, structure, tmp_path):
    out = converted(pickled_model(structure(name), tmp_path / "pickled"))
    assert stored(out / "model.safetensors") == stored(structure(name) / "model.safetensors")
    _, info = load(name, out)
    assert {key: value for key, value in info.items() if value} == {}
    assert (out / "tokenizer.json").read_bytes() == (
        structure(name) / "tokenizer.json"
    ).read_bytes()
    assert not list(out.glob("*.bin"))


def test_shards_become_shards(structure, tmp_path):
    source = pickled_model(structure("llama"), tmp_path / "pickled", shards=3)
    out = converted(source, "--shard-size", "1MiB")
    assert stored(out / "model.safetensors") == stored(structure("llama") / "model.safetensors")


def test_a_head_that_the_config_ties_is_stored_once(structure, tmp_path):
    tied = {"lm_head__weight": "model.embed_tokens.weight"}
    out = converted(pickled_model(structure("llama_tied"), tmp_path / "pickled", **tied))
    found = stored(out / "model.safetensors")
    assert found == stored(structure("llama_tied") / "model.safetensors")
    record = json.loads((out / "surgery.json").read_text())
    reason = "the config ties it to model.embed_tokens.weight"
    assert record["dropped"] == {"lm_head.weight": reason}
    _, info = load("llama_tied", out)
    assert not info["missing_keys"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old layout"])
def test_other_shared_tensors_are_stored_under_each_name(zipped, tmp_path, capsys):
    shared = torch.ones(3, 4)
    tensors = {"first.weight": shared, "second.weight": shared, "empty": torch.zeros(0)}
    path = tmp_path / "some.pt"
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    assert stored(converted(path)) == expected(tensors)
    assert "second.weight is first.weight: stored twice" in capsys.readouterr().err


def test_the_default_output_lies_beside_the_input(structure, tmp_path):
    source = pickled_model(structure("llama"), tmp_path / "model")
    shutil.copy(source / "pytorch_model.bin", tmp_path / "some.pt")
    assert main(["convert", str(source)]) == 0
    assert main(["convert", str(tmp_path / "some.pt")]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        *("model", "model-safetensors", "some.pt", "some.safetensors")
    }


def test_a_dry_run_writes_nothing(structure, tmp_path, capsys):
    source = pickled_model(structure("llama"), tmp_path / "model")
    assert main(["convert", str(source), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["operation"], told["tensors"]) == ("convert", 39)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


class Runs:
    """Pickles to something that makes a file when it is loaded without restrictions."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


def dense_of_others(make):
    return lambda path, canary: torch.save(make(), path)


def write(make):
    return lambda path, canary: path.write_bytes(make(canary))


def truncated(path, canary):
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def truncated_old(path, canary):
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])


def deflated(path, canary):
    torch.save({"a": torch.ones(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def expanded(path, canary):
    torch.save({"a": torch.ones(1).expand(10**7)}, path)


REFUSED = {
    "a command": (write(lambda canary: archive(poison(canary))), "pickled code (posix.system)"),
    "a command, old layout": (write(poison), "pickled code"),
    "source text": (write(lambda canary: archive(reduced(canary))), "pickled code"),
    "an object beside tensors": (
        lambda path, canary: torch.save({"a": torch.ones(1), "b": Runs(canary)}, path),
        "pickled code",
    ),
    "a whole module": (dense_of_others(lambda: torch.nn.Linear(2, 2)), "pickled code"),
    "compressed records": (deflated, "compressed records"),
    "a truncated zip": (truncated, "truncated zip"),
    "truncated, old layout": (truncated_old, "torch cannot load it"),
    "nothing": (write(lambda _: b""), "is empty"),
    "an empty state dict": (write(lambda _: archive(EMPTY)), "holds no tensors"),
    "a list": (dense_of_others(lambda: [torch.ones(1)]), "holds a list"),
    "a tensor": (dense_of_others(lambda: torch.ones(1)), "holds a Tensor"),
    "a number": (dense_of_others(lambda: {"a": torch.ones(1), "epoch": 3}), "'epoch' is a int"),
    "a nested dict": (dense_of_others(lambda: {"a": {"b": torch.ones(1)}}), "'a' is a dict"),
    "a number for a name": (dense_of_others(lambda: {3: torch.ones(1)}), "safetensors cannot hold"),
    "a reserved name": (
        dense_of_others(lambda: {"__metadata__": torch.ones(1)}),
        "safetensors cannot hold",
    ),
    "control characters": (dense_of_others(lambda: {"a\x1b[31m": torch.ones(1)}), "cannot hold"),
    "complex128": (dense_of_others(lambda: {"a": torch.ones(1, dtype=torch.complex128)}), "'a' is"),
    "a sparse tensor": (dense_of_others(lambda: {"a": torch.eye(3).to_sparse()}), "dense"),
    "one value for many": (expanded, "is larger than the file"),
    "a web page": (write(lambda _: b"<!DOCTYPE html><html>"), "HTML page"),
    "a git-lfs pointer": (write(lambda _: b"version https://git-lfs.github.com/spec/v1"), "LFS"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_but_a_state_dict_is_refused_and_not_run(name, tmp_path, capsys):
    make, told = REFUSED[name]
    path, canary = tmp_path / "some.pt", tmp_path / "canary"
    make(path, canary)
    assert main(["convert", str(path)]) == 1
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["some.pt"]


def test_the_poison_works_where_it_is_not_refused(tmp_path):
    path, canary = tmp_path / "some.pt", tmp_path / "canary"
    torch.save(Runs(canary), path)
    torch.load(path, weights_only=False).close()  # noqa: TID251 - to show that the test can fail
    assert canary.exists()


def test_a_compressed_bomb_is_refused_before_torch_sees_it(tmp_path, monkeypatch):
    path = tmp_path / "some.pt"
    deflated(path, None)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match="compressed records"):
        open_pickle(path)


def edit_index(folder, edit):
    path = folder / "pytorch_model.bin.index.json"
    document = json.loads(path.read_text())
    edit(document["weight_map"])
    path.write_text(json.dumps(document))


def swap(mapping):
    first, *_, last = mapping
    mapping[first], mapping[last] = mapping[last], mapping[first]


INDEXES = {
    "a tensor in the wrong shard": (swap, "disagree about"),
    "a tensor too many": (lambda m: m.update(x=next(iter(m.values()))), "disagree about 'x'"),
    "a tensor too few": (lambda m: m.pop("model.norm.weight"), "disagree about"),
    "a path out of the model": (lambda m: m.update(x="../x.bin"), "plain file names"),
    "a file that is missing": (lambda m: m.update(x="x.bin"), "is missing"),
    "no name": (lambda m: m.update(x=3), "plain file names"),
    "nothing": (lambda m: m.clear(), "plain file names"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_not_of_its_shards_is_refused(name, structure, tmp_path):
    edit, told = INDEXES[name]
    source = pickled_model(structure("llama"), tmp_path / "pickled", shards=2)
    edit_index(source, edit)
    with pytest.raises(CheckpointError, match=told):
        open_pickle(source)


def test_of_two_models_one_has_to_be_chosen(structure, tmp_path):
    source = pickled_model(structure("llama"), tmp_path / "pickled", shards=2)
    torch.save({"a": torch.ones(1)}, source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="choose one with --weights"):
        open_pickle(source)
    assert len(open_pickle(source, weights="pytorch_model.bin").tensors) == 1
    assert len(open_pickle(source, weights="pytorch_model.bin.index.json").tensors) == 39


def test_an_optimizer_beside_the_weights_is_left_alone(structure, tmp_path):
    source = pickled_model(structure("llama"), tmp_path / "pickled")
    for name in ("training_args.bin", "optimizer.pt"):
        (source / name).write_bytes(poison(tmp_path / "canary"))
    out = converted(source)
    assert not (tmp_path / "canary").exists()
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt")]


def test_an_interrupted_conversion_goes_on(structure, tmp_path, monkeypatch):
    source = pickled_model(structure("llama"), tmp_path / "pickled")
    plan, out = convert(open_pickle(source)), tmp_path / "out"
    from surgery.run import run
    from surgery.write import Partial

    write_through = Partial.write

    def fail_at_the_end(self, name, at, view):
        if name == plan.order[-1]:
            raise KeyboardInterrupt
        write_through(self, name, at, view)

    monkeypatch.setattr(Partial, "write", fail_at_the_end)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - the engine's way to stop
        run(plan, out, workers=1)
    assert not out.exists()
    monkeypatch.undo()
    report = run(plan, out)
    assert report.reused == len(plan.steps) - 1
    assert stored(out / "model.safetensors") == stored(structure("llama") / "model.safetensors")


def test_headers_say_what_torch_wrote(tmp_path):
    path = tmp_path / "some.pt"
    torch.save({"a": torch.ones(2, 3, dtype=torch.bfloat16)}, path)
    with safe_open(converted(path), "pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_slice("a").get_dtype() == "BF16"
