"""Confounds, scrubbing and the pass band, against nilearn doing the same."""

import json

import nibabel
import numpy as np
import pandas as pd
import pytest
from nilearn import signal
from nilearn.interfaces.fmriprep import load_confounds

from cortexicon.cohorts import CohortError
from cortexicon.cohorts.confounds import Nuisance, clean_series, parse_strategy
from cortexicon.cohorts.scan_files import read_scan
from cortexicon.cohorts.sources import find_scans

VOLUMES, TR = 150, 2.0


class Derivatives:
    """One scan of fMRIPrep whose regions carry motion, white matter, and a signal."""

    def __init__(self, example, folder):
        rng = np.random.default_rng(5)
        table = {}
        motion = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
        for name in [*motion, "csf", "white_matter", "global_signal"]:
            series = rng.standard_normal(VOLUMES)
            table[name] = series
            table[f"{name}_derivative1"] = np.append(np.nan, np.diff(series))
            table[f"{name}_power2"] = series**2
            table[f"{name}_derivative1_power2"] = np.append(np.nan, np.diff(series) ** 2)
        time = np.arange(VOLUMES)
        table["cosine00"] = np.cos(np.pi * (time + 0.5) / VOLUMES)
        table["cosine01"] = np.cos(2 * np.pi * (time + 0.5) / VOLUMES)
        table["framewise_displacement"] = np.append(np.nan, np.full(VOLUMES - 1, 0.1))
        table["std_dvars"] = np.append(np.nan, np.full(VOLUMES - 1, 1.0))
        for index in range(4):
            table[f"a_comp_cor_{index:02d}"] = rng.standard_normal(VOLUMES)
        self.table = pd.DataFrame(table)
        self.table.loc[[40, 43, 90], "framewise_displacement"] = [0.9, 0.7, 1.5]
        noise = self.table[["trans_x", "csf", "cosine00"]].to_numpy() @ rng.standard_normal((3, 20))
        self.values = 1000 + 20 * noise + 5 * rng.standard_normal((VOLUMES, 20))
        self.values = self.values.astype(np.float32)
        self.values[:, 4] = 7.0  # a constant region
        self.folder, self.example = folder, example
        stem = "sub-01_task-rest"
        self.image = folder / f"{stem}_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
        self.confounds = folder / f"{stem}_desc-confounds_timeseries.tsv"
        self.write()

    def write(self):
        data = np.zeros((*self.example.grid.shape, VOLUMES), np.float32)
        for column, code in enumerate(self.example.codes):
            data[self.example.grid == code] = self.values[:, column]
        image = nibabel.Nifti1Image(data, self.example.image().affine)
        image.header.set_zooms((4, 4, 4, TR))
        image.header.set_xyzt_units("mm", "sec")
        nibabel.save(image, self.image)
        self.write_confounds()

    def write_confounds(self):
        self.table.to_csv(self.confounds, sep="\t", index=False, na_rep="n/a")
        facts = {"Mask": "combined", "Method": "aCompCor", "Retained": True}
        meta = {f"a_comp_cor_{i:02d}": facts for i in range(4)}
        self.confounds.with_suffix(".json").write_text(json.dumps(meta))

    def read(self, **options):
        return read_scan(find_scans(self.folder)[0], self.example.atlas, **options)


@pytest.fixture
def derivatives(example, tmp_path):
    return Derivatives(example, tmp_path)


def kept_by_hand(table):
    """Without the moved volumes, and without 41 and 42 between two of them."""
    kept = np.ones(len(table), bool)
    kept[[40, 41, 42, 43, 90]] = False
    return kept


