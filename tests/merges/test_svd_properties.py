"""What the papers promise of the methods on singular values, checked on their results alone."""

import pytest
import torch

from merges.iso_c import iso_c
from merges.iso_cts import iso_cts
from merges.knots_ties import knots_ties
from merges.stages.calibrate import calibrated_after
from merges.svc import svc
from merges.ties import ties
from merges.tsv_m import tsv_m
from merges.wudi import wudi
from reference import svc as naive
from reference.wudi import objective
from surgery.apply import apply

SHAPES = [(60, 24), (24, 60), (32, 32)]
FAMILY = [iso_c, iso_cts, knots_ties, svc, tsv_m, wudi]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def family(shape, models=3, *, rank=None):
    base = noise(*shape)
    if rank is None:
        deltas = [0.01 * noise(*shape, seed=n + 1) for n in range(models)]
    else:
        sides = [(shape[0], rank), (rank, shape[1])]
        pairs = [[noise(*s, seed=10 * n + k) for k, s in enumerate(sides)] for n in range(models)]
        deltas = [0.01 * a @ b for a, b in pairs]
    return base, deltas


def merged(method, base, deltas, **params):
    """The merged task vector, of a merge by itself."""
    found = apply(method, [base + d for d in deltas], base=base, **{"lambda": 1.0, **params})
    return found - base


def values(matrix):
    return torch.linalg.svdvals(matrix)


