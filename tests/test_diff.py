"""`surgery diff`: its figures against naive float64, its exactness, its forms, its refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cli import render
from cli.diff import collapse
from cli.main import main
from surgery import comparing, measure
from surgery.checkpoint import open_checkpoint
from surgery.comparing import WORKER_BYTES, compare
from surgery.errors import PlanError, StepError

FIGURES = ("relative_l2", "cosine", "sign_agreement", "norm_ratio", "max_abs", "equal")
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip


def write(path, tensors):
    """A bare checkpoint; `tensors` by name."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


def differ(a, b, **options):
    return compare(open_checkpoint(a), open_checkpoint(b), **options)


def pair(tmp_path, a, b, **options):
    """The comparison of two single tensors."""
    one, two = (
        write(tmp_path / "a.safetensors", {"t": a}),
        write(tmp_path / "b.safetensors", {"t": b}),
    )
    (found,) = differ(one, two, **options).tensors
    return found


def naive(a, b):
    """The definitions, in float64, over whole tensors."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    norm_x, norm_y = np.sqrt(np.sum(x * x)), np.sqrt(np.sum(y * y))
    return {
        "relative_l2": np.sqrt(np.sum((y - x) ** 2)) / norm_x,
        "cosine": np.sum(x * y) / (norm_x * norm_y),
        "sign_agreement": np.mean(np.sign(x) == np.sign(y)),
        "norm_ratio": norm_y / norm_x,
        "max_abs": np.max(np.abs(y - x)),
        "equal": np.mean(x == y),
    }


def assert_close(figures, expected):
    for name in FIGURES:
        assert getattr(figures, name) == pytest.approx(expected[name], rel=1e-12, abs=1e-14), name


def noisy(count, dtype, *, seed=0, scale=0.1):
    """Two tensors that share some elements, some signs and some zeros."""
    rng = torch.Generator().manual_seed(seed)
    a = torch.randn(count, generator=rng)
    b = a + scale * torch.randn(count, generator=rng)
    b[::7] = a[::7]
    a[::11] = 0
    b[::13] = 0
    return a.to(dtype), b.to(dtype)


@pytest.fixture
def small_pieces(monkeypatch):
    """Slices of 512 bytes and parts of 32 elements, so that small tensors have many."""
    monkeypatch.setattr(comparing, "CHUNK", 512)
    monkeypatch.setattr(measure, "PART", 32)


@pytest.mark.parametrize("b_dtype", DTYPES)
@pytest.mark.parametrize("a_dtype", DTYPES)
def test_figures_are_those_of_naive_float64(a_dtype, b_dtype, tmp_path, small_pieces):
    a, b = noisy(1000, torch.float64)
    a, b = a.to(DTYPES[a_dtype]), b.to(DTYPES[b_dtype])
    found = pair(tmp_path, a, b)
    assert (found.state, found.dtype_a, found.dtype_b) == ("compared", a_dtype, b_dtype)
    assert_close(found.figures, naive(a, b))


@pytest.mark.parametrize("count", [1, 31, 32, 33, 127, 128, 129, 255, 256, 257])
def test_figures_do_not_depend_on_where_slices_end(count, tmp_path, small_pieces):
    a, b = noisy(count, torch.float32, seed=count)
    a[0], b[0] = 1.0, 0.5
    assert_close(pair(tmp_path, a, b).figures, naive(a, b))


def test_slices_and_parts_of_the_real_size_agree_with_naive_float64(tmp_path):
    a, b = noisy((comparing.CHUNK // 4) + measure.PART + 5, torch.float32)
    assert_close(pair(tmp_path, a, b).figures, naive(a, b))


def test_a_matrix_is_one_long_vector(tmp_path):
    a, b = noisy(600, torch.float32)
    found = pair(tmp_path, a.view(20, 30), b.view(20, 30))
    assert found.shape == (20, 30)
    assert_close(found.figures, naive(a, b))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_identical_tensors_have_exact_figures(dtype, tmp_path, small_pieces):
    a, _ = noisy(1000, dtype)
    found = pair(tmp_path, a, a.clone())
    assert found.state == "identical"
    assert [getattr(found.figures, name) for name in FIGURES] == [0, 1, 1, 1, 0, 1]


def test_equal_values_in_another_dtype_have_exact_figures(tmp_path, small_pieces):
    a, _ = noisy(1000, torch.bfloat16)
    found = pair(tmp_path, a, a.float())
    assert found.state == "compared"
    assert [getattr(found.figures, name) for name in FIGURES] == [0, 1, 1, 1, 0, 1]


def test_minus_zero_equals_zero_though_the_bytes_differ(tmp_path):
    found = pair(tmp_path, torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found.state == "compared"
    assert (found.figures.relative_l2, found.figures.sign_agreement) == (0, 1)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.0, 0.0], [1.0, 0.0], {"relative_l2": None, "cosine": None, "norm_ratio": None}),
        ([1.0, 0.0], [0.0, 0.0], {"relative_l2": 1.0, "cosine": None, "norm_ratio": 0.0}),
        ([3.0, 4.0], [-3.0, -4.0], {"relative_l2": 2.0, "cosine": -1.0, "norm_ratio": 1.0}),
        ([3.0, 4.0], [6.0, 8.0], {"relative_l2": 1.0, "cosine": 1.0, "norm_ratio": 2.0}),
    ],
    ids=["from zero", "to zero", "negated", "doubled"],
)
def test_figures_without_a_value_are_none(a, b, expected, tmp_path):
    found = pair(tmp_path, torch.tensor(a), torch.tensor(b)).figures
    assert {name: getattr(found, name) for name in expected} == expected


UNMEASURED = {
    "integers": (torch.tensor([1, 2]), torch.tensor([1, 3]), "I64 is compared by bytes only"),
    "flags": (torch.tensor([True]), torch.tensor([False]), "BOOL is compared by bytes only"),
    "8-bit floats": (
        torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        torch.tensor([1.0, 3.0]).to(torch.float8_e4m3fn),
        "F8_E4M3 is compared by bytes only",
    ),
    "integers and floats": (
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([1.0, 2.0]),
        "I32 and F32 are not compared",
    ),
    "NaN": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), "NaN, infinity"),
    "infinity": (torch.tensor([float("inf"), 2.0]), torch.tensor([1.0, 2.0]), "NaN, infinity"),
    "float64 too large to square": (
        torch.tensor([1e200], dtype=torch.float64),
        torch.tensor([2e200], dtype=torch.float64),
        "too large to square",
    ),
}


@pytest.mark.parametrize(("a", "b", "note"), UNMEASURED.values(), ids=UNMEASURED)
def test_what_cannot_be_measured_is_told_to_differ(a, b, note, tmp_path):
    found = pair(tmp_path, a, b)
    assert (found.state, found.figures) == ("differs", None)
    assert note in found.note


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1, 2]),
        torch.tensor([float("nan")]),
        torch.zeros(3, dtype=torch.float8_e5m2),
        torch.zeros(0),
        torch.zeros(2, 2),
    ],
    ids=["integers", "NaN", "8-bit floats", "empty", "zeros"],
)
def test_the_same_bytes_are_identical_whatever_they_mean(tensor, tmp_path):
    found = pair(tmp_path, tensor, tensor.clone())
    assert found.state == "identical"
    assert (found.figures.relative_l2, found.figures.cosine) == (0, 1)


def layered(seed=0, *, layers=3, noise=0.0, dtype=torch.float32):
    """A tiny model with two modules a layer, an embedding and a norm."""
    rng, jitter = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
    made = {"model.embed_tokens.weight": torch.randn(8, 4, generator=rng)}
    for n in range(layers):
        made[f"model.layers.{n}.self_attn.q_proj.weight"] = torch.randn(4, 4, generator=rng)
        made[f"model.layers.{n}.mlp.experts.0.up.weight"] = torch.randn(6, 4, generator=rng)
        made[f"model.layers.{n}.mlp.experts.1.up.weight"] = torch.randn(6, 4, generator=rng)
    made["model.norm.weight"] = torch.ones(4)
    return {name: _moved(name, tensor, noise, jitter).to(dtype) for name, tensor in made.items()}


def _moved(name, tensor, noise, jitter):
    moves = "layers.1." in name or "embed" in name
    return tensor + noise * torch.randn(tensor.shape, generator=jitter) if moves else tensor


@pytest.fixture
def models(tmp_path):
    """A model, and one in which the embedding and layer 1 have moved."""
    a = write(tmp_path / "parent.safetensors", layered())
    return a, write(tmp_path / "child.safetensors", layered(noise=0.1))


def joined(made, words):
    return torch.cat([t.flatten() for name, t in made.items() if words in name])


def test_a_layer_is_compared_as_one_vector(models):
    found = differ(*models)
    assert list(found.layers) == [0, 1, 2]
    expected = naive(joined(layered(), "layers.1."), joined(layered(noise=0.1), "layers.1."))
    assert_close(found.layers[1].figures, expected)
    assert found.layers[0].figures.relative_l2 == 0
    assert (found.layers[0].identical, found.layers[1].identical) == (3, 0)


def test_identical_tensors_weigh_in_the_figures_of_the_whole(models):
    a, b = layered(), layered(noise=0.1)
    assert_close(differ(*models).total.figures, naive(joined(a, ""), joined(b, "")))


def test_experts_of_all_numbers_are_one_module(models):
    found = differ(*models)
    assert found.modules == ("self_attn.q_proj", "mlp.experts.*.up")
    expected = naive(joined(layered(), "layers.1.mlp"), joined(layered(noise=0.1), "layers.1.mlp"))
    assert_close(found.cells[1, "mlp.experts.*.up"].figures, expected)


def test_the_most_changed_come_first(tmp_path):
    a = layered()
    b = {name: t + i * 0.01 for i, (name, t) in enumerate(sorted(a.items()))}
    one, two = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    changes = [t.figures.relative_l2 for t in differ(one, two).most_changed(5)]
    assert len(changes) == 5
    assert changes == sorted(changes, reverse=True)


def test_what_only_one_side_has_is_listed(tmp_path):
    a, b = layered(), layered(layers=4)
    b["model.norm.weight"] = torch.ones(5)
    del b["model.embed_tokens.weight"]
    one, two = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    found = differ(one, two)
    assert found.only_in_a == ("model.embed_tokens.weight",)
    assert len(found.only_in_b) == 3
    assert all(".3." in name for name in found.only_in_b)
    (mismatch,) = found.mismatched
    assert (mismatch.shape_a, mismatch.shape_b) == ((4,), (5,))
    assert not found.is_identical


def test_without_layers_tensors_are_compared_all_the_same(tmp_path):
    found = pair(tmp_path, torch.ones(3), torch.zeros(3))
    assert (found.layer, found.module, found.figures.relative_l2) == (None, None, 1)


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path, small_pieces):
    a = write(tmp_path / "a.safetensors", layered(dtype=torch.bfloat16))
    b = write(tmp_path / "b.safetensors", layered(noise=0.3, dtype=torch.float16))
    results = {json.dumps(differ(a, b, workers=n).as_dict()) for n in (1, 2, 3, 8)}
    assert len(results) == 1


def test_memory_bounds_the_workers(models, monkeypatch):
    taken = []
    real = comparing.ThreadPoolExecutor
    monkeypatch.setattr(comparing, "ThreadPoolExecutor", lambda n: taken.append(n) or real(n))
    differ(*models, workers=8, memory=2 * WORKER_BYTES + 1)
    assert taken == [2]


def test_too_little_memory_is_refused(models):
    with pytest.raises(PlanError, match="less than one thread needs"):
        differ(*models, memory=WORKER_BYTES - 1)


def test_progress_ends_within_the_bytes_of_both(models, monkeypatch):
    monkeypatch.setattr(comparing, "TICK", 0.0)
    seen = []
    differ(*models, progress=lambda done, total: seen.append((done, total)))
    total = sum(open_checkpoint(path).nbytes for path in models)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_file_that_changes_meanwhile_is_noticed(models, monkeypatch):
    monkeypatch.setattr(comparing, "TICK", 0.0)
    with pytest.raises(StepError, match="changed while it was read"):
        differ(*models, progress=lambda *_: os.utime(models[1], ns=(1, 1)))


def test_an_interrupt_ends_the_comparison(models, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "TICK", 0.0)
    with pytest.raises(KeyboardInterrupt):
        differ(*models, progress=stop)


# The command


def shown(capsys, *arguments):
    """What a successful command prints."""
    capsys.readouterr()
    assert main(["diff", *map(str, arguments)]) == 0
    return capsys.readouterr().out


GROUP = {"tensors", "identical", "unmeasured", "norm_a", "norm_b", *FIGURES}
TENSOR = {"name", "layer", "module", "part", "dtype_a", "dtype_b", "state", "note", "shape"}


def test_the_keys_of_the_json_stay(models, capsys):
    found = json.loads(shown(capsys, *models, "--json"))
    assert set(found) == {
        "a", "b", "identical", "total", "parts", "layers", "modules", "cells", "tensors",
        "only_in_a", "only_in_b", "mismatched", "notes",
    }  # fmt: skip
    assert set(found["a"]) == {
        "ref", "name", "family", "tensors", "parameters", "bytes", "dtypes"
    }  # fmt: skip
    assert set(found["total"]) == GROUP
    assert set(found["layers"][0]) == GROUP | {"layer"}
    assert set(found["parts"][0]) == GROUP | {"part"}
    assert set(found["cells"][0]) == GROUP | {"layer", "module"}
    assert set(found["tensors"][0]) == TENSOR | (GROUP - {"tensors", "identical", "unmeasured"})


def test_the_json_holds_no_number_that_json_has_not(tmp_path, capsys):
    a = write(tmp_path / "a.safetensors", {"t": torch.zeros(2), "u": torch.tensor([float("nan")])})
    b = write(tmp_path / "b.safetensors", {"t": torch.ones(2), "u": torch.ones(1)})
    text = shown(capsys, a, b, "--json")
    assert json.loads(text, parse_constant=pytest.fail)["tensors"][0]["relative_l2"] is None


def test_piped_the_map_is_numbers(models, capsys):
    text = shown(capsys, *models)
    header = next(line for line in text.splitlines() if line.startswith("relative L2 of layer"))
    assert header.split()[4:] == ["self_attn.q_proj", "mlp.experts.*.up"]
    rows = text[text.index(header) :].splitlines()[1:4]
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert rows[0].split()[1:] == ["0", "0"]
    assert "\x1b" not in text


def test_identical_models_are_one_line_of_verdict(models, capsys):
    text = shown(capsys, models[0], models[0])
    assert "identical: all 11 tensors have the same bytes" in text
    assert text.count("\n") == 3


@pytest.mark.parametrize(("asked", "count"), [("2", 2), ("0", 0), ("all", 11), ("99", 4)])
def test_as_many_tensors_are_listed_as_asked(asked, count, models, capsys):
    text = shown(capsys, *models, "--tensors", asked)
    assert sum(line.startswith("model.") for line in text.splitlines()) == count


@pytest.fixture
def strangers(tmp_path):
    """Two files that share little: other layers, another shape, another dtype, integers, NaN."""
    a, b = layered(layers=2), layered(layers=60)
    a |= {"count": torch.tensor([1]), "wild": torch.tensor([float("nan")])}
    b |= {
        "count": torch.tensor([2]),
        "wild": torch.tensor([1.0]),
        "model.norm.weight": torch.ones(5),
    }
    a["lm_head.weight"], b["lm_head.weight"] = torch.ones(8, 4), torch.ones(8, 4).bfloat16() * 2
    b |= {f"extra{n}": torch.zeros(1) for n in range(30)}
    paths = (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    return write(paths[0], a), write(paths[1], b)


STRANGE = {
    "counts of what is apart": "204 only in B, 1 of another shape, 2 differ, but",
    "a name for many": "model.layers.{2-59}.mlp.experts.{0-1}.up.weight 116",
    "shapes": "model.norm.weight [4] [5]",
    "both dtypes": "lm_head.weight F32, BF16",
    "why not": "I64 is compared by bytes only",
    "how many are left": "and 12 more (--json lists them)",
}


@pytest.mark.parametrize("words", STRANGE.values(), ids=STRANGE)
def test_what_is_apart_is_printed(words, strangers, capsys):
    assert words in " ".join(shown(capsys, *strangers, "--tensors", "all").split())


def test_what_is_apart_is_in_the_page(strangers, tmp_path, capsys):
    pytest.importorskip("plotly")
    out = tmp_path / "diff.html"
    shown(capsys, *strangers, "--html", out)
    text = out.read_text(encoding="utf-8")
    for words in ("Differ, but were not measured", "Of another shape", "Only in b", "extra29"):
        assert words in text


@pytest.fixture
def terminal(monkeypatch):
    """A console that takes its output for a terminal of 60 columns."""

    def make(**environment):
        for name, value in ({"FORCE_COLOR": "1", "COLUMNS": "60"} | environment).items():
            monkeypatch.setenv(name, value)
        render._console.cache_clear()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    yield make
    render._console.cache_clear()


def test_on_a_terminal_the_map_is_coloured_blocks(models, terminal, capsys):
    terminal()
    text = shown(capsys, *models)
    row = next(line for line in text.splitlines() if line.startswith("self_attn.q_proj  "))
    assert row.count("\u2588") == 2
    assert row.count("\u00b7") == 4
    assert "\x1b[38" in row


def test_without_colour_the_map_is_shades(models, terminal, capsys):
    terminal(NO_COLOR="1")
    text = shown(capsys, *models)
    assert "\u2591" in text
    assert "\x1b[38" not in text


def test_a_map_wider_than_the_terminal_is_broken_into_blocks(tmp_path, terminal, capsys):
    terminal()
    a = write(tmp_path / "a.safetensors", layered(layers=90))
    b = write(tmp_path / "b.safetensors", layered(layers=90, noise=1.0))
    text = shown(capsys, a, b)
    rows = [line for line in text.splitlines() if line.startswith("self_attn.q_proj  ")]
    assert len(rows) == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0.w", "a.1.w", "a.3.w"], [("a.{0-1, 3}.w", 3)]),
        (["a.0.e.0.w", "a.0.e.1.w"], [("a.0.e.{0-1}.w", 2)]),
        (["a.7.w"], [("a.7.w", 1)]),
        (["plain", "odd{}.1.w"], [("plain", 1), ("odd{}.1.w", 1)]),
        (["a.0.w", "a.0.v"], [("a.0.w", 1), ("a.0.v", 1)]),
    ],
)
def test_names_that_differ_in_numbers_are_written_as_one(names, expected):
    assert collapse(names) == expected


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{a}", "nowhere"], 1, "does not exist"),
        (["{a}"], 2, "Missing argument"),
        (["{a}", "{a}", "--tensors", "some"], 2, "is not a number"),
        (["{a}", "{a}", "--memory", "much"], 2, "is not a size"),
        (["{a}", "{a}", "--memory", "2M"], 1, "less than one thread needs"),
        (["{a}", "{a}", "--workers", "0"], 2, "--workers"),
        (["{a}", "{a}", "--html", "{a}"], 1, "exists"),
        (["{a}", "{a}", "--html", "{a}", "--force"], 1, "is one of the inputs"),
        (["{a}", "{a}", "--html", "{dir}"], 1, "is a directory"),
        (["{a}", "{a}", "--html", "{dir}/no/x.html"], 1, "does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(arguments, code, words, models, capsys):
    places = {"a": models[0], "dir": models[0].parent}
    assert main(["diff", *(text.format(**places) for text in arguments)]) == code
    seen = capsys.readouterr()
    assert words in seen.err
    assert seen.err.count("\n") == 1
    assert seen.out == ""


PROBE = """
import sys
from cli.main import main
code = main(["diff", *sys.argv[1:]])
print("torch" in sys.modules, file=sys.stderr)
"""


def test_a_wrong_input_is_refused_without_torch(models):
    words = [sys.executable, "-c", PROBE, str(models[0]), "nowhere"]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False"


# The page


class Loads(HTMLParser):
    """Collects whatever a page would load or embed, and its texts by element."""

    def __init__(self):
        super().__init__()
        self.loaded, self.data, self._in_data = [], "", False
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        named = dict(attrs)
        self.loaded += [named[key] for key in ("src", "href", "action", "data") if named.get(key)]
        self._in_data = named.get("id") == "data"

    def handle_endtag(self, tag):
        self._in_data = False

    def handle_data(self, data):
        self.data += data if self._in_data else ""


def page_of(out):
    parser = Loads()
    parser.feed(out.read_text(encoding="utf-8"))
    return parser


@pytest.fixture
def page(models, tmp_path, capsys):
    pytest.importorskip("plotly")
    out = tmp_path / "diff.html"
    shown(capsys, *models, "--html", out)
    return out


def test_the_page_loads_nothing_and_forbids_to(page):
    assert page_of(page).loaded == []
    assert "default-src 'none'" in page.read_text(encoding="utf-8")


def test_the_page_holds_every_figure_and_no_path(page, models, tmp_path):
    expected = json.loads(json.dumps(differ(*models).as_dict()))
    del expected["a"]["ref"], expected["b"]["ref"]
    assert json.loads(page_of(page).data) == expected
    assert str(tmp_path) not in page.read_text(encoding="utf-8")


def test_the_page_is_one_file_and_leaves_nothing_beside_it(page):
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "child.safetensors", "diff.html", "parent.safetensors"
    ]  # fmt: skip


def test_the_page_draws_a_map_of_each_figure_and_the_layers(page):
    text = page.read_text(encoding="utf-8")
    for name in ("map-relative_l2", "map-cosine", "map-signs", "map-norm_ratio", "lines"):
        assert f'id="{name}"' in text
    assert "mlp.experts.*.up" in text


@pytest.mark.parametrize(("spread", "ticks"), [(0.0, False), (3.0, True)], ids=["even", "wide"])
def test_changes_of_many_sizes_are_coloured_by_powers_of_ten(spread, ticks, tmp_path):
    pytest.importorskip("plotly")
    from surgery.charts import METRICS, heat_map

    a = layered()
    b = {n: t * (1 + 10 ** (-spread * ("layers.0" in n)) / 9) for n, t in a.items()}
    one, two = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    assert ("ticktext" in heat_map(differ(one, two), METRICS[0])) is ticks


def test_the_same_comparison_gives_the_same_page(page, models, tmp_path, capsys):
    again = tmp_path / "again.html"
    shown(capsys, *models, "--html", again)
    assert again.read_bytes() == page.read_bytes()


def test_names_cannot_put_code_into_the_page(tmp_path, capsys):
    pytest.importorskip("plotly")
    evil = "model.layers.0.</script><img src=x onerror=alert(1)>.weight"
    a = write(tmp_path / "a.safetensors", {evil: torch.ones(2), "<b>only": torch.ones(1)})
    b = write(tmp_path / "b.safetensors", {evil: torch.zeros(2)})
    out = tmp_path / "diff.html"
    shown(capsys, a, b, "--html", out)
    parser = page_of(out)
    assert "img" not in parser.tags
    assert parser.loaded == []
    assert evil in json.loads(parser.data)["tensors"][0]["name"]


def test_without_layers_the_page_has_tables_only(tmp_path, capsys):
    pytest.importorskip("plotly")
    a = write(tmp_path / "a.safetensors", {"t": torch.ones(2)})
    out = tmp_path / "diff.html"
    shown(capsys, a, a, "--html", out)
    text = out.read_text(encoding="utf-8")
    assert len(text) < 50_000
    assert "All 1 tensors have the same bytes." in text


def test_a_page_is_replaced_with_force_only(page, models, capsys):
    page.write_text("mine")
    assert main(["diff", *map(str, models), "--html", str(page)]) == 1
    assert page.read_text() == "mine"
    shown(capsys, *models, "--html", page, "--force")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_without_plotly_nothing_is_read(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("surgery.charts.find_spec", lambda _: None)
    monkeypatch.setattr("cli.diff.open_checkpoint", lambda *_, **__: pytest.fail("opened"))
    assert main(["diff", *map(str, models), "--html", str(tmp_path / "x.html")]) == 2
    assert "pip install 'model-surgery[html]'" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_leaves_nothing(models, tmp_path, monkeypatch, capsys):
    def full(_):
        raise OSError(28, "No space left on device")

    pytest.importorskip("plotly")
    monkeypatch.setattr("surgery.report_page.os.fsync", full)
    before = sorted(tmp_path.iterdir())
    assert main(["diff", *map(str, models), "--html", str(tmp_path / "x.html")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=10000",
)  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_the_page(page, tmp_path):
    words = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*words, page.as_uri()], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count('class="heatmaplayer') == 4
    assert done.stdout.count('class="scatterlayer') >= 1
    assert ">mlp.experts.*.up</text>" in done.stdout


# The repository's own models


def test_a_finetuned_model_is_nearer_to_its_parent_than_a_stranger(structure, fixtures_dir):
    places = [fixtures_dir / name for name in ("base", "v2")]
    if not all((place / "model.safetensors").exists() for place in places):
        pytest.skip("the trained models are not here")
    found = differ(*places).total.figures
    stranger = differ(structure("llama"), structure("mistral")).total.figures
    assert found.relative_l2 < 0.5 < stranger.relative_l2
    assert found.cosine > 0.9 > stranger.cosine


def test_an_expanded_model_keeps_every_tensor_of_its_base(fixtures_dir, tmp_path):
    base, grown = fixtures_dir / "base", tmp_path / "grown"
    if not (base / "model.safetensors").exists():
        pytest.skip("the trained models are not here")
    assert main(["stack", str(base), "--factor", "2", "-o", str(grown)]) == 0
    found = differ(base, grown)
    outside = [t for t in found.tensors if t.layer is None]
    assert outside
    assert {t.state for t in outside} == {"identical"}
    assert found.only_in_a == ()
    assert len(found.only_in_b) == 4 * 9
