"""`doctor`: one verdict per aspect, the same that encoding comes to, and the exit code."""

import argparse
import json

import numpy as np
import pytest

from cortexicon import _doctor
from cortexicon.cli import main
from cortexicon.cohorts import ParcelSeries, cohort_from_series, save_cohort
from cortexicon.inference import InferenceError, encode_cohort, fit_to_atlas, load_checkpoint
from cortexicon.inference.doctor import diagnose
from cortexicon.tokenization import AVQFeatureExtractor

from .conftest import REGIONS, WINDOW, save_checkpoint


@pytest.fixture
def checkpoint(checkpoint_folder):
    return load_checkpoint(checkpoint_folder)


def make_cohort(cohort, count=3, length=100, tr=2.0, **changes):
    """Scans of noise in the regions of `cohort`, with other fields where given."""
    generator = np.random.default_rng(4)
    fields = {"labels": cohort.labels, "coordinates": cohort.coordinates, "atlas": cohort.atlas}
    fields |= changes
    scale = fields.pop("scale", 1.0)
    return cohort_from_series(
        ParcelSeries(
            (scale * generator.normal(size=(length, REGIONS))).astype(np.float32),
            tr=tr,
            subject_id=f"s{number}",
            **fields,
        )
        for number in range(count)
    )


def verdicts(diagnosis):
    return {finding.aspect: finding.verdict for finding in diagnosis.findings}


def only(diagnosis, aspect):
    (finding,) = [finding for finding in diagnosis.findings if finding.aspect == aspect]
    return finding


def test_a_cohort_of_the_checkpoints_kind_fits(cohort, checkpoint, tmp_path):
    save_cohort(make_cohort(cohort), tmp_path / "in")
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    assert diagnosis.fits
    aspects = ["scans", "regions", "signal", "TR", "length", "pass band", "scaling", "trial"]
    assert list(verdicts(diagnosis)) == aspects
    *others, trial = verdicts(diagnosis).values()
    assert set(others) == {"fits"}
    assert trial == "look"  # the codec is not trained
    assert "3 (prepared cohort, atlas toy)" in only(diagnosis, "scans").found
    assert "2.0 whole windows" in only(diagnosis, "length").found


def test_short_scans_and_other_intervals_are_told_as_encoding_treats_them(
    cohort, checkpoint, tmp_path
):
    save_cohort(cohort, tmp_path / "in")
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    assert diagnosis.fits
    assert verdicts(diagnosis)["TR"] == "changed"
    assert "1.5 s (1 scans), 2 s (6 scans)" in only(diagnosis, "TR").found
    assert "1 of 7 scans are too short" in only(diagnosis, "length").found
    skipped = []
    extractor = checkpoint.processor.feature_extractor
    list(encode_cohort(checkpoint.codec, extractor, cohort, skipped=skipped, progress=False))
    assert [scan.subject_id for scan in skipped] == ["short"]


def test_slow_scans_are_worth_a_look(cohort, checkpoint, tmp_path):
    save_cohort(make_cohort(cohort, tr=3.0), tmp_path / "in")
    finding = only(diagnose(tmp_path / "in", checkpoint), "TR")
    assert finding.verdict == "look"
    assert "nothing above 0.167 Hz" in finding.found


def test_scans_that_are_all_too_short_do_not_fit(cohort, checkpoint, tmp_path):
    save_cohort(make_cohort(cohort, length=WINDOW - 1), tmp_path / "in")
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    assert not diagnosis.fits
    assert only(diagnosis, "length").verdict == "NO"
    assert "every scan is too short" in only(diagnosis, "length").found


def test_another_order_is_changed_on_the_way(cohort, checkpoint, tmp_path):
    back = {"labels": cohort.labels[::-1], "coordinates": cohort.coordinates[::-1]}
    save_cohort(make_cohort(cohort, **back), tmp_path / "in")
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    assert diagnosis.fits
    assert verdicts(diagnosis)["regions"] == "changed"


OTHER_NAMES = [f"place {number}" for number in range(REGIONS)]


