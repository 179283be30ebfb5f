"""What a codec loses outside its atlas: held-out people only, the same in every row, in words."""

import argparse
import json

import numpy as np
import pytest

from cortexicon import _other_atlases
from cortexicon.cohorts import ParcelSeries, Split, cohort_from_series, save_cohort
from cortexicon.evaluation import EvaluationError
from cortexicon.inference import InferenceError, load_checkpoint

PEOPLE = [f"s{number:02d}" for number in range(40)]


def build(atlas, places, low_passed=False, short=(), people=PEOPLE):
    """Scans of noise of 100 volumes at 2 s; those of `short` are shorter than a window."""
    from scipy.signal import butter, sosfiltfilt

    generator = np.random.default_rng(5)
    scans = []
    for subject in people:
        length = 30 if subject in short else 100
        values = generator.normal(size=(length, len(places)))
        if low_passed:
            sos = butter(4, 0.08, "lowpass", fs=0.5, output="sos")
            values = sosfiltfilt(sos, values, axis=0)
        labels = [f"{atlas} {number}" for number in range(len(places))]
        if atlas == "toy":
            labels = [f"region {number}" for number in range(len(places))]
        scans.append(ParcelSeries(values.astype(np.float32), labels, places, atlas, 2.0, subject))
    return cohort_from_series(scans)


@pytest.fixture
def own(cohort):
    return build("toy", cohort.coordinates)


@pytest.fixture
def checkpoint(checkpoint_folder):
    return load_checkpoint(checkpoint_folder)


PARTS = {"train": PEOPLE[:25], "validation": PEOPLE[25:30], "test": PEOPLE[30:38]}
PARTS["test_sites"] = PEOPLE[38:]


def fine(cohort, **changes):
    places = np.random.default_rng(1).uniform(-60, 60, (9, 3)).astype(np.float32)
    places[0] = cohort.coordinates[0]
    return build("fine", places, **changes)


def test_every_row_has_the_same_held_out_people(own, cohort, checkpoint, tmp_path):
    other = fine(cohort, low_passed=True, short=[PEOPLE[31]], people=PEOPLE[3:39])
    path = tmp_path / "other.json"
    results = _other_atlases.compare_atlases(checkpoint, own, [other], PARTS, path)
    (atlas,) = results["atlases"]
    assert set(atlas["systems"]) == {"own", "other", "own, low-passed"}
    expected = [name for name in PEOPLE[30:39] if name != PEOPLE[31]]
    for system in atlas["systems"].values():
        assert list(system["r2_per_subject"]) == expected
        assert 0 < system["gaussian_reference_r2"] < 1
        assert "deviation" in system["connectivity"]
    assert list(atlas["systems"]["other"]["left_out"]) == [PEOPLE[31]]
    assert atlas["mm_to_the_nearest_own_region"][0] == 0
    loss, systems = atlas["loss"]["own"], atlas["systems"]
    gaps = [
        systems["other"]["r2_per_subject"][name] - systems["own"]["r2_per_subject"][name]
        for name in expected
    ]
    assert loss["difference"] == pytest.approx(np.mean(gaps))
    assert loss["interval"][0] <= loss["difference"] <= loss["interval"][1]
    written = json.loads(path.read_text())
    assert written["atlases"][0]["atlas"] == "fine"
    report = path.with_suffix(".md").read_text()
    for part in ("## fine, 9 regions", "| toy, low-passed | 8 |", "were low-passed", "By region"):
        assert part in report
    assert f"R2 is {loss['difference']:+.3f}" in report


def test_scans_with_the_same_spectrum_have_no_control(own, cohort, checkpoint, tmp_path):
    results = _other_atlases.compare_atlases(
        checkpoint, own, [fine(cohort)], PARTS, tmp_path / "other.json"
    )
    assert set(results["atlases"][0]["systems"]) == {"own", "other"}
    assert "low-passed" not in _other_atlases.render(results)


def test_nobody_trained_on_is_scored_and_nobody_left_is_an_error(own, cohort, checkpoint, tmp_path):
    path = tmp_path / "other.json"
    for people in (PEOPLE[:30], [f"other{number}" for number in range(5)]):
        other = fine(cohort, people=people)
        with pytest.raises(EvaluationError, match="expected held-out people"):
            _other_atlases.compare_atlases(checkpoint, own, [other], PARTS, path)
    with pytest.raises(InferenceError, match="expected regions of atlas 'toy'"):
        _other_atlases.compare_atlases(checkpoint, fine(cohort), [own], PARTS, path)
    assert not path.exists()


def test_the_command_reads_prepared_cohorts_and_the_split(
    own, cohort, checkpoint_folder, tmp_path, capsys
):
    save_cohort(own, tmp_path / "own")
    save_cohort(fine(cohort), tmp_path / "fine")
    split = Split("holdout", [PARTS], own.content_hash, {})
    split.save(tmp_path / "split.json")
    parser = argparse.ArgumentParser()
    _other_atlases.add_parser(parser.add_subparsers(dest="command"))
    words = ["other-atlases", checkpoint_folder, tmp_path / "own", tmp_path / "fine"]
    words += ["--split", tmp_path / "split.json", "--json", tmp_path / "out" / "other.json"]
    assert _other_atlases.run(parser.parse_args([str(word) for word in words])) == 0
    printed = capsys.readouterr().out
    assert "## fine, 9 regions" in printed
    assert (tmp_path / "out" / "other.md").is_file()
