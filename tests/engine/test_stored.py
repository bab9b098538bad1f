"""Stored tensors that are read when they are indexed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgery.checkpoint import make_view, open_checkpoint, read_rows
from surgery.digest import Leaves, checksums
from surgery.errors import ResultError
from surgery.plan import Step, Tell, TensorSpec
from surgery.slices import CHUNK, Sources
from surgery.stored import Stored, stream

SHAPES = {"matrix": (40, 24), "cube": (5, 12, 8), "vector": (37,), "long": (3000, 700)}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    generator = torch.Generator().manual_seed(0)
    made = {n: torch.randn(s, generator=generator).bfloat16() for n, s in SHAPES.items()}
    made["number"] = torch.tensor(1.5).bfloat16()
    made["empty"] = torch.zeros(0, 7).bfloat16()
    save_file(made, tmp_path_factory.mktemp("stored") / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path_factory.getbasetemp() / "stored0" / "m.safetensors")
    with Sources([checkpoint]) as sources:
        yield made, checkpoint, sources


def doubled(tensor):
    """A view of twice a stored tensor."""
    return make_view(
        tensor.name,
        dtype=tensor.dtype,
        shape=tensor.shape,
        stored=(tensor,),
        make=lambda read, start, count: 2 * read_rows(read, tensor, start, count).float(),
        why="doubled",
    )


INDICES = [
    ("matrix", slice(3, 9)),
    ("matrix", slice(30, 99)),
    ("matrix", slice(7, 7)),
    ("matrix", (slice(None), slice(5, 11))),
    ("long", (slice(100, 2900), slice(690, 700))),
    ("long", slice(0, 3000)),
    ("long", ...),
    ("cube", slice(1, 3)),
    ("cube", ...),
    ("vector", slice(2, 30)),
    ("vector", ...),
    ("number", ...),
    ("empty", ...),
]


@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize(("name", "index"), INDICES)
def test_an_index_gives_the_floats_there(held, name, index, viewed, width):
    made, checkpoint, sources = held
    info = checkpoint.tensors[name]
    stored = Stored(doubled(info) if viewed else info, sources, width)
    wanted = made[name].to(torch.float64 if width == 8 else torch.float32)[index]
    assert torch.equal(stored[index], (2 if viewed else 1) * wanted)
    assert stored.dtype == wanted.dtype


@pytest.mark.parametrize("viewed", [False, True])
def test_a_number_gives_an_entry_unread(held, viewed):
    made, checkpoint, sources = held
    info = checkpoint.tensors["cube"]
    entry = Stored(doubled(info) if viewed else info, sources, 4)[3]
    assert entry.shape == (12, 8)
    assert torch.equal(entry[2:5], (2 if viewed else 1) * made["cube"][3, 2:5].float())


def step(checkpoint, fn, code="BF16", name="long"):
    info = checkpoint.tensors[name]
    spec = TensorSpec(code, info.shape)
    return Step(outputs=(("out", spec),), inputs=(info,), fn=fn, streamed=True, scratch=99)


@pytest.mark.parametrize("rows", [1, 7, 3000])
def test_pieces_of_any_size_are_written_in_order(held, rows):
    made, checkpoint, sources = held
    given = step(checkpoint, lambda t: (t[at : at + rows] for at in range(0, t.shape[0], rows)))
    hashed = Leaves(checksums)
    views = [view for _, view in stream(given, sources, {0: hashed}, {})]
    raw = made["long"].view(torch.uint8).numpy().tobytes()
    assert b"".join(bytes(view) for view in views) == raw
    assert all(len(view) == CHUNK for view in views[:-1])
    told = Leaves(checksums)
    told.feed(memoryview(raw))
    assert hashed.end() == told.end()


def test_another_size_than_planned_is_an_error(held):
    _, checkpoint, sources = held
    with pytest.raises(ResultError, match="came out with 24 elements, planned were 960"):
        list(stream(step(checkpoint, lambda t: iter([t[:1]]), name="matrix"), sources, {}, {}))


def test_what_is_not_finite_is_an_error(held):
    _, checkpoint, sources = held
    bad = step(checkpoint, lambda t: iter([t[:] * np.inf]), name="matrix")
    with pytest.raises(ResultError, match="NaN or infinity"):
        list(stream(bad, sources, {}, {}))


def test_it_holds_what_it_says_and_what_views_hold(held):
    _, checkpoint, _ = held
    plain = step(checkpoint, lambda t: iter([t[:]]))
    assert plain.whole_bytes == 99
    view = replace(doubled(checkpoint.tensors["long"]), held=1000)
    assert replace(plain, inputs=(view,)).whole_bytes == 1099


def test_several_outputs_come_one_after_the_other_with_figures_among_them(held):
    made, checkpoint, sources = held
    info = checkpoint.tensors["matrix"]
    half = TensorSpec("F32", (info.shape[0] // 2, *info.shape[1:]))
    rows = half.shape[0]

    def fn(t):
        yield t[:1]
        yield t[1:rows]
        yield Tell(shared=2)
        yield t[rows : 2 * rows]

    given = Step(outputs=(("first", half), ("second", half)), inputs=(info,), fn=fn, streamed=True)
    told: dict[str, float] = {}
    found: dict[str, bytes] = {"first": b"", "second": b""}
    for name, view in stream(given, sources, {}, told):
        found[name] += bytes(view)
    assert found["first"] == made["matrix"][:rows].float().numpy().tobytes()
    assert found["second"] == made["matrix"][rows : 2 * rows].float().numpy().tobytes()
    assert told == {"shared": 2.0}