@pytest.mark.parametrize(
    ("changes", "found", "advice", "tried"),
    [
        ({"atlas": "fine", "labels": OTHER_NAMES}, "from the nearest", "--any-atlas", True),
        ({"atlas": "toy2"}, "under the name 'toy2'", "--atlas toy", True),
        ({"labels": OTHER_NAMES}, "unknown: place 0, place 1, place 2, ...", "Extract", False),
        ({"shift": 5.0}, "the same names up to 5 mm away", "version of the atlas", False),
    ],
)
def test_other_regions_do_not_fit_and_the_advice_is_what_works(
    cohort, checkpoint, tmp_path, changes, found, advice, tried
):
    changes = dict(changes)
    moved = np.float32([changes.pop("shift", 0.0), 0, 0])
    other = make_cohort(cohort, coordinates=cohort.coordinates + moved, **changes)
    save_cohort(other, tmp_path / "in")
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    assert not diagnosis.fits
    finding = only(diagnosis, "regions")
    assert finding.verdict == "NO"
    assert found in finding.found
    assert advice in finding.advice
    assert ("trial" in verdicts(diagnosis)) == tried
    if "--any-atlas" in finding.advice:
        fitted = fit_to_atlas(checkpoint, other, any_atlas=True)
        extractor = fitted.processor.feature_extractor
        assert len(list(encode_cohort(fitted.codec, extractor, other, progress=False))) == 3


def test_low_passed_scans_are_recognised(cohort, checkpoint, tmp_path):
    from scipy.signal import butter, sosfiltfilt

    noisy = make_cohort(cohort, length=200)
    sos = butter(4, [0.01, 0.08], "bandpass", fs=0.5, output="sos")
    filtered = cohort_from_series(
        ParcelSeries(
            sosfiltfilt(sos, scan.values, axis=0).astype(np.float32),
            scan.labels,
            scan.coordinates,
            scan.atlas,
            scan.tr,
            scan.subject_id,
        )
        for scan in noisy
    )
    for name, cohort_there, verdict in (("a", noisy, "fits"), ("b", filtered, "look")):
        save_cohort(cohort_there, tmp_path / name)
        finding = only(diagnose(tmp_path / name, checkpoint), "pass band")
        assert finding.verdict == verdict
        assert ("were low-passed" in finding.found) == (verdict == "look")


def test_another_unit_matters_only_against_stored_statistics(cohort, codec, tmp_path):
    training = make_cohort(cohort)
    extractor = AVQFeatureExtractor(
        window_length=WINDOW,
        patch_length=20,
        atlas="toy",
        region_labels=cohort.labels,
        region_coordinates=cohort.coordinates,
    ).fit_scaling([scan.values for scan in training], 2.0, training.labels, "toy")
    checkpoint = load_checkpoint(save_checkpoint(codec, extractor, tmp_path / "population"))
    save_cohort(training, tmp_path / "same")
    save_cohort(make_cohort(cohort, scale=300.0), tmp_path / "raw")
    assert verdicts(diagnose(tmp_path / "same", checkpoint))["scaling"] == "fits"
    finding = only(diagnose(tmp_path / "raw", checkpoint), "scaling")
    assert finding.verdict == "NO"
    assert "another unit" in finding.found


def test_a_weak_trial_is_worth_a_look(cohort, checkpoint, tmp_path):
    save_cohort(make_cohort(cohort), tmp_path / "in")
    (checkpoint.folder / "run.json").write_text(json.dumps({"eval_r2": 0.9}))
    finding = only(diagnose(tmp_path / "in", checkpoint), "trial")
    assert finding.verdict == "look"  # an untrained codec on noise
    assert "0.90 on the validation scans" in finding.found


def write_tables(folder, cohort, damage=None, count=2, tr=True):
    """Scans as .tsv files with sidecars, as XCP-D would not write them but a lab does."""
    folder.mkdir()
    for number, scan in enumerate(make_cohort(cohort, count=count)):
        rows = ["\t".join(cohort.labels)]
        rows += ["\t".join(f"{x:.5f}" for x in row) for row in scan.values]
        text = "\n".join(rows)
        if damage is not None and number == count - 1:
            text = damage(text)
        path = folder / f"sub-{number}_task-rest_timeseries.tsv"
        path.write_text(text)
        if tr:
            path.with_suffix(".json").write_text(json.dumps({"RepetitionTime": 2.0}))


