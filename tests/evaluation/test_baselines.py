"""Baselines on a cohort whose truth is known, and on one without any."""

import numpy as np
import pandas as pd
import pytest

from cortexicon.evaluation import EvaluationError, read_predictions, run_baselines, score_clinical
from cortexicon.evaluation.baselines import (
    ACQUISITION,
    KERNEL_RIDGE,
    MAJORITY,
    MEDIAN,
    MOTION,
    PERMUTED,
    SITE_MEAN,
    SVM,
    kernel_ridge,
)
from cortexicon.evaluation.connectivity import standardised


@pytest.fixture
def scored(cohort, fold, tmp_path):
    files = run_baselines(cohort, fold, ["age", "sex"], tmp_path, permutations=2)
    return files, score_clinical(files, num_resamples=200)


def test_every_system_predicts_both_test_parts_and_nothing_else(scored, fold):
    files, found = scored
    assert set(found["age"]["parts"]["test"]["systems"]) == {
        MEDIAN, SITE_MEAN, ACQUISITION, MOTION, KERNEL_RIDGE, PERMUTED
    }  # fmt: skip
    assert set(found["sex"]["parts"]["test"]["systems"]) == {
        MAJORITY, ACQUISITION, MOTION, SVM, PERMUTED
    }  # fmt: skip
    rows = read_predictions(files)
    for system, mine in rows[rows["target"] == "age"].groupby("system"):
        draws = 2 if system == PERMUTED else 1
        assert list(mine.loc[mine["part"] == "test", "subject_id"]) == draws * fold["test"], system
        found_sites = mine.loc[mine["part"] == "test_sites", "subject_id"]
        assert list(found_sites) == draws * fold["test_sites"]
        assert set(mine["part"]) == {"test", "test_sites"}


def test_connectivity_sees_the_planted_age_and_permuted_labels_do_not(scored):
    _, found = scored
    for part in ("test", "test_sites"):
        systems = found["age"]["parts"][part]["systems"]
        assert systems[KERNEL_RIDGE]["r"] > 0.8
        assert systems[KERNEL_RIDGE]["mae"] < 0.6 * systems[MEDIAN]["mae"]
        # The control passes when the paired interval is not below 0.
        assert systems[PERMUTED]["difference_to_floor_interval"][1] > 0
        assert systems[PERMUTED]["mae"] > 0.85 * systems[MEDIAN]["mae"]
        assert systems[PERMUTED]["num_seeds"] == 2


def test_permuted_labels_are_drawn_as_often_as_asked(cohort, fold, tmp_path):
    files = run_baselines(cohort, fold, ["age", "sex"], tmp_path, permutations=3)
    rows = read_predictions(files)
    mine = rows[(rows["system"] == PERMUTED) & (rows["target"] == "sex")]
    assert set(mine["draw"]) == {"0", "1", "2"}
    assert set(rows.loc[rows["system"] != PERMUTED, "draw"]) == {""}
    wide = mine.pivot(index="subject_id", columns="draw", values="score")
    assert wide.notna().all(axis=None)
    assert not np.allclose(wide["0"], wide["1"])
    truth = mine.groupby("subject_id")["y"].nunique()
    assert (truth == 1).all()
    for target, key in (("age", "mae"), ("sex", "auc")):
        part = score_clinical(files, num_resamples=200)[target]["parts"]["test"]
        scores = part["systems"][PERMUTED]
        assert scores["num_seeds"] == 3
        assert len(set(scores["seeds"])) == 3
        assert scores[key] == pytest.approx(np.mean(scores["seeds"]))
        low, high = scores[f"{key}_interval"]
        assert low < scores[key] < high
        assert PERMUTED in part["ranking"]


def test_median_and_site_mean_by_hand(scored, cohort, fold):
    rows = read_predictions(scored[0])
    table = cohort.participants
    fitted = table.loc[fold["train"] + fold["validation"]]
    mine = rows[(rows["target"] == "age")].set_index("subject_id")
    median = mine[mine["system"] == MEDIAN]["y_hat"].astype(float)
    assert np.allclose(median, fitted["age"].median())
    site_mean = mine[mine["system"] == SITE_MEAN]["y_hat"].astype(float)
    name = fold["test"][0]
    expected = fitted.loc[fitted["site"] == table.loc[name, "site"], "age"].mean()
    assert site_mean[name] == pytest.approx(expected)
    # A site that training never saw gets the cohort median.
    assert np.allclose(site_mean[fold["test_sites"]], fitted["age"].median())


