"""Figures of a scan with known answers, and the table that holds them."""

import numpy as np
import pytest

from cortexicon.cohorts import ParcelSeries
from cortexicon.cohorts.quality import dvars, plain_facts, quality_table, scan_quality
from cortexicon.cohorts.subjects import match_subjects


def series_of(values: np.ndarray) -> ParcelSeries:
    labels = [f"r{i}" for i in range(values.shape[1])]
    coordinates = np.zeros((values.shape[1], 3), np.float32)
    return ParcelSeries(values.astype(np.float32), labels, coordinates, "toy", 2.0, "s1")


def test_dvars_of_white_noise_is_root_two_and_a_jump_stands_out():
    values = np.random.default_rng(0).standard_normal((4000, 50))
    steps = dvars(values, np.ones(50, bool))
    assert steps.shape == (3999,)
    assert np.median(steps) == pytest.approx(np.sqrt(2), rel=0.01)
    values[2000:] += 20
    assert dvars(values, np.ones(50, bool)).argmax() == 1999


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.5, np.sqrt(0.5))])
def test_global_signal_is_the_root_of_the_mean_correlation(share, expected):
    rng = np.random.default_rng(1)
    common, own = rng.standard_normal((5000, 1)), rng.standard_normal((5000, 400))
    values = np.sqrt(share) * common + np.sqrt(1 - share) * own
    found = scan_quality(series_of(values))["global_signal_sd"]
    assert found == pytest.approx(expected, abs=0.06)


def test_tsnr_is_mean_over_sd_and_missing_for_centred_series():
    noise = np.random.default_rng(2).standard_normal((2000, 20))
    assert scan_quality(series_of(1000 + 10 * noise))["median_tsnr"] == pytest.approx(100, rel=0.05)
    assert np.isnan(scan_quality(series_of(10 * (noise - noise.mean(axis=0))))["median_tsnr"])


def test_masked_regions_are_counted_and_named():
    values = np.random.default_rng(3).standard_normal((50, 30))
    values[:, 4], values[7, 9] = 3.0, np.nan
    found = scan_quality(series_of(values))
    assert (found["n_missing"], found["n_constant"]) == (1, 1)
    assert found["masked_regions"] == "r9, r4"
    assert np.isfinite(found["median_sd"])


def test_counts_stay_whole_numbers_where_some_scans_have_none():
    rows = [
        {"source": "a", "n_timepoints": 236, "volumes_read": 240, "note": "", "session": ""},
        {"source": "b", "reason": "damaged"},
    ]
    table = quality_table(rows)
    text = table.to_csv(sep="\t", index=False, na_rep="n/a").splitlines()
    assert "\t236\t" in text[1]
    assert "240" in text[1].split("\t")
    assert list(table)[:2] == ["subject_id", "session"]


def test_facts_are_plain_and_the_same_after_json():
    import json

    facts = plain_facts(
        {"a": np.float32(0.5), "b": np.nan, "c": (1, 2), "d": np.bool_(True), "e": np.int64(3)}
    )
    assert facts == {"a": 0.5, "b": None, "c": "1, 2", "d": True, "e": 3}
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("subject", "source", "owner"),
    [
        ("01", "sub-01_bold.nii.gz", "sub-01"),
        ("1", "sub-1_bold.nii.gz", "sub-01"),
        ("0050642", "func_0050642_rois.1D", "CMU_50642"),
        ("CMU_50642", "CMU_50642.1D", "CMU_50642"),
        ("scan_CMU_50642_x", "scan_CMU_50642_x.1D", "CMU_50642"),
        ("run_01", "run_01.1D", ""),  # "1" inside a name could be anything
        ("77", "sub-77_CMU_50642.nii", ""),  # says whose it is
        ("xCMU_50642", "xCMU_50642.1D", ""),
    ],
)
def test_files_are_matched_to_the_rows_of_the_table(subject, source, owner):
    ids = ["sub-01", "CMU_50642", "NYU_50643"]
    if subject == "0050642":
        ids[1] = "CMU_50642"
        ids.append("50642")
        owner = "50642"
    ((found, reason),) = match_subjects([subject], [source], ids)
    assert found == owner
    assert bool(reason) is not bool(owner)


def test_a_name_with_two_ids_is_nobodys():
    ((found, reason),) = match_subjects(["a_123_456"], ["a_123_456.1D"], ["123", "456"])
    assert found == ""
    assert "could be each of 123, 456" in reason
