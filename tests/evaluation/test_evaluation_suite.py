"""The suite that `evaluate` loads, and what it finds in a file of predictions."""

import numpy as np
import pytest

from cortexicon.evaluation import EvaluationError, write_predictions


@pytest.fixture
def suite(repository, monkeypatch, tmp_path):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return evaluate.EvaluationSuite.load(str(repository / "evaluation" / "suites" / "clinical.py"))


def test_a_file_of_predictions_is_scored_system_by_system(suite, tmp_path):
    names = [f"s{i}" for i in range(6)]
    y = np.arange(10.0, 16.0)
    path = write_predictions(
        tmp_path / "a.csv", names, y, y + 2, system="x", target="age", fold=0, part="test"
    )
    (found,) = suite.run(path, num_resamples=20)
    assert found["task_name"] == "x/age/test"
    assert found["mae"] == pytest.approx(2.0)
    assert found["num_subjects"] == 6
    labels = np.array(["F", "M"] * 3)
    path = write_predictions(
        tmp_path / "b.csv", names, labels, labels, system="x", target="sex", fold=0, part="test",
        score=np.array([0, 1, 0, 1, 0.5, 0.5]),
    )  # fmt: skip
    (found,) = suite.run(path, num_resamples=20)
    assert found["balanced_accuracy"] == 1.0
    assert found["auc"] == pytest.approx(8.5 / 9)


def test_an_invalid_answer_is_refused(suite, tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("subject_id,y,y_hat,system,target,fold,part\na,10,,x,age,0,test\n")
    with pytest.raises(EvaluationError, match="predictions: expected finite"):
        suite.run(path)
