"""Which files are scans, of whom, and what belongs to them, by the names pipelines give."""

import json
import pickle
import re

import pandas as pd
import pytest

from cortexicon.cohorts import CohortError
from cortexicon.cohorts.scan_files import read_scan
from cortexicon.cohorts.sources import find_scans


def touch(root, *names):
    """Empty files: finding goes by names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


FMRIPREP = [
    "dataset_description.json",
    "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
    *(
        f"sub-01/ses-a/func/sub-01_ses-a_task-rest_run-{run}{rest}"
        for run in (1, 2)
        for rest in (
            "_desc-confounds_timeseries.tsv",
            "_desc-confounds_timeseries.json",
            "_space-MNI152NLin2009cAsym_res-2_boldref.nii.gz",
            "_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz",
            "_space-MNI152NLin2009cAsym_res-2_desc-aseg_dseg.nii.gz",
            "_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz",
            "_space-MNI152NLin6Asym_desc-smoothAROMAnonaggr_bold.nii.gz",
            "_space-T1w_desc-brain_mask.nii.gz",
            "_space-T1w_desc-preproc_bold.nii.gz",
            "_space-fsLR_den-91k_bold.dtseries.nii",
            "_echo-1_desc-preproc_bold.nii.gz",
            "_desc-preproc_bold.nii.gz",
        )
    ),
    "sub-02/func/sub-02_task-rest_desc-confounds_regressors.tsv",
    "sub-02/func/sub-02_task-rest_space-T1w_desc-preproc_bold.nii.gz",
]


def test_fmriprep_gives_one_version_of_each_scan(tmp_path):
    scans = find_scans(touch(tmp_path, *FMRIPREP))
    assert [(s.subject_id, s.session, s.task, s.run, s.space, s.kind) for s in scans] == [
        ("01", "a", "rest", "1", "MNI152NLin2009cAsym", "volume"),
        ("01", "a", "rest", "2", "MNI152NLin2009cAsym", "volume"),
        ("02", "", "rest", "", "T1w", "volume"),
    ]
    first, _, old = scans
    stem = "sub-01_ses-a_task-rest_run-1"
    assert first.confounds.name == f"{stem}_desc-confounds_timeseries.tsv"
    mask = f"{stem}_space-MNI152NLin2009cAsym_res-2_desc-brain_mask.nii.gz"
    assert first.mask.name == mask
    assert old.confounds.name.endswith("_desc-confounds_regressors.tsv")
    assert old.mask is None
    facts = first.confounds.with_suffix(".json")
    assert set(first.inputs) == {first.path, first.confounds, facts, first.mask}
    assert pickle.loads(pickle.dumps(first)) == first


def test_a_space_is_chosen_by_name(tmp_path):
    touch(tmp_path, *FMRIPREP, "atlas/toy.dlabel.nii")
    scans = find_scans(tmp_path, space="fsLR")
    assert [s.kind for s in scans] == ["dtseries", "dtseries"]
    assert [p.name for p in scans[0].extra] == ["toy.dlabel.nii"]
    with pytest.raises(CohortError, match="expected scans in space MNI, found the spaces native"):
        find_scans(tmp_path, space="MNI")


def xcpd(new):
    """Names of version 0.7 and later, or of earlier ones."""
    part = "seg-{}_stat-mean" if new else "atlas-{}"
    motion = "_motion" if new else "_desc-filtered_motion"
    files = ["dataset_description.json"]
    for sub in ("01", "02"):
        stem = f"sub-{sub}/func/sub-{sub}_task-rest"
        files += [f"{stem}{motion}.tsv", f"{stem}_outliers.tsv"]
        space = f"{stem}_space-MNI152NLin2009cAsym"
        files += [f"{space}_desc-denoised_bold.nii.gz", f"{space}_desc-linc_qc.csv"]
        for atlas in ("Gordon", "4S156Parcels", "Tian"):
            name = part.format(atlas)
            files += [f"{space}_{name}_timeseries.tsv", f"{space}_{name}_conmat.tsv"]
            files += [f"{space}_{name.replace('stat-mean', 'stat-coverage')}_coverage.tsv"]
            files += [f"{stem}_space-fsLR_{name}_den-91k_timeseries.ptseries.nii"]
    return files


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("asked", ["Gordon", "gordon", "some/where/atlas-Gordon_dseg.nii.gz"])
def test_xcpd_gives_the_table_of_one_atlas(tmp_path, new, asked):
    scans = find_scans(touch(tmp_path, *xcpd(new)), atlas=asked)
    assert [(s.subject_id, s.atlas, s.kind) for s in scans] == [
        ("01", "Gordon", "table"),
        ("02", "Gordon", "table"),
    ]
    assert scans[0].path.name.endswith("_timeseries.tsv")
    assert scans[0].confounds.name.endswith("motion.tsv")
    assert scans[0].pipeline == "xcpd"


def test_xcpd_with_several_atlases_asks_which(tmp_path):
    touch(tmp_path, *xcpd(True))
    with pytest.raises(CohortError, match="found 3: 4S156Parcels, Gordon, Tian; asked for none"):
        find_scans(tmp_path)
    with pytest.raises(CohortError, match="asked for aal"):
        find_scans(tmp_path, atlas="aal")


def test_xcpd_without_parcellation_gives_its_volumes(tmp_path):
    names = [name for name in xcpd(True) if "timeseries" not in name]
    scans = find_scans(touch(tmp_path, *names))
    assert [s.path.name for s in scans] == [
        f"sub-{sub}_task-rest_space-MNI152NLin2009cAsym_desc-denoised_bold.nii.gz"
        for sub in ("01", "02")
    ]


def test_other_folders_take_what_is_no_mask_table_or_label_file(tmp_path):
    touch(
        tmp_path,
        "participants.tsv", "regions.tsv", ".hidden.npy", ".git/x.npy", "notes.txt",
        "a/scan1.nii.gz", "a/scan1_mask.nii.gz", "a/mask_brain.nii.gz", "a/scan1_boldref.nii.gz",
        "a/T1w.nii", "a/toy.dlabel.nii", "a/toy.dscalar.nii", "a/scan1_events.tsv",
        "NYU_0050954_rois_cc200.1D", "ROISignals_S01.mat", "b/sub-7/func/rest.ptseries.nii",
    )  # fmt: skip
    scans = find_scans(tmp_path)
    assert [(s.path.name, s.subject_id, s.kind) for s in scans] == [
        ("NYU_0050954_rois_cc200.1D", "NYU_0050954", "1D"),
        ("ROISignals_S01.mat", "S01", "mat"),
        ("scan1.nii.gz", "scan1", "volume"),
        ("rest.ptseries.nii", "7", "ptseries"),
    ]


def test_subjects_that_only_their_folders_name(tmp_path):
    touch(tmp_path, "s1/rest.nii.gz", "s2/rest.nii.gz")
    assert [s.subject_id for s in find_scans(tmp_path)] == ["s1", "s2"]
    hcp = tmp_path / "hcp"
    run = "MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR_Atlas_MSMAll.dtseries.nii"
    touch(hcp, f"100307/{run}", f"100408/{run}")
    assert [s.subject_id for s in find_scans(hcp)] == ["100307", "100408"]


def test_links_are_followed_once(example, tmp_path):
    example.write("tsv", tmp_path / "store" / "sub-01")
    source = tmp_path / "study"
    source.mkdir()
    (source / "sub-01").symlink_to(tmp_path / "store" / "sub-01")
    (source / "again").symlink_to(source)
    (source / "sub-02_timeseries.tsv").symlink_to(tmp_path / "not" / "fetched")
    first, second = find_scans(source)
    assert (first.subject_id, second.subject_id) == ("01", "02")
    with pytest.raises(CohortError, match=r"found no file\. It is a link .*datalad get"):
        read_scan(second, example.atlas, tr=2.0)


def test_the_sidecar_is_inherited_and_the_nearest_counts(tmp_path):
    touch(tmp_path, "sub-01/func/sub-01_task-rest_bold.nii.gz")
    touch(tmp_path, "sub-02/func/sub-02_task-rest_bold.nii.gz")
    (tmp_path / "task-rest_bold.json").write_text(json.dumps({"RepetitionTime": 2.5}))
    (tmp_path / "task-motor_bold.json").write_text(json.dumps({"RepetitionTime": 9}))
    touch(tmp_path, "sub-01/func/sub-01_task-rest_space-T1w_bold.json")  # says nothing
    own = tmp_path / "sub-02" / "func" / "sub-02_task-rest_bold.json"
    own.write_text(json.dumps({"RepetitionTime": 0.8}))
    first, second = find_scans(tmp_path)
    assert (first.tr, first.tr_source) == (2.5, "sidecar task-rest_bold.json")
    assert (second.tr, second.sidecar) == (0.8, own)
    assert second.sidecar in second.inputs


def test_our_own_folders_give_one_scan_per_participant(example, tmp_path):
    for kind in ("tables", "cohort"):
        scans = find_scans(example.write(kind, tmp_path))
        assert [s.subject_id for s in scans] == ["01", "02"]
        values = [read_scan(s, example.atlas, tr=2.0)[0].values for s in scans]
        assert (values[0] != values[1]).any()


def test_one_file_is_a_scan_whatever_its_name(tmp_path):
    touch(tmp_path, "mask.nii.gz", "other.nii.gz")
    (scan,) = find_scans(tmp_path / "mask.nii.gz")
    assert scan.subject_id == "mask"


NOTHING = {
    "no folder": ((), "nowhere", "expected a folder with scans or one scan, found nothing"),
    "empty": ((), "", r"found none among 0 files \(empty\)"),
    "other files": (("a.txt", "b.txt", "c.pdf"), "", r"among 3 files \(2 x .txt, 1 x .pdf\)"),
    "a document": (("a.txt",), "a.txt", "found another kind of file. Convert it"),
    "a shard": (("a.parquet",), "a.parquet", "Give the cohort's folder instead"),
    "no shards": (("cohort.json",), "", r"expected shards scans-\*\.parquet, found none"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_read(name, tmp_path):
    files, source, pattern = NOTHING[name]
    touch(tmp_path, *files)
    with pytest.raises(CohortError) as caught:
        find_scans(tmp_path / source)
    assert re.search(pattern, str(caught.value)), str(caught.value)


def test_one_of_many_participants_is_missing(example, tmp_path):
    folder = example.write("tables", tmp_path)
    people = pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str)
    people.loc[2] = ["03", "A", "2.0"]
    people.to_csv(folder / "participants.tsv", sep="\t", index=False)
    *good, bad = find_scans(folder)
    assert len(good) == 2
    with pytest.raises(CohortError, match="expected a scan of participant 03, found none among 2"):
        read_scan(bad, example.atlas, tr=2.0)