def test_files_without_coordinates_are_read_as_the_checkpoints_regions(
    cohort, checkpoint, tmp_path
):
    write_tables(tmp_path / "in", cohort)
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    assert diagnosis.fits, diagnosis.findings
    assert "2 (table files)" in only(diagnosis, "scans").found
    alone = diagnose(tmp_path / "in")
    assert not alone.fits
    assert "expected regions with MNI coordinates" in alone.findings[0].found


def test_one_unreadable_scan_is_named_and_the_others_are_judged(cohort, checkpoint, tmp_path):
    write_tables(tmp_path / "in", cohort, damage=lambda text: "<!DOCTYPE html>\n" + text)
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    finding = only(diagnosis, "scans")
    assert (finding.verdict, diagnosis.fits) == ("look", True)
    assert "1 cannot be used" in finding.found
    assert "sub-1_task-rest_timeseries.tsv" in finding.found


def test_a_missing_interval_is_asked_for(cohort, checkpoint, tmp_path):
    write_tables(tmp_path / "in", cohort, tr=False)
    diagnosis = diagnose(tmp_path / "in", checkpoint)
    assert not diagnosis.fits
    assert "TR missing" in only(diagnosis, "scans").found
    assert diagnose(tmp_path / "in", checkpoint, tr=2.0).fits


def test_a_folder_without_scans_is_a_finding_and_nothing_is_an_error(checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    diagnosis = diagnose(tmp_path / "empty", checkpoint)
    assert not diagnosis.fits
    assert "found none among 0 files" in only(diagnosis, "scans").found
    with pytest.raises(InferenceError, match="nowhere: expected a cohort"):
        diagnose(tmp_path / "nowhere", checkpoint)


def parse(*words):
    parser = argparse.ArgumentParser()
    _doctor.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["doctor", *map(str, words)])


def test_the_command_prints_the_findings_and_exits_by_them(
    cohort, checkpoint_folder, tmp_path, capsys
):
    save_cohort(make_cohort(cohort), tmp_path / "in")
    assert _doctor.run(parse(tmp_path / "in", checkpoint_folder)) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"{tmp_path / 'in'} for {checkpoint_folder}"
    assert printed.splitlines()[-1] == "fits"
    save_cohort(make_cohort(cohort, atlas="fine", labels=OTHER_NAMES), tmp_path / "other")
    assert _doctor.run(parse(tmp_path / "other", checkpoint_folder)) == 1
    printed = capsys.readouterr().out
    assert "  NO      regions     " in printed
    assert "-> Prepare the scans with --atlas toy" in printed
    assert _doctor.run(parse(tmp_path / "in")) == 0
    assert "12 regions of toy, TR 2 s" in capsys.readouterr().out


@pytest.mark.data
def test_volumes_ask_for_an_atlas_and_fit_with_it(cohort, data_folder, capsys):
    scan = next((data_folder / "nifti" / "derived_abide_cc200_painted").glob("*_bold.nii.gz"))
    assert _doctor.run(parse(scan)) == 1
    assert "Look again with --atlas NAME" in capsys.readouterr().out
    words = (scan, "--atlas", "cc200", "--atlas-folder", data_folder / "atlases")
    assert _doctor.run(parse(*words)) == 0
    assert "200 regions of cc200, TR 2 s, 80 to 80 s long" in capsys.readouterr().out


@pytest.mark.data
def test_every_input_of_the_shared_data_gets_a_diagnosis(data_folder, checkpoint):
    for folder in sorted(data_folder.glob("abide1_*")):
        diagnosis = diagnose(folder, checkpoint)
        assert only(diagnosis, "regions").verdict == "NO"
        assert len(diagnosis.examined.scans) > 60
    for path in sorted((data_folder / "nifti").rglob("*.nii*")):
        assert diagnose(path, checkpoint).findings, path


def test_the_whole_command_line_reaches_it(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "expected a cohort" in capsys.readouterr().err
