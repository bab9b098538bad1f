"""What cannot be evaluated is refused in one sentence that names the place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.errors import CheckpointError, RecipeError, SurgeryError, TrainError
from surgery.evaluate import evaluate

Make = Callable[..., Path]


@pytest.fixture
def broken(make_model: Make, tmp_path: Path) -> Path:
    """A copy of a sound model, for a test to break."""
    return Path(shutil.copytree(make_model(seed=0), tmp_path / "broken"))


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


def broken_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"version": "1.0"}')


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def unknown_family(path: Path) -> None:
    edit_config(path, model_type="nonesuch", architectures=["NoneSuch"])


def another_family(path: Path) -> None:
    edit_config(path, model_type="t5", architectures=["T5Model"])


def one_layer_more(path: Path) -> None:
    edit_config(path, num_hidden_layers=3)


def one_layer_less(path: Path) -> None:
    edit_config(path, num_hidden_layers=1)


def wider(path: Path) -> None:
    edit_config(path, intermediate_size=40)


def nan(path: Path) -> None:
    edit_weights(path, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))


def short_embedding(path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:200].contiguous()

    edit_weights(path, cut)
    edit_config(path, vocab_size=200, bos_token_id=None)


def torn(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-100])


@pytest.mark.parametrize(
    ("breakage", "kind", "fact"),
    [
        (no_tokenizer, CheckpointError, "there is no tokenizer"),
        (broken_tokenizer, CheckpointError, "cannot load the tokenizer"),
        (no_config, CheckpointError, "there is no config.json"),
        (unknown_family, CheckpointError, "cannot load the config"),
        (another_family, SurgeryError, "cannot load the (config|model)"),
        (one_layer_more, TrainError, "tensors are missing: model.layers.2.*and 6 more"),
        (one_layer_less, TrainError, "tensors are left over: model.layers.1.*and 6 more"),
        (wider, TrainError, "of another shape than the config says: model.layers.0.mlp"),
        (nan, TrainError, "its logits are not finite on .*documents.jsonl:[0-9]+"),
        (short_embedding, TrainError, "token 256 of .*documents.jsonl:1 has no embedding"),
        (torn, CheckpointError, "model.safetensors"),
    ],
)
def test_a_broken_model_is_refused(
    broken: Path,
    documents: Path,
    breakage: Callable[[Path], None],
    kind: type[SurgeryError],
    fact: str,
) -> None:
    breakage(broken)
    with pytest.raises(kind, match=fact) as caught:
        evaluate([broken], [documents])
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_encoder_is_refused_because_it_reads_ahead(
    structure: Callable[[str], Path], documents: Path
) -> None:
    with pytest.raises(TrainError, match="reads ahead"):
        evaluate([structure("bert")], [documents])


def test_a_weight_file_alone_is_refused(make_model: Make, documents: Path) -> None:
    with pytest.raises(CheckpointError, match="a weight file alone cannot be evaluated"):
        evaluate([make_model(seed=0) / "model.safetensors"], [documents])


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"context": 33}, "33 is above the 32 tokens of .*tiny0"),
        ({"context": 0}, "0 tokens is no context"),
        ({"stride": 33}, "33 is outside 1 to 32"),
        ({"batch_tokens": 0}, "0 is no batch"),
        ({"bootstrap": 0}, "0 draws are none"),
        ({"device": "nonesuch"}, "nonesuch is not a device"),
        ({"dtype": "int8"}, "int8 is not a dtype"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    make_model: Make, documents: Path, options: dict[str, Any], fact: str
) -> None:
    with pytest.raises(RecipeError, match=fact):
        evaluate([make_model(seed=0)], [documents], **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(make_model: Make, documents: Path) -> None:
    with pytest.raises(RecipeError, match="cuda is not a device of this machine"):
        evaluate([make_model(seed=0)], [documents], device="cuda")


def test_no_model_is_refused(documents: Path) -> None:
    with pytest.raises(RecipeError, match="no model is named"):
        evaluate([], [documents])


def test_a_text_without_a_token_to_score_is_refused(make_model: Make, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x")
    with pytest.raises(TrainError, match="too short to score a token"):
        evaluate([make_model(seed=0, tokenizer={"bos": None})], [path])


def test_code_inside_a_checkpoint_is_not_run(broken: Path, documents: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (broken / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass C: ...\nclass M: ...\n")
    edit_config(
        broken,
        model_type="evil",
        auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    )
    with pytest.raises(CheckpointError, match="cannot load the config"):
        evaluate([broken], [documents])
    assert not trace.exists()


def test_bfloat16_computes_in_bfloat16(make_model: Make, documents: Path) -> None:
    (found,) = evaluate([make_model(seed=0)], [documents], dtype="bfloat16").models
    (exact,) = evaluate([make_model(seed=0)], [documents]).models
    assert found.dtype == "bfloat16"
    assert found.overall.bits_per_byte == pytest.approx(exact.overall.bits_per_byte, rel=0.01)


def test_nothing_is_printed_and_the_settings_of_transformers_are_kept(
    make_model: Make, documents: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    evaluate([make_model(seed=0)], [documents])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_running_out_of_memory_names_the_options_that_lower_it(
    make_model: Make, documents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    def forward(self: object, input_ids: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory\nmany lines of advice")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    with pytest.raises(TrainError, match="lower --batch-tokens or --context") as caught:
        evaluate([make_model(seed=0)], [documents])
    assert "\n" not in str(caught.value)
