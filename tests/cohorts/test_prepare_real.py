"""918 real scans in the files of other tools: exactly the cohort's numbers, in minutes."""

import resource
import time

import numpy as np
import pandas as pd
import pytest
from joblib.externals.loky import get_reusable_executor

from cortexicon.cohorts import AtlasChoice, People, Reading, load_cohort, prepare_cohort

#: Two minutes of two cores. Processor time: on a shared machine the clock measures the neighbours.
MAX_CPU_SECONDS = 2 * 120


def cpu_seconds() -> float:
    """Processor time of this process and of its children, which are ended first."""
    get_reusable_executor().shutdown(wait=True)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.mark.slow
@pytest.mark.data
def test_918_scans_come_back_exactly_and_in_time(data_folder, tmp_path, capsys):
    known = load_cohort(data_folder / "abide1_cc200")
    table = pd.read_csv(data_folder / "abide1_cc200" / "regions.tsv", sep="\t", dtype=str)
    scans = tmp_path / "scans"
    scans.mkdir()
    for place, subject in enumerate(known.subject_ids):
        values = known.series(subject).values
        # Half as PCP distributes them, half as fMRIPrep's users save them.
        header = "\t".join("#" + label for label in table["label"]), "\t".join(table["name"])
        name = f"{subject}_rois_cc200.1D", f"{subject}_timeseries.tsv"
        kind = place % 2
        np.savetxt(scans / name[kind], values, "%.9g", "\t", header=header[kind], comments="")
    start, before = time.perf_counter(), cpu_seconds()
    prepared = prepare_cohort(
        scans,
        tmp_path / "out",
        People(data_folder / "abide1_cc200" / "participants.tsv"),
        Reading(AtlasChoice("cc200", folder=str(data_folder / "atlases"))),
        num_proc=2,
    )
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    with capsys.disabled():
        print(f"\n918 scans in {seconds:.1f} s by two processes, {cpu:.1f} s of processor time")
    cohort = load_cohort(tmp_path / "out")
    status = prepared.quality["status"].value_counts()
    # One scan lacks 27 regions; two people share one scan (ABIDE has it so).
    assert dict(status) == {"used": 915, "refused": 3}
    assert cohort.labels == known.labels
    for subject in cohort.subject_ids:
        np.testing.assert_array_equal(cohort.series(subject).values, known.series(subject).values)
        assert cohort.series(subject).tr == known.series(subject).tr
    np.testing.assert_allclose(cohort.coordinates, known.coordinates, atol=0.051)
    assert cpu < MAX_CPU_SECONDS


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "atlas", "regions"),
    [("abide1_cc400_filt", "cc400", 392), ("abide1_aal116_dparsf", "aal", 116)],
)
def test_folders_of_other_atlases_come_back_exactly(data_folder, tmp_path, folder, atlas, regions):
    prepare_cohort(
        data_folder / folder,
        tmp_path / "out",
        People(data_folder / folder / "participants.tsv"),
        Reading(AtlasChoice(atlas, folder=str(data_folder / "atlases"))),
        num_proc=2,
    )
    cohort, known = load_cohort(tmp_path / "out"), load_cohort(data_folder / folder)
    assert len(cohort.labels) == regions
    assert set(cohort.subject_ids) == set(known.subject_ids)
    for subject in cohort.subject_ids[::10]:
        found, expected = cohort.series(subject).values, known.series(subject).values
        order = [cohort.labels.index(label) for label in known.labels if label in cohort.labels]
        if len(order) == regions:
            np.testing.assert_array_equal(found[:, order], expected)
        else:  # the atlas names its regions otherwise; both are in the order of its values
            np.testing.assert_array_equal(found, expected)
