"""The formulas, against values worked out by hand."""

import json

import numpy as np
import pytest

from cortexicon.evaluation import EvaluationError, write_json
from cortexicon.evaluation.rate_distortion import gaussian_reference
from cortexicon.evaluation.scores import (
    area_under_curve,
    balanced_accuracy,
    bootstrap_interval,
    code_usage,
    fisher_z,
    mean_absolute_error,
    pearson,
    prediction_r2,
    r2_from_sums,
    resampled_auc,
    squared_error_sums,
    valid_regions,
)


def pooled_r2(raw, reconstruction, mask=None):
    sse, sst = squared_error_sums(raw, reconstruction, mask)
    return float(r2_from_sums(np.nansum(sse), np.nansum(sst)))


def test_r2_of_the_truth_is_one_of_the_mean_zero_and_is_never_clipped():
    raw = np.random.default_rng(0).normal(3.0, 2.0, (50, 4))
    assert pooled_r2(raw, raw) == 1.0
    assert pooled_r2(raw, np.broadcast_to(raw.mean(0), raw.shape)) == pytest.approx(0.0)
    assert pooled_r2(raw, 2 * raw.mean(0) - raw) == pytest.approx(-3.0)


def test_r2_worked_by_hand():
    raw = np.array([[0.0, 1.0], [2.0, 5.0]])  # SST: 2 and 8
    reconstruction = np.array([[1.0, 1.0], [2.0, 3.0]])  # SSE: 1 and 4
    sse, sst = squared_error_sums(raw, reconstruction)
    np.testing.assert_allclose(sse, [1, 4])
    np.testing.assert_allclose(sst, [2, 8])


def test_constant_and_masked_regions_are_left_out():
    raw = np.random.default_rng(0).normal(size=(30, 3))
    raw[:, 1] = 4.0
    wrong = raw + np.array([0.0, 100.0, 100.0])
    assert pooled_r2(raw, wrong, np.array([True, True, False])) == 1.0
    assert valid_regions(raw).tolist() == [True, False, True]


def test_not_a_number_is_refused_unless_masked():
    raw = np.random.default_rng(0).normal(size=(30, 3))
    broken = raw.copy()
    broken[5, 2] = np.nan
    for pair in ((broken, raw), (raw, broken)):
        with pytest.raises(EvaluationError, match="region column 2"):
            squared_error_sums(*pair)
    assert pooled_r2(broken, raw, np.array([True, True, False])) == 1.0


def test_fisher_z_against_numpy_and_missing_pairs():
    series = np.random.default_rng(0).normal(size=(100, 4))
    expected = np.arctanh(np.corrcoef(series.T)[np.triu_indices(4, 1)])
    np.testing.assert_allclose(fisher_z(series), expected, rtol=1e-5)
    z = fisher_z(series, np.array([True, True, True, False]))
    assert np.isnan(z).tolist() == [False, False, True, False, True, True]


def test_a_decoder_that_flattens_a_region_is_not_spared():
    series = np.random.default_rng(0).normal(size=(100, 3))
    series[:, 2] = 0.0
    z = fisher_z(series, np.ones(3, bool))
    assert z[1] == z[2] == 0.0


def test_usage_of_a_known_histogram():
    found = code_usage(np.array([4, 4, 0, 0, 8, 0, 0, 0]))
    assert found["usage"] == 3 / 8
    assert found["entropy_bits"] == pytest.approx(1.5)
    assert found["perplexity"] == pytest.approx(2**1.5)
    assert code_usage(np.full(16, 3))["perplexity"] == pytest.approx(16)
    assert code_usage(np.array([5, 0]))["perplexity"] == 1.0


def test_regression_scores_by_hand():
    y, y_hat = np.array([10.0, 20, 30]), np.array([12.0, 20, 26])
    assert mean_absolute_error(y, y_hat) == 2.0
    assert prediction_r2(y, y_hat) == pytest.approx(1 - 20 / 200)
    assert pearson(y, y_hat) == pytest.approx(np.corrcoef(y, y_hat)[0, 1])
    assert np.isnan(pearson(y, np.full(3, 14.97)))


def test_classification_scores_by_hand():
    y = np.array(["a", "a", "a", "b"])
    assert balanced_accuracy(y, np.array(["a", "a", "a", "a"])) == 0.5
    assert balanced_accuracy(y, np.array(["a", "b", "a", "b"])) == pytest.approx((2 / 3 + 1) / 2)
    positive = np.array([False, False, True, True])
    assert area_under_curve(positive, np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert area_under_curve(positive, np.zeros(4)) == 0.5
    assert np.isnan(area_under_curve(np.ones(4, bool), np.zeros(4)))


def test_area_under_curve_agrees_with_scikit_learn_on_ties():
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(0)
    positive, score = generator.random(200) < 0.3, generator.integers(0, 12, 200)
    assert area_under_curve(positive, score) == pytest.approx(roc_auc_score(positive, score))


def test_bootstrap_interval_covers_a_mean_as_theory_says():
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(lambda rows: float(values[rows].mean()), 400, 2000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.012)
    assert high == pytest.approx(values.mean() + half, abs=0.012)


def test_gaussian_reference_of_white_noise_and_of_one_component():
    """n equal variances: R2 = 1 - 2^(-2 bits/n); a rank-one window is one variance."""
    noise = np.random.default_rng(0).normal(size=(4000, 4, 5))
    assert gaussian_reference([noise], 20.0) == pytest.approx(1 - 2**-2.0, abs=0.005)
    assert gaussian_reference([noise], 0.0) == pytest.approx(0.0, abs=0.01)
    single = np.random.default_rng(0).normal(size=(50, 1, 1)) * np.ones((50, 4, 5))
    assert gaussian_reference([single], 1.0) == pytest.approx(0.75)


def test_json_has_no_nan_and_no_numpy(tmp_path):
    path = write_json(
        tmp_path / "a" / "b.json",
        {"x": np.float32(0.5), "y": [float("nan"), np.int64(3)], 4: np.array([1.0, np.inf])},
    )
    text = path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text) == {"x": 0.5, "y": [None, 3], "4": [1.0, None]}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text())["x"] == 0.5  # the old file is whole


def test_resampled_auc_is_the_auc_of_every_resample():
    generator = np.random.default_rng(5)
    positive = generator.random(40) < 0.3
    table = np.round(positive[:, None] + generator.normal(size=(40, 2)), 1)  # with ties
    found = resampled_auc(positive, table, 50, seed=3)
    assert found.shape == (50, 2)
    again = np.random.default_rng(3)
    for row in found:
        drawn = again.integers(0, 40, 40)
        wanted = [area_under_curve(positive[drawn], column[drawn]) for column in table.T]
        np.testing.assert_allclose(row, wanted)
    table[0, 1] = np.nan
    assert np.isnan(resampled_auc(positive, table, 5)[:, 1]).all()
    assert np.isnan(resampled_auc(np.ones(40, bool), table, 5)).all()
