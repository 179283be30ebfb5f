"""Probes with known answers: alike, shifted, reshaped, copied and memorisable sets of rows."""

import numpy as np
import pytest
import torch

from cortexicon.evaluation import EvaluationError
from cortexicon.evaluation.code_geometry import geometry
from cortexicon.evaluation.probes import (
    PROBES,
    capped_share,
    control_rows,
    gap_closed,
    probe_alignment,
)

WIDTH, TYPES, CODES = 16, 1500, 1200


@pytest.fixture(scope="module")
def text():
    """A table of correlated Gaussian rows and Zipf-like counts."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(TYPES, WIDTH)) @ generator.normal(size=(WIDTH, WIDTH))
    counts = (20_000 / (1 + np.arange(TYPES))).astype(np.int64)
    return torch.from_numpy(rows).float(), torch.from_numpy(counts)


@pytest.fixture(scope="module")
def alike(text):
    """Codes from the same distribution as the text rows, and their counts."""
    generator = np.random.default_rng(1)
    mixing = np.random.default_rng(0)
    mixing.normal(size=(TYPES, WIDTH))
    rows = generator.normal(size=(CODES, WIDTH)) @ mixing.normal(size=(WIDTH, WIDTH))
    return torch.from_numpy(rows).float(), torch.from_numpy(generator.integers(1, 50, CODES))


def accuracies(row):
    return [row[name]["accuracy"] for name in PROBES]


def test_alike_clouds_are_not_told_apart(text, alike):
    found = probe_alignment(*alike, *text, splits=3)
    assert max(accuracies(found)) < 0.58
    assert all(len(found[name]["splits"]) == 3 and found[name]["sd"] >= 0 for name in PROBES)
    assert found["codes"] == CODES
    assert found["text_types"] == int((text[1] >= 5).sum())


def test_a_shift_is_found_by_every_probe(text, alike):
    rows, counts = alike
    found = probe_alignment(rows + 4 * rows.std(0), counts, *text, splits=2)
    assert min(accuracies(found)) > 0.95


def test_another_covariance_fools_the_logistic_probe_alone(text, alike):
    rows, counts = alike
    generator = np.random.default_rng(2)
    round_cloud = torch.from_numpy(generator.normal(size=rows.shape)).float() * rows.std(0)
    logistic, quadratic, mlp = accuracies(probe_alignment(round_cloud, counts, *text, splits=2))
    assert logistic < 0.58
    assert quadratic > 0.8
    assert mlp > 0.7


def test_another_shape_with_the_same_moments_is_found_by_the_mlp(text, alike):
    rows, counts = alike
    # Signs times a constant: per principal direction the text's mean and variance, not its shape.
    table = text[0]
    values, vectors = torch.linalg.eigh(torch.cov(table.T))
    signs = torch.from_numpy(np.random.default_rng(3).choice([-1.0, 1.0], rows.shape)).float()
    corners = table.mean(0) + signs * values.sqrt() @ vectors.T
    logistic, _, mlp = accuracies(probe_alignment(corners, counts, *text, splits=2))
    assert logistic < 0.6
    assert mlp > 0.75


def test_points_cannot_be_memorised(text):
    # One cloud in many dimensions under random labels: any part of it can be learned by heart.
    rows = torch.from_numpy(np.random.default_rng(4).normal(size=(1200, 200))).float()
    counts = torch.full((600,), 10)
    found = probe_alignment(rows[:600], counts, rows[600:], counts, splits=3)
    assert max(accuracies(found)) < 0.58


def test_controls_are_near_chance_and_copies_pass(text, alike):
    controls = control_rows(alike[1], *text, splits=2)
    assert set(controls) == {"text_against_text", "gaussian", "copied"}
    assert all(max(accuracies(row)) < 0.62 for row in controls.values())
    assert controls["copied"]["codes"] == CODES
    types = int((text[1] >= 5).sum())
    assert controls["text_against_text"]["codes"] == types // 2


def test_the_answer_follows_from_the_seed_and_touches_no_other_generator(text, alike):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.no_grad():
        first = probe_alignment(*alike, *text, splits=2, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert probe_alignment(*alike, *text, splits=2, seed=3) == first
    assert probe_alignment(*alike, *text, splits=2, seed=4) != first


def test_unused_codes_and_rare_types_do_not_count(text, alike):
    rows, counts = alike
    far = torch.full((100, WIDTH), 50.0)
    table, text_counts = text
    found = probe_alignment(
        torch.cat([rows, far]),
        torch.cat([counts, torch.zeros(100, dtype=counts.dtype)]),
        torch.cat([table, -far]),
        torch.cat([text_counts, torch.full((100,), 4)]),
        splits=2,
    )
    assert found == probe_alignment(*alike, *text, splits=2)


def test_capped_shares():
    share = capped_share(np.array([1000.0] + [1.0] * 999))
    assert share.sum() == pytest.approx(1)
    assert share[0] == pytest.approx(0.005)
    np.testing.assert_allclose(share[1:], 0.995 / 999)
    # A second type passes the cap only once the first one's excess is shared out.
    share = capped_share(np.array([500.0, 4.9] + [1.0] * 495))
    assert share.max() == pytest.approx(0.005)
    np.testing.assert_allclose(capped_share(np.array([7.0, 2.0, 1.0])), 1 / 3)


def test_share_of_the_gap_that_is_closed():
    def row(value):
        return {name: {"accuracy": value} for name in PROBES}

    assert gap_closed(row(0.7), row(0.9), row(0.5))["mlp"] == pytest.approx(0.5)
    assert gap_closed(row(0.7), row(0.5), row(0.5))["mlp"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, n, t, m: (c[:, :8], n, t, m), "width 16"),
        (lambda c, n, t, m: (c, n[:9], t, m), "9 code_counts"),
        (lambda c, n, t, m: (c, n, t, m[:9]), "expected 1500, found 9"),
        (lambda c, n, t, m: (c, n * 0, t, m), "used codes, found 0"),
        (lambda c, n, t, m: (c, n, t, m * 0), "20 text types"),
        (lambda c, n, t, m: (c * float("nan"), n, t, m), "code_rows must hold finite rows"),
    ],
)
def test_rows_that_cannot_be_probed(text, alike, change, message):
    with pytest.raises(EvaluationError, match=message):
        probe_alignment(*change(*alike, *text))


def test_geometry_of_a_rotation_and_of_a_shuffle(alike):
    codebook = torch.nn.functional.normalize(alike[0], dim=-1)
    rotation = torch.linalg.qr(
        torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    )
    used = torch.ones(CODES)
    kept = geometry(codebook, 7 + 3 * codebook @ rotation.Q, used)
    assert kept["neighbour_overlap"] > 0.99
    assert kept["close_pairs"] == kept["close_pairs_codebook"]
    shuffled = geometry(codebook, codebook.roll(CODES // 2, 0), used)
    assert shuffled["neighbour_overlap"] < 0.05
    assert shuffled["codes"] == CODES


def test_geometry_counts_collapsed_codes(alike):
    codebook = torch.nn.functional.normalize(alike[0], dim=-1)
    collapsed = codebook.clone()
    collapsed[1], collapsed[2] = collapsed[0], collapsed[0] + 1e-4
    before, after = (geometry(codebook, rows, alike[1]) for rows in (codebook, collapsed))
    assert after["close_pairs"] == before["close_pairs"] + 3
    assert after["share_close_pairs"] == pytest.approx(
        after["close_pairs"] / (CODES * (CODES - 1) / 2)
    )
    assert after["nearest_over_median"] < 1e-3 < before["nearest_over_median"]
    # An unused code is no part of it.
    unused = torch.ones(CODES)
    unused[1:3] = 0
    assert geometry(codebook, collapsed, unused)["close_pairs"] <= before["close_pairs"]


def test_geometry_refuses_what_does_not_fit(alike):
    rows = alike[0]
    with pytest.raises(EvaluationError, match="1199 in code_rows"):
        geometry(rows, rows[1:], alike[1])
    with pytest.raises(EvaluationError, match="at least 12 used codes, found 3"):
        geometry(rows, rows, torch.arange(CODES) < 3)