@pytest.mark.parametrize(
    "strategy", ["simple", "motion+global_signal", "compcor", "simple+global_signal"]
)
@pytest.mark.parametrize("band", [None, (0.01, 0.1)])
@pytest.mark.parametrize("scrub", [None, 0.5])
def test_cleaning_is_nilearns(derivatives, strategy, band, scrub):
    scan, facts = derivatives.read(confounds=strategy, band_pass=band, scrub_mm=scrub)
    regressors, _ = load_confounds(str(derivatives.image), strategy=parse_strategy(strategy))
    kept = kept_by_hand(derivatives.table) if scrub else np.ones(VOLUMES, bool)
    varying = [i for i in range(20) if i != 4]
    expected = signal.clean(
        derivatives.values[:, varying].astype(float), detrend=False, standardize=None,
        confounds=regressors, sample_mask=np.flatnonzero(kept) if scrub else None,
        filter="butterworth" if band else False, t_r=TR,
        high_pass=band[0] if band else None, low_pass=band[1] if band else None,
    )  # fmt: skip
    np.testing.assert_allclose(scan.values[:, varying], expected, rtol=1e-4, atol=1e-3)
    assert facts["n_scrubbed"] == (5 if scrub else 0)
    assert facts["n_regressors"] == regressors.shape[1]
    assert facts["mean_fd"] == pytest.approx(
        np.nanmean(derivatives.table["framewise_displacement"])
    )
    assert facts["max_fd"] == 1.5


def test_what_was_put_in_is_taken_out(derivatives):
    before = derivatives.read()[0].values
    after = derivatives.read(confounds="simple")[0].values
    motion = derivatives.table["trans_x"].to_numpy()

    def share(values):
        return np.abs([np.corrcoef(motion, values[:, i])[0, 1] for i in range(20) if i != 4])

    assert share(before).max() > 0.5
    assert share(after).max() < 1e-3


def test_a_constant_region_does_not_become_noise(derivatives):
    """Regression leaves rounding errors of a constant; they would pass as a signal."""
    scan, _ = derivatives.read(confounds="simple", band_pass=(0.01, 0.1))
    assert scan.validate().constant_regions == ("Area_04",)


def test_steady_state_volumes_of_fmriprep_go(derivatives):
    derivatives.table["non_steady_state_outlier00"] = np.eye(VOLUMES)[0]
    derivatives.write_confounds()
    scan, facts = derivatives.read(confounds="simple")
    assert len(scan.values) == VOLUMES - 1
    assert facts["n_scrubbed"] == 1


def test_scrubbing_without_regression_keeps_the_values(derivatives):
    scan, _ = derivatives.read(scrub_mm=0.5)
    kept = kept_by_hand(derivatives.table)
    np.testing.assert_array_equal(scan.values, derivatives.values[kept])


def test_xcpd_is_scrubbed_by_its_motion_and_takes_no_confounds(example, tmp_path):
    stem = "sub-01_task-rest"
    path = tmp_path / f"{stem}_space-MNI152NLin2009cAsym_seg-toy_stat-mean_timeseries.tsv"
    example.frame().to_csv(path, sep="\t", index=False)
    moved = np.full(40, 0.1)
    moved[20] = 0.8
    motion = pd.DataFrame({"framewise_displacement": moved, "rmsd": 0.0})
    motion.to_csv(tmp_path / f"{stem}_motion.tsv", sep="\t", index=False)
    (scan,) = find_scans(tmp_path)
    series, facts = read_scan(scan, example.atlas, scrub_mm=0.5, tr=TR)
    np.testing.assert_array_equal(series.values, np.delete(example.values, 20, axis=0))
    assert facts["max_fd"] == 0.8
    with pytest.raises(CohortError, match="found one that xcpd has cleaned"):
        read_scan(scan, example.atlas, confounds="simple", tr=TR)
    example.frame().iloc[:30].to_csv(path, sep="\t", index=False)  # censored series, all motion
    with pytest.raises(CohortError, match="Was the scan scrubbed already"):
        read_scan(scan, example.atlas, scrub_mm=0.5, tr=TR)
    assert read_scan(scan, example.atlas, tr=TR)[1]["mean_fd"] is None


def short_table(d):
    d.table = d.table.iloc[:-3]