def close(a, b, *, share=1e-9):
    return float((a - b).abs().max()) <= share * float(b.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_flattens_the_spectrum_and_keeps_its_sum(shape):
    base, deltas = family(shape)
    found = values(merged(iso_c, base, deltas))
    assert close(found, values(sum(deltas)).mean().expand_as(found))


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_gives_nothing_to_directions_without_any(shape):
    base, deltas = family(shape, rank=3)
    found = values(merged(iso_c, base, deltas))
    assert close(found[:9], values(sum(deltas))[:9].mean().expand(9))
    assert float(found[9]) < 1e-9 * float(found[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_keeps_the_singular_vectors(shape):
    base, deltas = family(shape)
    u, _, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    inner = u.T @ merged(iso_c, base, deltas) @ vh.T
    assert close(inner, torch.diag(inner.diagonal()))


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_has_the_tasks_singular_values_on_orthonormal_vectors(shape):
    base, deltas = family(shape)
    each = min(shape) // 3
    wanted = torch.cat([values(delta)[:each] for delta in deltas]).sort(descending=True).values
    found = values(merged(tsv_m, base, deltas))
    assert close(found[: wanted.numel()], wanted)
    assert float(found[wanted.numel() :].sum()) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_tsv_m_of_orthogonal_tasks_is_their_sum(shape):
    base, _ = family(shape)
    u, _, vh = torch.linalg.svd(noise(*shape, seed=9), full_matrices=False)
    spectra = torch.linspace(1, 2, 6).double()
    deltas = [
        u[:, n : n + 2] @ torch.diag(spectra[n : n + 2]) @ vh[n : n + 2] for n in range(0, 6, 2)
    ]
    assert close(merged(tsv_m, base, deltas), sum(deltas))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("common", [0.3, 0.8])
def test_iso_cts_is_flat_and_holds_the_common_space(shape, common):
    base, deltas = family(shape)
    found = merged(iso_cts, base, deltas, common=common)
    spectrum = values(found)
    assert close(spectrum, spectrum.mean().expand_as(spectrum), share=1e-8)
    size = min(shape)
    shared = size - 3 * round((size - int(size * common)) / 3)  # so that tasks get equal shares
    u = torch.linalg.svd(sum(deltas), full_matrices=False).U[:, :shared]
    own = torch.linalg.svd(found, full_matrices=False).U
    assert close(own @ (own.T @ u), u, share=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_with_all_in_common_is_iso_c(shape):
    base, deltas = family(shape)
    one, other = merged(iso_cts, base, deltas, common=1.0), merged(iso_c, base, deltas)
    assert close(one, other)


@pytest.mark.parametrize("shape", [*SHAPES, (8, 60)])
def test_wudi_in_closed_form_has_no_slope(shape):
    base, deltas = family(shape)
    t = merged(wudi, base, deltas, ridge=0.0).requires_grad_(True)
    objective(t, deltas).backward()
    start = sum(deltas).requires_grad_(True)
    objective(start, deltas).backward()
    assert float(t.grad.norm()) < 1e-9 * float(start.grad.norm())


@pytest.mark.parametrize("size", [1.0, 100.0])
def test_wudi_in_closed_form_goes_below_300_steps_of_the_authors_optimiser(size):
    base, deltas = family((48, 40))
    deltas = [size * delta for delta in deltas]
    closed = float(objective(merged(wudi, base, deltas, ridge=0.0), deltas))
    stepwise = float(objective(merged(wudi, base, deltas, solver="adam"), deltas))
    start = float(objective(sum(deltas), deltas))
    assert closed < 0.999 * stepwise
    assert stepwise < start
    # Steps of 1e-5 lead nowhere where weights are large: the published recipe knows one scale.
    assert (stepwise > 0.9 * start) == (size > 1)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_wudi_in_closed_form_does_not_depend_on_the_scale(factor, ridge):
    base, deltas = family((30, 20))
    scaled = merged(wudi, base, [factor * delta for delta in deltas], ridge=ridge)
    assert close(scaled / factor, merged(wudi, base, deltas, ridge=ridge), share=1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (8, 60)])
@pytest.mark.parametrize("ridge", [0.1, 1.0])
def test_wudi_with_a_ridge_has_no_slope_but_back_to_the_sum(shape, ridge):
    base, deltas = family(shape)
    t = merged(wudi, base, deltas, ridge=ridge).requires_grad_(True)
    stay = ridge * 3 / shape[1]  # each task's Gram matrix has a trace of 1
    (objective(t, deltas) + stay * (t - sum(deltas)).square().sum()).backward()
    start = sum(deltas).requires_grad_(True)
    objective(start, deltas).backward()
    assert float(t.grad.norm()) < 1e-9 * float(start.grad.norm())


def test_wudi_with_a_large_ridge_is_the_sum():
    base, deltas = family((30, 20))
    assert close(merged(wudi, base, deltas, ridge=1e9), sum(deltas), share=1e-6)


def test_knots_turns_with_the_task_vectors():
    base, deltas = family((20, 30))
    turn = torch.linalg.qr(noise(20, 20, seed=5)).Q
    turned = merged(knots_ties, base, [turn @ delta for delta in deltas])
    assert close(turned, turn @ merged(knots_ties, base, deltas))


def test_knots_with_nothing_trimmed_and_one_task_is_the_task():
    base, deltas = family((20, 30))
    assert close(merged(knots_ties, base, deltas[:1], density=1.0), deltas[0])


def test_knots_elects_nothing_where_tasks_cancel():
    base, (delta, *_) = family((20, 30))
    found = merged(knots_ties, base, [delta, delta], weight=[1.0, -1.0], density=1.0)
    assert float(found.abs().max()) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("factor", ["paper", "code"])
def test_svc_counts_a_task_once_however_often_it_is_there(shape, factor):
    base, (delta, *_) = family(shape)
    found = merged(svc, base, [delta] * 4, factor=factor)
    assert close(found, delta, share=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_svc_leaves_tasks_that_share_nothing(shape):
    base, _ = family(shape)
    u, _, vh = torch.linalg.svd(noise(*shape, seed=9), full_matrices=False)
    deltas = [3 * u[:, :1] @ vh[:1], 2 * u[:, 1:2] @ vh[1:2]]
    found = merged(svc, base, deltas, factor="code", alpha=1.0)
    assert close(found, sum(deltas))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_svc_changes_singular_values_only(shape, alpha):
    base, deltas = family(shape)
    u, _, vh = torch.linalg.svd(sum(deltas), full_matrices=False)
    inner = u.T @ merged(svc, base, deltas, alpha=alpha) @ vh.T
    assert close(inner, torch.diag(inner.diagonal()))


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_of_one_model_add_no_directions(shape):
    """Polar factors on the range: the authors' SVD would fill up what copies leave empty."""
    base, (delta, *_) = family(shape)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    most = min(shape) // 3
    first = u[:, :most] @ torch.diag(s[:most]) @ vh[:most]
    assert close(merged(tsv_m, base, [delta] * 3), first, share=1e-7)
    assert close(merged(wudi, base, [delta] * 3, ridge=0.0), delta, share=1e-6)
    flat = 3 * s.mean() * u @ vh
    assert close(merged(iso_c, base, [delta] * 3), flat, share=1e-7)


@pytest.mark.parametrize("method", FAMILY, ids=lambda m: m.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_base_that_nobody_changed_stays(method, shape):
    base = noise(*shape).float()
    base[0, :3] = torch.tensor([-0.0, 0.0, -1.0])
    found = apply(method, [base.clone()] * 3, base=base)
    assert torch.equal(found.view(torch.int32), base.view(torch.int32))


@pytest.mark.parametrize("method", [iso_c, tsv_m, svc], ids=lambda m: m.name)
def test_a_row_that_nobody_changed_stays(method):
    base, deltas = family((60, 24))
    for delta in deltas:
        delta[7:11] = 0
    found = apply(method, [(base + d).float() for d in deltas], base=base.float())
    assert torch.equal(found[7:11], base.float()[7:11])
    assert not torch.equal(found[11], base.float()[11])


@pytest.mark.parametrize("method", [iso_c, tsv_m], ids=lambda m: m.name)
def test_a_matrix_and_its_transpose_are_merged_alike(method):
    base, deltas = family((40, 24))
    turned = merged(method, base.T.contiguous(), [d.T.contiguous() for d in deltas])
    assert close(turned.T, merged(method, base, deltas))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 12, 9)])
def test_calibration_after_a_plain_sum_is_svc(shape):
    base, deltas = family(shape)
    models = [base + d for d in deltas]
    plain = base + sum(deltas)
    after = torch.cat(list(calibrated_after(base, models, plain, alpha=0.5))).view(shape)
    assert close(after - base, merged(svc, base, deltas, alpha=0.5))


@pytest.mark.parametrize("shape", SHAPES)
def test_calibration_after_another_method_is_the_papers(shape):
    base, deltas = family(shape)
    models = [base + d for d in deltas]
    trimmed = apply(ties, models, base=base, density=0.3, weight=1.0)
    after = torch.cat(list(calibrated_after(base, models, trimmed))).view(shape)
    change = trimmed - base
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    for r in range(min(shape)):
        counts = [naive.count(u[:, r] @ change, u[:, r] @ d, d.norm()) for d in deltas]
        s[r] *= len(deltas) / sum(max(0.1, count) for count in counts)
    assert close(after - base, u @ torch.diag(s) @ vh, share=1e-8)


def test_calibration_leaves_what_is_no_matrix():
    base, deltas = family((4, 3))
    (after,) = calibrated_after(base, [base], base + deltas[0], rule="mean")
    assert torch.equal(after, base + deltas[0])
