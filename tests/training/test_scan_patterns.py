"""Patterns of a scan's tokens, the scores of people without themselves, and the teacher."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cortexicon.inference import load_connectome
from cortexicon.inference.answers import answers_of, median
from cortexicon.modeling.scan_summary_avq import ScanSummary
from cortexicon.training.answers import AnswerBook
from cortexicon.training.patterns import leave_one_out
from cortexicon.training.scan_patterns import (
    PENALTIES,
    connections_of_values,
    fit_patterns,
    summary_columns,
)
from cortexicon.training.teacher import AnswerTeacher

AGE = {"name": "age", "kind": "number", "minimum": 10, "maximum": 80}
SEX = {"name": "sex", "kind": "class", "classes": ["F", "M"]}


def test_leaving_one_out_is_what_fitting_without_it_says():
    rng = np.random.default_rng(0)
    rows, wanted = rng.standard_normal((12, 30)), rng.standard_normal(12)
    weights, kernel = rng.uniform(0.5, 2.0, 12), rows @ rows.T / 30
    found, dual, intercept = leave_one_out(kernel, wanted, weights, 0.3)
    assert kernel @ dual + intercept == pytest.approx(wanted - 0.3 / weights * dual)
    for left in range(12):
        rest = np.delete(np.arange(12), left)
        _, others, constant = leave_one_out(
            kernel[np.ix_(rest, rest)], wanted[rest], weights[rest], 0.3
        )
        assert found[left] == pytest.approx(kernel[left, rest] @ others + constant)


@pytest.fixture
def people():
    rng = np.random.default_rng(1)
    ages = rng.uniform(15, 70, 40)
    return pd.DataFrame({"age": ages, "sex": rng.choice(["F", "M"], 40)})


@pytest.fixture
def model(two_stream_run):
    """What a language model holds of the connectivity stream."""
    connectome = load_connectome(two_stream_run / "connectome")
    summary = ScanSummary(connectome.config, 8, 2)
    summary.reset()
    return SimpleNamespace(connectome=connectome, summary=summary)


def drawn_codes(model, count, seed=0):
    config = model.connectome.config
    return list(
        np.random.default_rng(seed).integers(config.num_codes, size=(count, config.num_tokens))
    )


def test_patterns_are_a_kernel_ridge_on_decoded_matrices(model, people):
    codes = drawn_codes(model, 40)
    people.loc[3, "age"] = np.nan  # scored, not fitted to
    fit = fit_patterns(
        model, codes, summary_columns(people, [AGE, SEX]), connections_of_values(model)
    )
    model.summary.take(*fit[:3])
    vectors = model.connectome.quantizer.codebook[torch.from_numpy(np.stack(codes))]
    scores = model.summary.scores(vectors)
    assert scores.shape == fit.scores.shape == (40, 2)
    assert scores[3, 0] == pytest.approx(float(fit.scores[3, 0]), abs=1e-3)
    fitted = np.delete(np.arange(40), 3)
    assert fit.scores[fitted, 0].mean() == pytest.approx(0.0, abs=1e-4)
    assert fit.scores[fitted, 0].std(correction=0) == pytest.approx(1.0, abs=1e-3)
    # The same from matrices: standardised connections, one of the penalties.
    values = model.summary.values(vectors)
    matrices = model.connectome.deviations(values).detach().flatten(1).double().numpy()
    upper = np.triu(np.ones((int(matrices.shape[1] ** 0.5),) * 2), 1).ravel() > 0
    rows = matrices[:, upper]
    rows = (rows - rows.mean(0)) / rows.std(0)
    kernel, wanted = rows @ rows.T / rows.shape[1], np.log(people["age"].to_numpy()[fitted])
    found_by = {}
    for penalty in PENALTIES:
        found, dual, _ = leave_one_out(kernel[np.ix_(fitted, fitted)], wanted, np.ones(39), penalty)
        found_by[np.corrcoef(found, wanted)[0, 1]] = kernel[:, fitted] @ dual, found
    told, found = found_by[max(found_by)]
    assert np.corrcoef(told, scores[:, 0])[0, 1] == pytest.approx(1.0, abs=1e-4)
    assert np.corrcoef(found, fit.scores[fitted, 0])[0, 1] == pytest.approx(1.0, abs=1e-4)


def test_scores_of_people_know_no_more_than_the_patterns_of_others(model, people):
    # Codes say nothing of these people, so that what a fit finds it has learned by heart.
    codes = drawn_codes(model, 40)
    fit = fit_patterns(model, codes, summary_columns(people, [AGE]), connections_of_values(model))
    model.summary.take(fit.mean, fit.patterns.expand(2, -1, -1), fit.offset.expand(2))
    vectors = model.connectome.quantizer.codebook[torch.from_numpy(np.stack(codes))]
    by_heart = model.summary.scores(vectors)[:, 0].numpy()
    ages = np.log(people["age"].to_numpy())
    assert np.corrcoef(by_heart, ages)[0, 1] > 0.3
    assert np.corrcoef(fit.scores[:, 0], ages)[0, 1] < 0.3


def test_a_teacher_answers_with_the_doubt_that_its_scores_deserve(people):
    rng = np.random.default_rng(2)
    centred = np.log(people["age"]) - np.log(people["age"]).mean()
    sure = (centred / centred.std()).to_numpy()
    lost = rng.standard_normal(40)
    grid = np.arange(10, 81)
    spread = {}
    for name, score in (("sure", sure), ("lost", lost)):
        scores = np.stack([score, np.where(people["sex"] == "M", 1.0, -1.0)], 1)
        teacher = AnswerTeacher(scores, people, [AGE, SEX], balanced=True)
        share = np.stack([teacher.shares(scan, AGE) for scan in range(40)])
        assert share.sum(1) == pytest.approx(np.ones(40))
        middle = median(share, grid.astype(float))
        spread[name] = np.abs(middle - people["age"]).mean()
        sexes = np.stack([teacher.shares(scan, SEX) for scan in range(40)])
        assert (sexes.argmax(1) == (people["sex"] == "M")).all()
    assert spread["sure"] < 1.0
    assert spread["lost"] > 8.0


def test_shares_of_a_teacher_are_labels_where_one_token_tells_answers_apart():
    book = AnswerBook(lambda answer: [{"F": 5, "M": 6}.get(answer, 7), 1], 2.0)
    reply, shares = book.labels(SEX, "F", np.array([0.25, 0.75]))
    assert (reply, shares) == ([5, 1], [([5, 6], [0.25, 0.75]), ([1], [1.0])])
    # Numbers of which all begin alike are learned from the true ones.
    assert book.labels(AGE, 30.0, np.full(len(answers_of(AGE)), 1 / 71)) == book.labels(AGE, 30.0)


def test_medians():
    values = np.array([10.0, 11.0, 12.0])
    shares = np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.25, 0.25, 0.5], [0.2, 0.8, 0.0]])
    assert median(shares, values).tolist() == pytest.approx([11.0, 10.5, 11.5, 10.875])
