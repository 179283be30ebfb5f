"""`cortexicon left-out-sites`: the same scans, with and without their scanner in training."""

import json
import shutil

import pytest

from cortexicon.cli import main
from cortexicon.cohorts import load_cohort, load_split, make_split
from cortexicon.training import avq


@pytest.fixture(scope="module")
def folds(run, tmp_path_factory):
    """Folder with sites.json and the codecs within/, sites0/ and sites1/, of twelve steps each."""
    folder = tmp_path_factory.mktemp("folds")
    cohort = load_cohort(run / "cohort")
    make_split(cohort, "site_stratified", num_folds=2).save(folder / "within.json")
    make_split(cohort, "leave_sites_out", num_folds=2).save(folder / "sites.json")
    for name, split, fold in (
        ("within", "within", 0),
        ("sites0", "sites", 0),
        ("sites1", "sites", 1),
    ):
        words = [f"output={folder / name}", f"split={folder / split}.json", f"fold={fold}"]
        assert avq.main([str(run / "avq.yaml"), *words]) == 0
    return folder


def compare(run, folds, *names, within="within"):
    out = folds / "scores.json"
    out.unlink(missing_ok=True)
    words = [folds / within, *(folds / name for name in names)]
    options = ["--cohort", run / "cohort", "--json", out]
    code = main(["left-out-sites", *map(str, [*words, *options])])
    return code, json.loads(out.read_text()) if out.exists() else None


def test_every_held_out_scan_of_a_left_out_site_is_scored_by_both(run, folds, capsys):
    code, scores = compare(run, folds, "sites0", "sites1")
    assert code == 0
    cohort = load_cohort(run / "cohort")
    table = cohort.participants
    test = load_split(folds / "within.json", cohort)[0]["test"]
    expected = [subject for subject in test if table.loc[subject, "tr"] == 2.0]
    seen, unseen = scores["systems"]
    assert set(seen["r2_per_subject"]) == set(unseen["r2_per_subject"]) == set(expected)
    assert seen["r2_per_subject"] != unseen["r2_per_subject"]
    assert scores["difference"]["difference"] == pytest.approx(unseen["r2"] - seen["r2"])
    assert set(scores["by_site"]) == {"ALPHA", "BRAVO"}
    assert sum(row["num_subjects"] for row in scores["by_site"].values()) == len(expected)
    # Each codec scored only sites that it never saw.
    parts = load_split(folds / "sites.json", cohort)
    for fold, facts in enumerate(scores["left_out_folds"]):
        fitted = [*parts[fold]["train"], *parts[fold]["validation"]]
        assert not set(facts["sites"]) & set(table.loc[fitted, "site"])
    assert f"{scores['num_subjects']} scans of 2 sites" in capsys.readouterr().out


def test_what_would_not_be_a_comparison_is_refused(run, folds, capsys):
    code, scores = compare(run, folds, "within")
    assert (code, scores) == (2, None)
    assert "leaves whole sites out" in capsys.readouterr().err
    assert compare(run, folds, "sites0", "sites0") == (2, None)
    assert "Give each fold once" in capsys.readouterr().err
    copy = shutil.copytree(folds / "sites0", folds / "copy")
    (copy / "run.json").unlink()
    assert compare(run, folds, "copy")[0] == 2
    assert "run.json" in capsys.readouterr().err


def test_a_split_that_was_made_again_is_refused(run, folds, capsys):
    cohort = load_cohort(run / "cohort")
    before = (folds / "sites.json").read_text()
    make_split(cohort, "leave_sites_out", num_folds=2, seed=5).save(folds / "sites.json")
    try:
        assert compare(run, folds, "sites0")[0] == 2
    finally:
        (folds / "sites.json").write_text(before)
    assert "leave its split as it was" in capsys.readouterr().err