def test_test_subjects_do_not_change_what_is_fitted(cohort, fold, tmp_path):
    """No leak: another test part, the same predictions for the subjects in both."""
    first = read_predictions(run_baselines(cohort, fold, ["age"], tmp_path / "a", permutations=1))
    smaller = {**fold, "test": fold["test"][:5], "test_sites": []}
    second = read_predictions(
        run_baselines(cohort, smaller, ["age"], tmp_path / "b", permutations=1)
    )
    key = ["system", "subject_id"]
    merged = first.merge(second, on=key, suffixes=("_first", "_second"))
    assert len(merged) == 6 * 5
    np.testing.assert_allclose(
        merged["y_hat_first"].astype(float), merged["y_hat_second"].astype(float), rtol=1e-5
    )


def test_on_noise_no_baseline_beats_the_median(cohort, fold, tmp_path):
    generator = np.random.default_rng(3)
    cohort.participants["age"] = generator.permutation(cohort.participants["age"].to_numpy())
    found = score_clinical(
        run_baselines(cohort, fold, ["age"], tmp_path, permutations=5), num_resamples=300
    )
    for part in found["age"]["parts"].values():
        for system in (KERNEL_RIDGE, PERMUTED, MOTION):
            assert part["systems"][system]["difference_to_floor_interval"][1] > 0, system


def test_missing_values_regions_and_motion(cohort, fold, tmp_path):
    cohort.participants.loc[fold["test"][0], "age"] = np.nan
    cohort.participants.loc[fold["train"][0], "age"] = np.nan
    del cohort.participants["func_mean_fd"]
    cohort.series(fold["train"][1]).values[:, 4] = 0.0
    cohort.series(fold["test"][1]).values[:, 7] = np.nan
    rows = read_predictions(run_baselines(cohort, fold, ["age"], tmp_path, permutations=1))
    assert MOTION not in set(rows["system"])
    assert fold["test"][0] not in set(rows["subject_id"])
    assert np.isfinite(rows["y_hat"].astype(float)).all()


def test_targets_that_cannot_be_learned_are_refused(cohort, fold, tmp_path):
    with pytest.raises(EvaluationError, match="shoe size is not among"):
        run_baselines(cohort, fold, ["shoe size"], tmp_path)
    cohort.participants["iq"] = np.nan
    with pytest.raises(EvaluationError, match="'iq': 0 training"):
        run_baselines(cohort, fold, ["iq"], tmp_path)
    cohort.participants["group"] = "control"
    with pytest.raises(EvaluationError, match="expected two classes"):
        run_baselines(cohort, fold, ["group"], tmp_path)


def test_kernel_ridge_learns_a_line_and_stays_inside_the_training_range():
    x = np.linspace(-1, 1, 60)[:, None]
    y = np.exp(2.5 + 0.5 * x[:, 0])
    far = np.array([[0.0], [50.0]])
    found = kernel_ridge(x @ x.T, y, far @ x.T, np.random.default_rng(0))
    assert found[0] == pytest.approx(np.exp(2.5), rel=0.02)
    assert found[1] == pytest.approx(y.max())


def test_standardising_uses_training_alone():
    train = np.array([[1.0, np.nan, 5.0], [3.0, 2.0, 5.0]], np.float32)
    test = np.array([[100.0, np.nan, 9.0]], np.float32)
    first, second = standardised(train, test)
    np.testing.assert_allclose(first, [[-1, 0, 0], [1, 0, 0]])
    np.testing.assert_allclose(second, [[98, 0, 0]])


def test_a_boolean_column_is_a_class(cohort, fold, tmp_path):
    cohort.participants["smoker"] = pd.Series(
        cohort.participants["sex"] == "F", index=cohort.participants.index
    )
    found = score_clinical(run_baselines(cohort, fold, ["smoker"], tmp_path), num_resamples=20)
    assert found["smoker"]["kind"] == "classes"