def no_motion(d):
    d.table = d.table.drop(columns=[c for c in d.table if c.startswith(("trans", "rot"))])


def text_inside(d):
    d.table = d.table.astype(object)
    d.table.loc[5, "trans_x"] = "oops"


def gaps(d):
    d.table.loc[5, "csf"] = np.nan


def no_displacement(d):
    d.table = d.table.drop(columns="framewise_displacement")


def negative(d):
    d.table.loc[5, "framewise_displacement"] = -1.0


def all_moved(d):
    d.table["framewise_displacement"] = 3.0


def camel_case(d):
    d.table = d.table.rename(columns={"csf": "CSF", "white_matter": "WhiteMatter"})


FAULTS = {
    "cut": (
        short_table,
        {"confounds": "simple"},
        "one row for each of the 150 volumes .* found 147",
    ),
    "no motion": (
        no_motion,
        {"confounds": "simple"},
        r"columns of this strategy, found: .*missing: \[\] \['motion'\]",
    ),
    "text": (text_inside, {"confounds": "simple"}, "strategy .*: expected"),
    "gaps": (gaps, {"confounds": "simple"}, "expected finite regressors, found gaps in csf"),
    "no FD": (no_displacement, {"scrub_mm": 0.5}, "expected a column framewise_displacement"),
    "negative FD": (negative, {"scrub_mm": 0.5}, "expected mm of 0 and more, found -1"),
    "all moved": (all_moved, {"scrub_mm": 0.5}, "volumes to stay, found 0 of 150 after scrubbing"),
    "old fMRIPrep": (camel_case, {"confounds": "simple"}, "camel case"),
    "unknown strategy": (None, {"confounds": "magic"}, "expected confounds as simple, .*'magic'"),
    "scrubbing as strategy": (None, {"confounds": "scrubbing"}, "give the threshold in mm"),
    "threshold 0": (None, {"scrub_mm": 0.0}, "threshold above 0 mm, found 0"),
    "band above Nyquist": (None, {"band_pass": (0.01, 0.3)}, r"high < 0\.25 Hz .* found 0\.01 to"),
    "band upside down": (None, {"band_pass": (0.1, 0.01)}, "0 <= low < high"),
    "band negative": (None, {"band_pass": (-0.1, 0.1)}, "0 <= low < high"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name, derivatives):
    damage, options, pattern = FAULTS[name]
    if damage is not None:
        damage(derivatives)
        derivatives.write_confounds()
    with pytest.raises(CohortError, match=pattern):
        derivatives.read(**options)


def test_confounds_that_are_not_there(example, tmp_path):
    path = example.write("nii", tmp_path)
    for options in ({"confounds": "simple"}, {"scrub_mm": 0.5}):
        with pytest.raises(CohortError, match=r"beside the scan .* found none"):
            read_scan(find_scans(path)[0], example.atlas, **options)


def test_more_regressors_than_volumes_are_refused():
    values = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    regressors = pd.DataFrame(np.random.default_rng(1).standard_normal((30, 24)))
    with pytest.raises(
        CohortError, match="at least 35 volumes to take out 24 regressors, found 30"
    ):
        clean_series(values, Nuisance(regressors), None, 2.0, "scan")


def test_a_series_too_short_for_the_filter_is_refused():
    values = np.random.default_rng(0).standard_normal((11, 5)).astype(np.float32)
    with pytest.raises(CohortError, match="expected to filter 11 volumes"):
        clean_series(values, Nuisance(), (0.01, 0.1), 2.0, "scan")


@pytest.mark.parametrize(
    ("text", "components"),
    [
        (None, ()),
        ("none", ()),
        ("simple", ("high_pass", "motion", "wm_csf")),
        ("compcor+motion", ("high_pass", "motion", "compcor")),
        ("Motion + Global_Signal", ("motion", "global_signal")),
    ],
)
def test_strategies(text, components):
    assert parse_strategy(text) == components
