"""Known answers of the scores of connectivity codes."""

import numpy as np
import pandas as pd
import pytest

from cortexicon.evaluation import EvaluationError
from cortexicon.evaluation.connectome import (
    GROUP_MEAN,
    RAW,
    bits_of,
    plain_system,
    score_cell,
    summary,
    tokens_of,
    top1_of_halves,
)
from cortexicon.evaluation.connectome_paired import differences
from cortexicon.evaluation.connectome_table import connectome_markdown

PAIRS = 45


def rows(count, seed):
    """Three patterns of people around a mean, float32 (count, PAIRS)."""
    patterns = np.random.default_rng(0).normal(size=(4, PAIRS))
    scores = np.random.default_rng(seed).normal(size=(count, 3)) * [3, 2, 1]
    return (patterns[3] * 4 + scores @ patterns[:3]).astype(np.float32), scores


def cell(name, seed=1):
    train, test = rows(80, seed)[0], rows(20, seed + 1)[0]
    ages = [rows(80, seed)[1][:, 0] * 3 + 30, rows(20, seed + 1)[1][:, 0] * 3 + 30]
    people = [pd.DataFrame({"age": age, "sex": np.where(age > 30, "m", "f")}) for age in ages]
    return score_cell(plain_system(train, name), train, test, (test, test), people, ("age", "sex"))


def test_raw_is_perfect_and_the_mean_tells_nothing():
    raw, mean = summary([cell(RAW)]), summary([cell(GROUP_MEAN)])
    assert raw["full"] == pytest.approx(1.0)
    assert raw["deviation"] == pytest.approx(1.0)
    assert raw["top1"] == 1.0
    assert raw["age_mae"] < 0.3 * mean["age_mae"]
    assert raw["sex_auc"] > 0.95
    assert mean["deviation"] is None
    assert mean["top1"] is None


def test_components_of_all_that_varies_lose_nothing():
    train, test = rows(80, 1)[0], rows(20, 2)[0]
    found = plain_system(train, "PCA 192, not quantised")(test)
    np.testing.assert_allclose(found, test, atol=1e-3)


def test_quantised_components_lose_something_but_not_all():
    train, test = rows(80, 1)[0], rows(20, 2)[0]
    found = plain_system(train, "PCA 192 + k-means 4096, triples")(test)
    error = ((found - test) ** 2).sum() / ((test - train.mean(0)) ** 2).sum()
    assert 0.001 < error < 0.5
    assert tokens_of("PCA 192 + k-means 4096, triples") == 64
    assert tokens_of("PCA 192, not quantised") is None


def test_halves_find_each_other_by_what_is_their_own():
    first = np.eye(4, 9) + 5.0
    assert top1_of_halves(first, first * 2 + 1) == 1.0
    assert top1_of_halves(first, np.roll(first, 1, axis=0)) == 0.0


def test_the_summary_pools_scans_and_averages_folds():
    one, two = cell(RAW, 1), cell(RAW, 5)
    one["full"], two["full"] = [0.1, 0.2, 0.3], [0.9, 1.0]
    one["top1"], two["top1"] = 1.0, 0.5
    row = summary([one, two])
    assert row["full"] == pytest.approx(0.3)
    assert row["top1"] == pytest.approx(0.75)
    assert row["folds"] == 2


def test_the_table_has_a_line_for_each_system():
    found = [
        {"system": name, "tokens": tokens_of(name), "bits": bits_of(name), "learned": False}
        | summary([cell(name)])
        for name in (RAW, "PCA 128 + k-means 4096, quadruples")
    ]
    text = connectome_markdown({"site_stratified": {"rows": found}}, ["Measured here."])
    assert "| raw connectivity | – | – | 1 | 20 | 1.000 | 1.000 | 1.000 |" in text
    assert "| PCA 128 + k-means 4096, quadruples | 32 | 384 |" in text
    assert text.endswith("Measured here.\n")


def test_differences_are_of_the_same_scans():
    """Known answers: errors a year larger, correlations a tenth lower, the ranking turned."""
    raw = cell(RAW)
    worse = {**raw, "deviation": raw["deviation"] - 0.1, "targets": {}}
    age, sex = raw["targets"]["age"], raw["targets"]["sex"]
    worse["targets"]["age"] = {**age, "y_hat": age["y"] + 1.0}
    worse["targets"]["sex"] = {**sex, "y_hat": -sex["y_hat"]}
    perfect = {**raw, "targets": {**raw["targets"], "age": {**age, "y_hat": age["y"]}}}
    found = differences([perfect, perfect], [worse, worse], resamples=50)
    assert found["deviation"] == pytest.approx([0.1] * 3)
    assert found["age_mae"] == pytest.approx([-1.0] * 3)
    value, low, high = found["sex_auc"]
    assert low <= value <= high
    assert value > 0.9  # near 1 less near 0
    assert differences([raw], [raw], resamples=20)["age_mae"] == [0.0, 0.0, 0.0]
    other = {**raw, "targets": {"age": {**age, "y": age["y"] + 1}}}
    with pytest.raises(EvaluationError, match="same people"):
        differences([raw], [other], resamples=5)
    with pytest.raises(EvaluationError, match="same folds"):
        differences([raw], [raw, raw], resamples=5)


def test_a_system_that_tells_nothing_has_no_difference_in_deviation():
    found = differences([cell(RAW)], [cell(GROUP_MEAN)], resamples=20)
    assert "deviation" not in found
    assert found["age_mae"][0] < 0
