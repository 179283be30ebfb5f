"""The `evaluate` modules, loaded from their folders without network and used directly."""

from pathlib import Path

import numpy as np
import pytest

from cortexicon.evaluation import EvaluationError

METRICS = Path(__file__).resolve().parents[2] / "evaluation" / "metrics"
NAMES = sorted(path.name for path in METRICS.iterdir() if (path / f"{path.name}.py").is_file())


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` of one of the folders, with a cache of its own and no network."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")
    evaluate = pytest.importorskip("evaluate")
    cache = str(tmp_path_factory.mktemp("metrics"))
    yield lambda name: evaluate.load(str(METRICS / name), cache_dir=cache)
    patch.undo()


@pytest.fixture
def generator():
    return np.random.default_rng(0)


def test_all_metrics_are_tested():
    assert NAMES == [
        "clinical_classification",
        "clinical_regression",
        "codebook_usage",
        "domain_confusion",
        "fmri_reconstruction",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_what_a_space_needs(name):
    card = (METRICS / name / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    assert "sdk: gradio" in front
    assert "- evaluate" in front
    assert f"evaluation/metrics/{name}" in text
    assert (METRICS / name / "requirements.txt").read_text() == "cortexicon[train]\n"
    assert f'"{name}.py"' in (METRICS / name / "app.py").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_regression_agrees_with_scikit_learn_and_scipy(load, seed):
    from scipy.stats import pearsonr
    from sklearn.metrics import mean_absolute_error, r2_score

    generator = np.random.default_rng(seed)
    y = generator.normal(30, 10, 57)
    y_hat = 0.4 * y + generator.normal(10, 6, 57)
    found = load("clinical_regression").compute(
        predictions=y_hat, references=y, num_resamples=200, seed=seed
    )
    assert found["mae"] == pytest.approx(mean_absolute_error(y, y_hat))
    assert found["r2"] == pytest.approx(r2_score(y, y_hat))
    assert found["r"] == pytest.approx(pearsonr(y, y_hat).statistic)
    for name in ("mae", "r2", "r"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high


def test_regression_row_by_row(load):
    metric = load("clinical_regression")
    metric.add_batch(predictions=[12.0, 20.0], references=[10.0, 20.0])
    metric.add(prediction=26.0, reference=30.0)
    found = metric.compute(num_resamples=0)
    assert found == {"mae": 2.0, "r2": pytest.approx(0.9), "r": pytest.approx(0.9966159)}


@pytest.mark.parametrize("labels", [("F", "M"), ("ASD", "control")])
def test_classification_agrees_with_scikit_learn(load, generator, labels):
    from sklearn.metrics import balanced_accuracy_score, recall_score, roc_auc_score

    y = np.where(generator.random(83) < 0.3, *labels)
    scores = np.round((y == labels[1]) + generator.normal(size=83), 1)  # with ties
    y_hat = np.where(scores > 0.5, labels[1], labels[0])
    found = load("clinical_classification").compute(
        predictions=y_hat, references=y, scores=scores, num_resamples=100
    )
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, y_hat))
    assert found["auc"] == pytest.approx(roc_auc_score(y == labels[1], scores))
    for label in labels:
        assert found["recall"][label] == pytest.approx(recall_score(y, y_hat, pos_label=label))
    assert found["auc_interval"][0] < found["auc"] < found["auc_interval"][1]


def test_three_classes_have_a_balanced_accuracy(load, generator):
    from sklearn.metrics import balanced_accuracy_score

    y, y_hat = generator.choice(list("abc"), 60), generator.choice(list("abc"), 60)
    found = load("clinical_classification").compute(
        predictions=y_hat, references=y, num_resamples=0
    )
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, y_hat))
    assert "auc" not in found


def test_usage_agrees_with_scipy(load, generator):
    from scipy.stats import entropy

    windows = [generator.zipf(1.6, 40).clip(max=32) - 1 for _ in range(5)]
    counts = np.bincount(np.concatenate(windows), minlength=32)
    found = load("codebook_usage").compute(predictions=windows, num_codes=32)
    assert found["entropy_bits"] == pytest.approx(entropy(counts, base=2))
    assert found["perplexity"] == pytest.approx(2 ** entropy(counts, base=2))
    assert found["usage"] == (counts > 0).mean()
    assert found["num_tokens"] == 200


def test_confusion_agrees_with_scikit_learn(load, generator):
    from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score

    y = np.where(generator.random(90) < 0.8, "code", "text")
    scores = generator.normal(size=90) - 0.7 * (y == "text")  # worse than chance
    y_hat = np.where(scores > 0, "text", "code")
    found = load("domain_confusion").compute(predictions=y_hat, references=y, scores=scores)
    accuracy = balanced_accuracy_score(y, y_hat)
    assert found["balanced_accuracy"] == pytest.approx(accuracy)
    assert accuracy < 0.5
    assert found["separability"] == pytest.approx(1 - accuracy)
    assert found["confusion"] == pytest.approx(2 * accuracy)
    assert found["auc"] == pytest.approx(roc_auc_score(y == "text", scores))
    counts = [[found["counts"][a][b] for b in ("code", "text")] for a in ("code", "text")]
    assert counts == confusion_matrix(y, y_hat).tolist()


def test_reconstruction_agrees_with_scikit_learn_and_numpy(load, generator):
    from sklearn.metrics import r2_score

    raw = [generator.normal(size=(length, 5)) for length in (30, 40)]
    raw[0][:, 1] += raw[0][:, 0]
    decoded = [x + 0.5 * generator.normal(size=x.shape) for x in raw]
    lists = {
        "predictions": [x.tolist() for x in decoded],
        "references": [x.tolist() for x in raw],
    }
    upper = np.triu_indices(5, 1)
    z = [[np.arctanh(np.corrcoef(x.T)[upper]) for x in side] for side in (raw, decoded)]
    found = load("fmri_reconstruction").compute(
        **lists, training_raw=np.full(10, 0.1), training_decoded=np.full(10, 0.2)
    )
    sse = sum(((a - b) ** 2).sum() for a, b in zip(raw, decoded, strict=True))
    sst = sum(((a - a.mean(0)) ** 2).sum() for a in raw)
    assert found["r2"] == pytest.approx(1 - sse / sst)
    for score, a, b in zip(found["r2_per_scan"], raw, decoded, strict=True):
        centred = (a - a.mean(0)).ravel(), (b - a.mean(0)).ravel()
        assert score == pytest.approx(r2_score(*centred), abs=1e-3)
    full = [np.corrcoef(a, b)[0, 1] for a, b in zip(*z, strict=True)]
    assert found["connectivity_full"] == pytest.approx(np.median(full), abs=1e-6)
    # A correlation does not see a constant that is taken off.
    assert found["connectivity_deviation"] == pytest.approx(found["connectivity_full"])


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("clinical_regression", {"predictions": [], "references": []}, "found shape"),
        ("clinical_regression", {"predictions": [1.0, NAN], "references": [1.0, 2.0]}, "in row 1"),
        ("clinical_regression", {"predictions": [1.0], "references": [NAN]}, "references: expect"),
        ("clinical_regression", {"predictions": [np.inf], "references": [1.0]}, "not, the first"),
        ("clinical_classification", {"predictions": [], "references": []}, "found shape"),
        ("clinical_classification", {"predictions": [""], "references": ["a"]}, "1 missing"),
        ("clinical_classification", {"predictions": ["a"], "references": ["nan"]}, "1 missing"),
        (
            "clinical_classification",
            {"predictions": ["a"], "references": ["a"], "scores": [NAN]},
            "scores: expected finite",
        ),
        (
            "clinical_classification",
            {"predictions": ["a"], "references": ["a"], "scores": [0.5, 0.5]},
            "scores: expected one value per row, 1 of them",
        ),
        ("codebook_usage", {"predictions": [[]], "num_codes": 4}, "expected codes, found none"),
        ("codebook_usage", {"predictions": [[4]], "num_codes": 4}, r"0\.\.3, found 4"),
        ("codebook_usage", {"predictions": [[-1, 0]], "num_codes": 4}, "found -1"),
        ("domain_confusion", {"predictions": [], "references": []}, "found shape"),
        ("domain_confusion", {"predictions": ["a"], "references": ["a"]}, "two domains"),
        ("fmri_reconstruction", {"predictions": [], "references": []}, "at least one scan"),
        (
            "fmri_reconstruction",
            {"predictions": [[[1.0], [2.0]]], "references": [[[1.0], [NAN]]]},
            "references, scan 0",
        ),
        (
            "fmri_reconstruction",
            {"predictions": [[[1.0], [2.0]]], "references": [[[1.0, 2.0], [2.0, 1.0]]]},
            r"found \(2, 2\) and \(2, 1\)",
        ),
    ],
)
def test_empty_and_missing_values_are_refused(load, name, arguments, message):
    with pytest.raises(EvaluationError, match=message):
        load(name).compute(**arguments)


def test_used_directly_without_loading():
    from cortexicon.evaluation.metrics.codebook_usage.codebook_usage import CodebookUsage

    assert CodebookUsage().compute(predictions=[[3]], num_codes=4)["usage"] == 0.25
