"""The `evaluate` modules, loaded from their folders without network and used directly."""

from pathlib import Path

import numpy as np
import pytest

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


def test_all_metrics_are_tested():
    assert NAMES == [
        "classification_by_subject",
        "codebook_usage",
        "connectivity_kept",
        "reconstruction_r2",
        "regression_by_subject",
    ]


def test_regression_by_subject(load):
    metric = load("regression_by_subject")
    metric.add_batch(predictions=[12.0, 20.0], references=[10.0, 20.0])
    metric.add(prediction=26.0, reference=30.0)
    found = metric.compute(num_resamples=50)
    assert found["mae"] == 2.0
    assert found["r2"] == pytest.approx(0.9)
    low, high = found["mae_interval"]
    assert 0 <= low <= 2 <= high <= 4


def test_classification_by_subject(load):
    found = load("classification_by_subject").compute(
        predictions=["a", "b", "a", "b"],
        references=["a", "a", "b", "b"],
        scores=[0.1, 0.4, 0.35, 0.8],
    )
    assert found == {"balanced_accuracy": 0.5, "auc": 0.75}


def test_codebook_usage(load):
    found = load("codebook_usage").compute(predictions=[[0, 0, 1], [1]], num_codes=8)
    assert found["usage"] == 0.25
    assert found["perplexity"] == pytest.approx(2.0)


def test_series_metrics_agree_with_the_room(load):
    from cortexicon.evaluation.scores import fisher_z, pearson

    generator = np.random.default_rng(0)
    raw = [generator.normal(size=(length, 5)) for length in (30, 40)]
    decoded = [x + 0.5 * generator.normal(size=x.shape) for x in raw]
    lists = {
        "predictions": [x.tolist() for x in decoded],
        "references": [x.tolist() for x in raw],
    }
    sse = sum(((a - b) ** 2).sum() for a, b in zip(raw, decoded, strict=True))
    sst = sum(((a - a.mean(0)) ** 2).sum() for a in raw)
    assert load("reconstruction_r2").compute(**lists)["r2"] == pytest.approx(1 - sse / sst)
    found = load("connectivity_kept").compute(
        **lists, training_raw=np.zeros(10), training_decoded=np.zeros(10)
    )
    expected = [pearson(fisher_z(a), fisher_z(b)) for a, b in zip(raw, decoded, strict=True)]
    assert found["full"] == pytest.approx(np.median(expected), abs=1e-4)
    assert found["deviation"] == pytest.approx(found["full"])


def test_used_directly_without_loading():
    from cortexicon.evaluation.metrics.codebook_usage.codebook_usage import CodebookUsage

    assert CodebookUsage().compute(predictions=[[3]], num_codes=4)["usage"] == 0.25
