"""`cortexicon evaluate` on a codec, with and without a split."""

import json

import numpy as np
import pytest

from cortexicon.cli import main
from cortexicon.cohorts import Split, save_cohort


@pytest.fixture
def folders(checkpoint_folder, cohort, tmp_path):
    save_cohort(cohort, tmp_path / "cohort")
    parts = {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e", "f", "short"]}
    Split("holdout", [parts], cohort.content_hash).save(tmp_path / "split.json")
    return tmp_path


def evaluate(folders, *options):
    out = folders / "evaluation" / "reconstruction.json"
    code = main(
        ["evaluate", f"{folders}/checkpoint", f"{folders}/cohort", "--json", str(out), *options]
    )
    return code, out


def test_scores_of_a_codec_are_printed_and_written(folders, capsys):
    code, out = evaluate(folders, "--split", f"{folders}/split.json")
    assert code == 0
    printed = capsys.readouterr().out
    scores = json.loads(out.read_text())
    assert f"r2 {scores['r2']:.3f} on 2 scans" in printed
    assert str(out) in printed
    assert set(scores["r2_per_subject"]) == {"e", "f"}
    assert 0 < scores["usage"] <= 1
    assert scores["connectivity"]["num_training_scans"] == 3
    assert list(scores["left_out"]) == ["short"]
    assert "clinical" not in scores
    examples = np.load(out.parent / "reconstruction_examples.npz", allow_pickle=False)
    assert examples["subject_ids"].tolist() == ["e", "f"]


def test_without_a_split_every_scan_is_scored(folders):
    code, out = evaluate(folders)
    assert code == 0
    scores = json.loads(out.read_text())
    assert scores["num_subjects"] == 6
    assert "deviation" not in scores["connectivity"]


def test_baselines_without_a_split_are_refused(folders, capsys):
    code, out = evaluate(folders, "--baselines")
    assert code == 2
    assert "--split" in capsys.readouterr().err
    assert not out.exists()


def test_the_tokenizer_baseline_runs_on_the_same_windows(folders):
    code, out = evaluate(folders, "--split", f"{folders}/split.json", "--baselines")
    assert code == 0
    baseline = json.loads((out.parent / "tokenizer_baseline.json").read_text())
    scores = json.loads(out.read_text())
    assert set(baseline["r2_per_subject"]) == set(scores["r2_per_subject"])
    assert baseline["tokens_per_window"] == scores["tokens_per_window"] == 8
    assert 0 < scores["gaussian_reference_r2"] < 1


def test_a_fold_that_is_not_there_is_named(folders, capsys):
    code, _ = evaluate(folders, "--split", f"{folders}/split.json", "--fold", "3")
    assert code == 2
    assert "--fold in 0..0, found 3" in capsys.readouterr().err
