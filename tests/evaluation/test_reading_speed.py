"""The comparison of reading: every way reads the same windows, and the figures are complete.

Nothing here depends on how long anything takes.
"""

import json

import numpy as np
import pytest

from cortexicon.cohorts import load_cohort, save_cohort, series_views, simulate_cohort
from cortexicon.evaluation import EvaluationError, reading_speed
from cortexicon.modeling import AVQConfig, AVQModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    cohort = simulate_cohort(num_subjects=24, num_regions=28, seed=0)
    path = tmp_path_factory.mktemp("reading") / "cohort"
    return save_cohort(cohort, path, scans_per_shard=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = AVQConfig(
        window_length=8,
        patch_length=2,
        num_latents=2,
        num_codes=16,
        code_dim=4,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        num_components=6,
        position_features=4,
        text_width=8,
        projection_hidden_size=8,
        classifier_hidden_size=8,
        region_coordinates=[[0.0, 0.0, 0.0], [10.0, 0.0, 0.0]],
    )
    path = tmp_path_factory.mktemp("checkpoint")
    AVQModel(config).save_pretrained(path)
    return path


def test_both_ways_read_the_same_windows(folder):
    cohort = load_cohort(folder)
    views = series_views(cohort)
    series = cohort.dataset.select_columns(["time_series"])
    for rows, starts in reading_speed.draw_batches(views, 20, 5, 4):
        ours = reading_speed.read_windows(views, rows, starts, 20)
        np.testing.assert_array_equal(
            ours, reading_speed._whole_rows(series, rows, starts, 20), strict=True
        )


def test_the_command_writes_its_figures(folder, checkpoint, tmp_path, capsys):
    path = tmp_path / "reading.json"
    argv = [str(folder), str(checkpoint), "--batch-size", "3", "--repeats", "2"]
    assert reading_speed.main([*argv, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert results["scans"] == 24
    assert results["window_length"] == 8  # the codec's
    rates = results["windows_per_second"]
    assert results["ratio"] == pytest.approx(rates[reading_speed.OURS] / rates[reading_speed.RIVAL])
    step = results["training"]
    total = step["read_seconds"] + step["compute_seconds"]
    assert step["waiting_share"] == pytest.approx(step["read_seconds"] / total)
    assert results["command"].endswith(f"--json {path}")
    printed = capsys.readouterr().out
    assert "waits for data" in printed
    assert "at least 2 times" in printed


def test_a_window_longer_than_every_scan_is_refused(folder):
    with pytest.raises(EvaluationError, match="at least 5000 volumes, found none"):
        reading_speed.compare_reading(folder, window_length=5000)
