"""Tangent space, harmonised sites and plain tokens on a cohort whose truth is known."""

import numpy as np
import pytest

from cortexicon.evaluation import EvaluationError, read_predictions, score_clinical
from cortexicon.evaluation.baselines_connectivity import (
    _scan,
    _tangent,
    geometric_mean,
    run_connectivity,
)


@pytest.fixture
def scans(cohort):
    """The cohort of `conftest.py` as a reader of scans wants it: with TR, on each scan."""
    for name in cohort.participants.index:
        cohort.series(name).tr = 2.0
    return cohort


@pytest.mark.parametrize(
    ("features", "worst_r"),
    [("correlation", 0.8), ("tangent", 0.8), ("connectivity_tokens", 0.6), ("series_tokens", 0.3)],
)
def test_every_kind_of_features_sees_the_planted_age(scans, fold, tmp_path, features, worst_r):
    files = run_connectivity(scans, fold, ["age", "sex"], tmp_path, features, (False, True))
    found = score_clinical(files, num_resamples=20)
    for part in ("test", "test_sites"):
        systems = found["age"]["parts"][part]["systems"]
        assert len(systems) == 2
        for name, scores in systems.items():
            assert scores["r"] > worst_r, (name, part)
    (name,) = [n for n in found["sex"]["parts"]["test"]["systems"] if "harmonised" not in n]
    assert name.startswith("SVM on ")


def test_the_geometric_mean_is_one():
    generator = np.random.default_rng(0)
    matrices = []
    for _ in range(20):
        rows = generator.normal(size=(80, 6)) * generator.uniform(0.5, 2, 6)
        matrices.append(np.cov(rows.T))
    mean = geometric_mean(matrices, steps=20)
    # Its inverse is the mean of the inverses, and scaling the matrices scales it.
    inverses = geometric_mean([np.linalg.inv(matrix) for matrix in matrices], steps=20)
    np.testing.assert_allclose(np.linalg.inv(mean), inverses, rtol=1e-6)
    scaled = geometric_mean([4.0 * matrix for matrix in matrices], steps=20)
    np.testing.assert_allclose(scaled, 4.0 * mean, rtol=1e-9)
    quick = geometric_mean(matrices)
    assert np.linalg.norm(quick - mean) < 0.01 * np.linalg.norm(mean)
    # Of matrices that commute it is the mean of the logarithms.
    diagonal = [np.diag(generator.uniform(1, 3, 4)) for _ in range(5)]
    expected = np.exp(np.mean([np.log(np.diag(matrix)) for matrix in diagonal], axis=0))
    np.testing.assert_allclose(np.diag(geometric_mean(diagonal)), expected)


def test_tangent_space_agrees_with_nilearn(scans, fold):
    from nilearn.connectome import ConnectivityMeasure
    from sklearn.covariance import LedoitWolf

    names = fold["train"]
    found, _ = _tangent(scans, names, names[:2], 0)
    measure = ConnectivityMeasure(
        LedoitWolf(store_precision=False, assume_centered=True), kind="tangent", standardize=False
    )
    theirs = measure.fit_transform([_scan(scans, name) for name in names])
    # Axes of the tangent space may be turned; distances between people may not.
    mine, others = (
        np.linalg.norm(x[:, None] - x[None], axis=2)[np.triu_indices(len(x), 1)]
        for x in (found, theirs.reshape(len(theirs), -1))
    )
    np.testing.assert_allclose(mine, others, rtol=1e-3, atol=1e-9)


def test_test_subjects_do_not_change_what_is_fitted(scans, fold, tmp_path):
    arguments = (["age"], tmp_path / "a", "tangent", (True,))
    first = read_predictions(run_connectivity(scans, fold, *arguments))
    smaller = {**fold, "test": fold["test"][:4], "test_sites": []}
    second = read_predictions(
        run_connectivity(scans, smaller, ["age"], tmp_path / "b", *arguments[2:])
    )
    merged = first.merge(second, on="subject_id", suffixes=("_first", "_second"))
    assert len(merged) == 4
    np.testing.assert_allclose(
        merged["y_hat_first"].astype(float), merged["y_hat_second"].astype(float), rtol=1e-5
    )


def test_further_scans_are_fitted_on_and_named(scans, fold, tmp_path):
    further, rest = fold["train"][:10], fold["train"][10:]
    whole = read_predictions(run_connectivity(scans, fold, ["age"], tmp_path / "a"))
    fewer = {**fold, "train": rest}
    found = read_predictions(
        run_connectivity(scans, fewer, ["age"], tmp_path / "b", further=further)
    )
    assert set(found["system"]) == {"kernel ridge on connectivity, further scans"}
    alone = read_predictions(run_connectivity(scans, fewer, ["age"], tmp_path / "c"))
    answers = [table.set_index("subject_id")["y_hat"].astype(float) for table in (whole, found)]
    # The same people in another order: inner folds are drawn by place, so nearly the same answers.
    assert (answers[0] - answers[1]).abs().median() < 0.5
    assert not found["y_hat"].equals(alone["y_hat"])


def test_unknown_features_and_three_classes_are_refused(scans, fold, tmp_path):
    with pytest.raises(EvaluationError, match="expected features of correlation"):
        run_connectivity(scans, fold, ["age"], tmp_path, "wavelets")
    scans.participants["group"] = np.resize(["a", "b", "b", "c"], 90)
    with pytest.raises(EvaluationError, match="expected two classes, found a, b, c"):
        run_connectivity(scans, fold, ["group"], tmp_path)
