"""Another model's tokenizer: shared tokens keep rows and logits, others are sums by pursuit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import speakers
import torch
from safetensors.torch import load_file, save_file

from growth.vocab import sparse
from growth.vocab.pursuit import inverse_lengths, pursue
from growth.vocab.sparse import Sparse, _make
from growth.vocab.transplant import transplant
from surgery.checkpoint import open_checkpoint
from surgery.errors import PlanError, RecipeError
from surgery.preflight import preflight
from surgery.run import run

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def naive(target, atoms, steps):
    """Least squares over the atoms chosen so far, anew at every step: numpy, one target."""
    taken, weights, left = [], np.zeros(0), target.copy()
    lengths = np.linalg.norm(atoms, axis=1)
    for _ in range(steps):
        likeness = np.abs(atoms @ left) / lengths
        likeness[taken] = -1
        taken.append(int(likeness.argmax()))
        weights = np.linalg.lstsq(atoms[taken].T, target, rcond=None)[0]
        left = target - atoms[taken].T @ weights
    return taken, weights, left


@pytest.mark.parametrize(("atoms", "columns", "steps"), [(50, 16, 1), (50, 16, 8), (300, 64, 20)])
def test_many_pursuits_at_once_are_those_one_by_one(atoms, columns, steps):
    generator = torch.Generator().manual_seed(atoms)
    d = torch.randn(atoms, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(12, columns, generator=generator, dtype=torch.float64)
    taken, weights, left = pursue(x, d, inverse_lengths(d, like=d), steps)
    for row in range(12):
        wanted = naive(x[row].numpy(), d.numpy(), steps)
        assert taken[row].tolist() == wanted[0]
        np.testing.assert_allclose(weights[row], wanted[1], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(left[row], wanted[2], atol=1e-10)


def test_a_sum_of_few_atoms_is_found():
    generator = torch.Generator().manual_seed(1)
    d = torch.randn(200, 128, generator=generator, dtype=torch.float64)
    x = 2.0 * d[7] - 0.5 * d[90] + d[150]
    taken, weights, left = pursue(x[None], d, inverse_lengths(d, like=d), 3)
    assert sorted(taken[0].tolist()) == [7, 90, 150]
    assert dict(zip(taken[0].tolist(), weights[0].tolist(), strict=True))[7] == pytest.approx(2)
    assert float(left.abs().max()) < 1e-12


def test_atoms_that_add_nothing_weigh_nothing():
    d = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    taken, weights, left = pursue(
        torch.tensor([[4.0, 5.0]], dtype=torch.float64), d, inverse_lengths(d, like=d), 3
    )
    assert torch.isfinite(weights).all()
    assert (weights[0] @ d[taken[0]]).tolist() == pytest.approx([4, 0])
    assert left[0].tolist() == pytest.approx([0, 5])


def test_blocks_of_atoms_change_nothing(monkeypatch):
    from growth.vocab import pursuit

    generator = torch.Generator().manual_seed(3)
    d, x = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (90, 5))
    inverse = inverse_lengths(d, like=d)
    whole = pursue(x, d, inverse, 6)
    monkeypatch.setattr(pursuit, "BLOCK", 16 * 7)
    assert torch.equal(pursue(x, d, inverse, 6)[0], whole[0])


def noisy(folder, name, *, width, tied, dtype=torch.float32, special=("<|end|>",), padding=0):
    """A speaker with random rows of any width; one token more where it says so."""
    core = speakers.bpe(speakers.TEXTS[name], special)
    path = speakers.save(folder / name, core, mark=0, tied=tied, padding=padding)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(len(name) + width)
    shapes = {
        key: [width if size == speakers.WIDTH else size for size in tensor.shape]
        for key, tensor in tensors.items()
    }
    made = {k: torch.randn(s, generator=generator).mul(0.3).to(dtype) for k, s in shapes.items()}
    save_file(made, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"hidden_size": width, "intermediate_size": width, "head_dim": width // 2}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """Base, donor and result, by method and by whether the base and the donor are tied."""
    made = {}

    def get(method, base_tied=False, donor_tied=False, dtype=torch.float32):
        key = (method, base_tied, donor_tied, dtype)
        if key not in made:
            folder = tmp_path_factory.mktemp("moved")
            base = noisy(folder, "fox", width=8, tied=base_tied, dtype=dtype)
            special = ("<|end|>", "<|other|>")
            donor = noisy(
                folder, "sums", width=12, tied=donor_tied, special=special, dtype=dtype, padding=3
            )
            plan = transplant(*map(open_checkpoint, (base, donor)), method=method, k=5)
            made[key] = (base, donor, run(plan, folder / "out").out, plan)
        return made[key]

    return get


def parts(path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model, AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base_tied", "donor_tied"), [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("method", ["omp", "subword", "mean"])
def test_logits_of_shared_tokens_stay(method, base_tied, donor_tied, dtype, moved):
    base, _, out, plan = moved(method, bool(base_tied), bool(donor_tied), dtype)
    (before, old), (after, new) = parts(base), parts(out)
    shared = [token for token in new.get_vocab() if token in old.get_vocab()]
    one, two = (t.convert_tokens_to_ids(shared) for t in (old, new))
    with torch.no_grad():
        a = before(torch.tensor([one[:40]])).logits[..., one]
        b = after(torch.tensor([two[:40]])).logits[..., two]
    assert torch.equal(a, b)
    assert plan.facts["shared"] == len(shared) < len(new)


@pytest.mark.parametrize(("base_tied", "donor_tied"), [(0, 0), (1, 0), (0, 1)])
def test_pursuit_takes_the_donors_sums_of_the_bases_rows(base_tied, donor_tied, moved):
    base, donor, out, _ = moved("omp", bool(base_tied), bool(donor_tied))
    old, new = (read_ids(path) for path in (base, donor))
    mine, theirs, made = (load_file(p / "model.safetensors") for p in (base, donor, out))
    shared = sorted((t for t in new if t in old), key=new.__getitem__)
    for name in (EMBEDDING,) if base_tied else (EMBEDDING, HEAD):
        other = theirs[name if name in theirs else EMBEDDING].double().numpy()
        atoms = other[[new[t] for t in shared]]
        rows = mine[name].double().numpy()[[old[t] for t in shared]]
        for token in [t for t in new if t not in old]:
            taken, weights, _ = naive(other[new[token]], atoms, 5)
            wanted = weights @ rows[taken]
            np.testing.assert_allclose(made[name][new[token]], wanted, rtol=1e-5, atol=1e-6)


def read_ids(path):
    from surgery.vocabulary import read_vocabulary

    return read_vocabulary(open_checkpoint(path)).ids


def test_subword_rows_are_the_means_of_the_old_pieces(moved):
    from transformers import AutoTokenizer

    base, donor, out, _ = moved("subword")
    old, new = (AutoTokenizer.from_pretrained(p) for p in (base, donor))
    mine, made = (load_file(p / "model.safetensors")[EMBEDDING] for p in (base, out))
    for token in ("Ġnumbers", "<|other|>"):
        number = new.convert_tokens_to_ids(token)
        pieces = old(new.decode([number]))["input_ids"]
        assert len(pieces) > 1
        np.testing.assert_allclose(made[number], mine[pieces].double().mean(0), rtol=1e-6)


def test_tokenizer_and_ids_are_the_donors(moved):
    base, donor, out, _ = moved("omp")
    del base
    (_, theirs), (model, ours) = parts(donor), parts(out)
    text = "the numbers 123 <|other|> fox"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert model.config.eos_token_id == theirs.eos_token_id == model.generation_config.eos_token_id
    assert model.config.vocab_size == len(ours) + 3


def test_the_result_does_not_depend_on_threads(moved, tmp_path, monkeypatch):
    base, donor, out, _ = moved("omp")
    monkeypatch.setattr(sparse, "_threads", lambda: 1)
    plan = transplant(*map(open_checkpoint, (base, donor)), k=5)
    again = run(plan, tmp_path / "out", workers=1).out
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_pursuit_beyond_the_memory_is_refused_before_it_starts(moved, tmp_path):
    base, donor, _, _ = moved("omp")
    plan = transplant(*map(open_checkpoint, (base, donor)), k=5)
    with pytest.raises(PlanError, match="memory"):
        preflight(plan, tmp_path / "out", memory=1 << 20)


@pytest.mark.parametrize("read", [1, 8, 1 << 20])
def test_rows_the_donor_has_not_are_copied_all_the_same(read, monkeypatch):
    monkeypatch.setattr(sparse, "READ", read)
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(6, 4, generator=generator), torch.randn(4, 4, generator=generator)]
    ids = [np.array(x) for x in ([0, 1, 5], [3, 4, 2], [0, 1], [2, 3])]
    rows = Sparse(size=7, shared=ids[0], base=ids[1], donor=ids[2], fresh=ids[3], steps=2)

    class Memory:
        dtype = torch.float64

        def __init__(self, table):
            self.table, self.shape = table.double(), tuple(table.shape)

        def __getitem__(self, index):
            return self.table[index]

    *blocks, _ = _make(*map(Memory, tables), rows, ("F32", "F32"))
    made = torch.cat(blocks)
    assert torch.equal(made[[0, 1, 5]], tables[0][[3, 4, 2]].double())
    assert torch.allclose(made[4], tables[0].double().mean(0))
    for new in (2, 3):
        atoms = tables[1][:2].double().numpy()
        taken, weights, _ = naive(tables[1][new].double().numpy(), atoms, 2)
        wanted = weights @ tables[0][[3, 4]].double().numpy()[taken]
        np.testing.assert_allclose(made[new], wanted, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "fvt"}, "is none of omp"),
        ({"k": 0}, "is below 1"),
        ({"k": 10_000}, "are needed"),
    ],
)
def test_a_wrong_ask_is_one_sentence(options, told, moved):
    base, donor, _, _ = moved("omp")
    with pytest.raises(RecipeError, match=told) as caught:
        transplant(*map(open_checkpoint, (base, donor)), **options)
    assert "\n" not in str(caught.value)


def test_the_same_tokenizer_is_refused(fixtures_dir):
    base, other = (open_checkpoint(fixtures_dir / name) for name in ("base", "uni"))
    with pytest.raises(RecipeError, match="the same tokens"):
        transplant(base, other)
