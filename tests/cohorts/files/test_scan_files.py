"""One scan comes back from every format; what cannot be trusted is refused with the reason."""

import dataclasses
import json
import re
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest
from nibabel.cifti2 import BrainModelAxis, LabelAxis, ParcelsAxis, ScalarAxis, SeriesAxis
from scipy.io import savemat

from cortexicon.cohorts import CohortError
from cortexicon.cohorts.array_files import read_delimited
from cortexicon.cohorts.atlases import load_atlas
from cortexicon.cohorts.cifti_files import read_ptseries
from cortexicon.cohorts.scan_files import read_scan
from cortexicon.cohorts.sources import find_scans

WITHOUT_TR = ("1D", "tsv", "csv", "npy", "tables")


def read(path, atlas=None, **options):
    return read_scan(find_scans(path)[0], atlas, **options)


def refused(path, atlas, pattern, **options):
    with pytest.raises(CohortError) as caught:
        read(path, atlas, **options)
    text = str(caught.value)
    assert re.search(pattern, text, re.DOTALL), text
    assert path.name.split(".")[0] in text, "the message does not name the file"


def test_every_format_gives_the_same_scan(example, kind, tmp_path):
    given = 2.0 if kind in WITHOUT_TR else None
    scan, facts = read(example.write(kind, tmp_path), example.atlas, tr=given)
    np.testing.assert_array_equal(scan.values, example.values)
    assert scan.labels == example.labels
    assert (scan.tr, scan.subject_id, scan.atlas) == (2.0, "01", example.atlas.name)
    assert facts["warnings"] == ""
    json.dumps(facts)


def test_a_missing_tr_is_asked_for(example, kind, tmp_path):
    if kind in WITHOUT_TR:
        with pytest.raises(CohortError, match="TR missing"):
            read(example.write(kind, tmp_path), example.atlas)


def test_regions_beside_the_scans_serve_without_an_atlas(example, tmp_path):
    folder = tmp_path / "study_toy"
    path = example.write("tsv", folder)
    example.write_regions(folder)
    scan, _ = read(path, tr=2.0)
    assert scan.atlas == "toy"
    np.testing.assert_allclose(scan.coordinates, example.atlas.coordinates, atol=0.006)


def test_parcels_in_the_volume_bring_their_own_regions(example, tmp_path):
    scan, _ = read(example.write("ptseries", tmp_path))
    np.testing.assert_allclose(scan.coordinates, example.atlas.coordinates, atol=1e-4)
    assert scan.atlas == "toy"


# --- which region is which ---------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["name", "code", "7networks", "case"])
def test_columns_are_put_in_order_by_label(example, tmp_path, spelling):
    spelled = {
        "name": example.labels,
        "code": [f"#{code}" for code in example.codes],
        "7networks": [f"7Networks_{label}" for label in example.labels],
        "case": [label.upper().replace("_", "-") for label in example.labels],
    }[spelling]
    by = {"name": "names", "code": "values"}.get(spelling, "similar names")
    order = np.random.default_rng(1).permutation(20)
    path = tmp_path / "sub-01_timeseries.tsv"
    frame = pd.DataFrame(example.values, columns=spelled).iloc[:, order]
    frame.to_csv(path, sep="\t", index=False)
    np.testing.assert_array_equal(read(path, example.atlas, tr=2.0)[0].values, example.values)
    frame.T.to_csv(path, sep="\t")  # (regions, time), square or not
    scan, facts = read(path, example.atlas, tr=2.0)
    np.testing.assert_array_equal(scan.values, example.values)
    assert facts["regions_by"] == by


def test_two_lost_regions_stay_as_masked_columns(example, tmp_path):
    path = tmp_path / "sub-01_timeseries.tsv"
    example.frame().drop(columns=["Area_03", "Area_07"]).to_csv(path, sep="\t", index=False)
    scan, facts = read(path, example.atlas, tr=2.0)
    assert scan.validate().missing_regions == ("Area_03", "Area_07")
    assert "No series for 2 regions: Area_03, Area_07" in facts["warnings"]


def test_the_region_table_of_the_folder_says_what_columns_mean(example, tmp_path):
    """Names differ from the atlas; values agree, and so do the places of the regions."""
    table = example.atlas.regions_table()
    table["name"] = [f"other {i}" for i in range(20)]
    table["label"], table["column"] = table["atlas_value"], [f"r{i:03d}" for i in range(20)]
    order = list(reversed(range(20)))
    table.iloc[order].to_csv(tmp_path / "regions.tsv", sep="\t", index=False)
    path = tmp_path / "sub-01_timeseries.tsv"
    pd.DataFrame(example.values, columns=table["column"]).to_csv(path, sep="\t", index=False)
    np.testing.assert_array_equal(read(path, example.atlas, tr=2.0)[0].values, example.values)
    table["x"] += 30  # the same numbers for other places: another atlas
    table.to_csv(tmp_path / "regions.tsv", sep="\t", index=False)
    refused(path, example.atlas, "Extra: other 0.*missing: Area_00", tr=2.0)


def background(frame):
    frame.insert(0, "background", 0.0)


def renamed(frame):
    frame.columns = [f"other{i}" for i in range(20)]


def fewer(frame):
    for i in range(3):
        del frame[f"Area_{i:02d}"]


LABELS = {
    "background column": (background, r"expected the 20 regions .* found 21 series\. Extra: back"),
    "another atlas": (renamed, r"Extra: other0, .*; missing: Area_00"),
    "more than 10 % lost": (fewer, r"found 17 series\. Extra: none; missing: Area_00, Area_01"),
}


@pytest.mark.parametrize("name", LABELS)
def test_other_regions(name, example, tmp_path):
    change, pattern = LABELS[name]
    frame = example.frame()
    change(frame)
    frame.to_csv(path := tmp_path / "sub-01_timeseries.tsv", sep="\t", index=False)
    refused(path, example.atlas, pattern, tr=2.0)


def test_arrays_without_labels_are_never_turned_by_guess(example, tmp_path):
    path = tmp_path / "sub-01.npy"
    np.save(path, example.values.T)
    refused(path, example.atlas, r"found shape \(20, 40\): transposed", tr=2.0)
    scan, _ = read(path, example.atlas, tr=2.0, time_axis=1)
    np.testing.assert_array_equal(scan.values, example.values)
    np.save(path, example.values[:20])
    refused(path, example.atlas, r"shape \(20, 20\): it could be either way round", tr=2.0)
    np.save(path, example.values[:, :19])
    refused(path, example.atlas, r"the 20 regions .* found 19 series without labels", tr=2.0)


def test_labels_in_an_archive_decide_its_orientation(example, tmp_path):
    path = tmp_path / "sub-01.npz"
    np.savez(path, series=example.values.T, labels=example.labels)
    scan, _ = read(path, example.atlas, tr=2.0)
    np.testing.assert_array_equal(scan.values, example.values)
    np.savez(path, series=example.values[:20], labels=example.labels)
    refused(path, example.atlas, "either way round", tr=2.0)


# --- TR -----------------------------------------------------------------------------------------


def sidecar(folder, **facts):
    (folder / "sub-01_task-rest_bold.json").write_text(json.dumps(facts))


def test_the_sidecar_decides_and_the_header_is_quoted(example, tmp_path):
    path = example.write("nii", tmp_path)
    sidecar(tmp_path, RepetitionTime=1.5)
    scan, facts = read(path, example.atlas)
    assert scan.tr == 1.5
    assert facts["tr_source"] == "sidecar sub-01_task-rest_bold.json"
    assert "TR 1.5 s (sidecar" in facts["warnings"]
    assert "2 s is what the NIfTI header says" in facts["warnings"]
    assert read(path, example.atlas, tr=3.0)[0].tr == 3.0


@pytest.mark.parametrize(
    ("found", "pattern"),
    [
        (2000, "TR 2000 looks like milliseconds: write 2"),
        (0, "expected a TR above 0 s"),
        (float("nan"), "TR missing"),
    ],
)
def test_an_unusable_sidecar_is_refused(example, tmp_path, found, pattern):
    path = example.write("nii", tmp_path)
    sidecar(tmp_path, RepetitionTime=found)
    refused(path, example.atlas, pattern)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"RepetitionTime": "fast"}', "[" * 5000])
def test_a_sidecar_without_a_number_leaves_it_to_the_header(example, tmp_path, text):
    path = example.write("tsv", tmp_path)
    (tmp_path / "sub-01_timeseries.json").write_text(text)
    refused(path, example.atlas, r"TR missing\) \(.*sub-01_timeseries\.json", tr=None)


def test_milliseconds_in_the_header_are_converted_and_a_default_is_no_tr(example, tmp_path):
    image, path = example.image(), tmp_path / "sub-01_bold.nii"
    image.header.set_zooms((4, 4, 4, 2000))
    image.header.set_xyzt_units("mm", "msec")
    nibabel.save(image, path)
    assert read(path, example.atlas)[0].tr == 2.0
    image.header.set_xyzt_units("mm", "unknown")
    nibabel.save(image, path)
    refused(path, example.atlas, "TR 2000 looks like milliseconds")
    image.header.set_zooms((4, 4, 4, 1))
    nibabel.save(image, path)
    refused(path, example.atlas, "TR missing.*header says 1 without a unit")


# --- damage by format: what the user reads -----------------------------------------------------


def test_empty_files_and_web_pages(example, file_kind, tmp_path):
    path = example.write(file_kind, tmp_path)
    path.write_bytes(b"")
    refused(path, example.atlas, "found an empty file", tr=2.0)
    path.write_bytes(b"<!DOCTYPE html><html><body>404 Not Found</body></html>")
    refused(path, example.atlas, "web page", tr=2.0)
    scan = find_scans(path)[0]
    path.unlink()
    with pytest.raises(CohortError, match="found no file"):
        read_scan(scan, example.atlas, tr=2.0)


@pytest.mark.parametrize("kind", ["nii", "nii_gz", "ptseries", "dtseries", "npy", "npz", "mat"])
def test_truncated_files(example, kind, tmp_path):
    path = example.write(kind, tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, example.atlas, "truncated or corrupted", tr=2.0)


def test_images_that_are_no_series(example, tmp_path):
    path = tmp_path / "sub-01_bold.nii.gz"
    for data, found in (
        (example.painted()[..., 0], r"4-D with at least 10 volumes, found shape \(10, 10, 10\)"),
        (example.painted()[..., :1], r"found shape \(10, 10, 10, 1\)"),
        (example.painted()[..., None], r"found shape \(10, 10, 10, 40, 1\)"),
    ):
        nibabel.save(nibabel.Nifti1Image(data, np.diag([4, 4, 4, 1])), path)
        refused(path, example.atlas, found)


def test_an_image_elsewhere_and_in_native_space(example, tmp_path):
    path = example.write("nii", tmp_path)
    moved = example.image().affine.copy()
    moved[:3, 3] += 500
    nibabel.save(nibabel.Nifti1Image(example.painted(), moved), path)
    refused(path, example.atlas, r"only 0 of 20 regions overlap the image; is it in MNI space\?")
    native = tmp_path / "sub-01_task-rest_space-T1w_desc-preproc_bold.nii"
    nibabel.save(example.image(), native)
    refused(native, example.atlas, "found T1w space")
    refused(native, None, "expected an atlas to average the volume over")


def test_scanner_coordinates_are_worth_a_warning(example, tmp_path):
    image, path = example.image(), tmp_path / "sub-01_bold.nii"
    mni = dataclasses.replace(example.atlas, space="MNI152NLin6Asym")
    for code, warned in ((1, True), (4, False)):
        image.set_sform(image.affine, code)
        image.set_qform(image.affine, code)
        nibabel.save(image, path)
        assert ("is the image in MNI space?" in read(path, mni)[1]["warnings"]) is warned


def test_pickled_arrays_are_refused_and_not_run(example, tmp_path):
    path = tmp_path / "sub-01.npy"
    np.save(path, np.array([{"a": 1}], dtype=object))
    refused(path, example.atlas, "pickled Python objects, which could run code", tr=2.0)
    np.savez(tmp_path / "sub-01.npz", x=np.array([{"a": 1}], dtype=object))
    refused(tmp_path / "sub-01.npz", example.atlas, r"found none: x \(pickled objects\)", tr=2.0)


def test_archives_with_several_series_or_none(example, tmp_path):
    path = tmp_path / "sub-01.npz"
    np.savez(path, a=example.values, b=example.values)
    refused(path, example.atlas, r"found several .*a float32\[40, 20\], b float32", tr=2.0)
    np.savez(path, time_series=example.values, connectivity=np.eye(20))
    assert read(path, example.atlas, tr=2.0)[0].values.shape == (40, 20)
    np.savez(path, time_series=example.values.astype(complex))
    refused(path, example.atlas, "found none: time_series complex", tr=2.0)
    np.savez(path, time_series=example.values, labels=example.labels[:7])
    refused(path, example.atlas, "found 7", tr=2.0)
    savemat(tmp_path / "sub-01.mat", {"notes": "nothing"})
    refused(tmp_path / "sub-01.mat", example.atlas, "found none: notes", tr=2.0)


def test_matlab_73_without_h5py_says_what_to_install(example, tmp_path, monkeypatch):
    path = example.write("mat73", tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(path, example.atlas, r"7\.3 \(HDF5\).*cortexicon\[mat73\].*-v7")


TEXTS = {
    "decimal commas": (
        lambda t: t.replace(".", ","),
        r"line 2, column Area_\d\d: expected a number, found '\d+,\d+'.*decimal points",
    ),
    "text": (lambda t: t.replace("\t9", "\thigh", 1), r"line 2, column Area.*'high"),
    "underscores": (lambda t: t.replace("\t9", "\t1_9", 1), r"line 2, column Area.*'1_9"),
    "no header": (lambda t: t.split("\n", 1)[1], r"line 1: .*no header"),
    "doubled header": (lambda t: t.split("\n")[0] + "\n" + t, r"line 2: .*doubled header"),
    "doubled column": (lambda t: t.replace("Area_01", "Area_00"), r"line 1: .*duplicated: Area_00"),
    "ragged": (lambda t: t.replace("\t9", "\t\t9", 1), r"line 2: expected 20 columns, found 21"),
    "blank": (lambda t: '""\t""\n', r"expected a table, found no text in it"),
    "header only": (lambda t: t.split("\n")[0], r"expected rows below the header, found none"),
    "commas": (lambda t: t.replace("\t", ","), r"line 1: expected columns separated by tabs"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_damaged_tables(name, example, tmp_path):
    change, pattern = TEXTS[name]
    path = example.write("tsv", tmp_path)
    path.write_text(change(path.read_text()))
    refused(path, example.atlas, pattern, tr=2.0)


@pytest.mark.parametrize(
    ("encoding", "pattern"), [("utf-16", "UTF-16"), ("latin-1", "line 1: expected UTF-8")]
)
def test_other_encodings(example, tmp_path, encoding, pattern):
    path = example.write("tsv", tmp_path)
    path.write_bytes(path.read_text().replace("Area_00", "Aréa").encode(encoding))
    refused(path, example.atlas, pattern, tr=2.0)


def test_tables_as_programs_write_them(example, tmp_path):
    """A byte-order mark, n/a, semicolons, quotes, a time column: no damage."""
    path = example.write("tsv", tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_array_equal(read(path, example.atlas, tr=2.0)[0].values, example.values)
    frame = example.frame()
    frame["Area_05"] = "n/a"
    frame.insert(0, "time", np.arange(40) * 2.0)
    frame.to_csv(path := tmp_path / "sub-01_timeseries.csv", sep=";", index=False, quoting=2)
    assert read(path, example.atlas, tr=2.0)[0].validate().missing_regions == ("Area_05",)


def test_afni_files(example, tmp_path):
    path = tmp_path / "sub-01.1D"
    np.savetxt(path, example.values, fmt="%.9g")
    np.testing.assert_array_equal(read(path, example.atlas, tr=2.0)[0].values, example.values)
    rows = [
        f"f.nii\t{t}[?]\t" + "\t".join(f"{x:.9g}" for x in r) for t, r in enumerate(example.values)
    ]
    head = "File\tSub-brick\t" + "\t".join(f"Mean_{code}" for code in example.codes)
    path.write_text("\n".join([head, *rows]))
    np.testing.assert_array_equal(read(path, example.atlas, tr=2.0)[0].values, example.values)
    path.write_text("1 2 3@4\n" * 20)
    refused(path, example.atlas, "line 1, column 3: expected a number, found '3@4'", tr=2.0)


def test_infinite_and_constant_values(example, tmp_path):
    frame = example.frame()
    frame.loc[7, "Area_04"] = np.inf
    frame.to_csv(path := tmp_path / "sub-01_timeseries.tsv", sep="\t", index=False)
    refused(path, example.atlas, "found inf at time point 7, region Area_04", tr=2.0)
    frame.iloc[:, :3] = 5.0
    frame.loc[7, "Area_04"] = 1.0
    frame.to_csv(path, sep="\t", index=False)
    refused(path, example.atlas, "at most 10% of 20 regions without signal, found 3", tr=2.0)


# --- CIFTI --------------------------------------------------------------------------------------


def test_dense_series_are_averages_over_grayordinates_with_signal(example, tmp_path):
    path = example.write("dtseries", tmp_path)
    axis, codes = example.grayordinates()
    rng = np.random.default_rng(3)
    data = rng.standard_normal((40, len(codes))).astype(np.float32)
    data[:, 0] = 0  # no signal: does not count
    data[:, 5:8] = np.nan  # likewise
    data[3, 10] = np.nan  # a hole: the region cannot be used
    nibabel.save(nibabel.Cifti2Image(data, (SeriesAxis(0, 2.0, 40), axis)), path)
    scan, _ = read(path, example.atlas)
    expected = np.stack([data[:, codes == c].mean(axis=1) for c in example.codes], axis=1)
    expected[:, 0], expected[:, 1] = data[:, 1:5].mean(axis=1), data[:, 8:10].mean(axis=1)
    np.testing.assert_allclose(scan.values[:, :2], expected[:, :2], rtol=1e-5)
    np.testing.assert_allclose(scan.values[:, 3:], expected[:, 3:], rtol=1e-4, atol=1e-6)
    assert scan.validate().missing_regions == ("Area_02",)


def test_label_files_that_do_not_fit(example, tmp_path):
    path = example.write("dtseries", tmp_path)
    (tmp_path / "other.dlabel.nii").write_bytes((tmp_path / "toy.dlabel.nii").read_bytes())
    assert read(path, example.atlas)[0].values.shape == (40, 20)  # named as the atlas
    (tmp_path / "toy.dlabel.nii").rename(tmp_path / "another.dlabel.nii")
    refused(path, example.atlas, "expected one label file, found 2")
    (tmp_path / "other.dlabel.nii").unlink()
    mesh = BrainModelAxis.from_surface(np.arange(90), 999, name="CortexLeft")
    labels = LabelAxis(["x"], [{1: ("Area_00", (1, 0, 0, 1))}])
    image = nibabel.Cifti2Image(np.ones((1, 90), np.float32), (labels, mesh))
    nibabel.save(image, tmp_path / "another.dlabel.nii")
    refused(path, example.atlas, r"surface mesh of another\.dlabel\.nii \(999 vertices.*found 130")
    (tmp_path / "another.dlabel.nii").unlink()
    refused(path, example.atlas, "expected a label file")


def test_cifti_files_that_are_no_series(example, tmp_path):
    path = tmp_path / "sub-01.ptseries.nii"
    image = nibabel.Cifti2Image(example.values[:2], (ScalarAxis(["a", "b"]), example.parcels()))
    nibabel.save(image, path)
    refused(
        path, example.atlas, r"expected series x parcels .* found Scalar x Parcels of shape \(2"
    )
    nibabel.save(example.image(), path)
    refused(path, example.atlas, "expected a CIFTI-2 file, found Nifti1Image")


def test_parcels_on_a_surface_need_coordinates_from_elsewhere(example, tmp_path):
    vertices = [{"CIFTI_STRUCTURE_CORTEX_LEFT": np.array([i])} for i in range(20)]
    nothing = np.empty((0, 3), int)
    parcels = ParcelsAxis(
        example.labels, [nothing] * 20, vertices, nvertices={"CIFTI_STRUCTURE_CORTEX_LEFT": 99}
    )
    path = tmp_path / "sub-01.ptseries.nii"
    nibabel.save(nibabel.Cifti2Image(example.values, (SeriesAxis(0, 2.0, 40), parcels)), path)
    refused(path, None, r"found 20 labels \(Area_00, .* and no coordinates")
    np.testing.assert_array_equal(read(path, example.atlas)[0].values, example.values)


# --- real files ---------------------------------------------------------------------------------


@pytest.mark.data
def test_every_real_file_gives_data_or_a_message(data_folder):
    atlas = load_atlas("cc200", folder=data_folder / "atlases")
    good, messages = [], {}
    for scan in find_scans(data_folder / "nifti"):
        try:
            series, _ = read_scan(scan, atlas)
        except CohortError as error:
            messages[str(scan.path)] = str(error)
        else:
            good.append(scan.path.name)
            assert series.values.shape[1] == 200
    assert len(messages) > 10
    assert all(path in text for path, text in messages.items())
    assert [name for name in good if "NYU0050954" in name] == good
    assert len(good) == 2


@pytest.mark.data
def test_the_painted_volume_and_its_cifti_come_back_exactly(data_folder):
    folder = data_folder / "nifti" / "derived_abide_cc200_painted"
    atlas = load_atlas("cc200", folder=data_folder / "atlases")
    wanted = np.load(folder / "expected_regions_40x200_float32.npy")
    scans = {scan.kind: scan for scan in find_scans(folder)}
    np.testing.assert_array_equal(read_scan(scans["volume"], atlas)[0].values, wanted)
    dense, _ = read_scan(scans["ptseries"], atlas)
    cohort = {s.subject_id: s for s in find_scans(data_folder / "abide1_cc200")}
    tables, _ = read_scan(cohort["NYU_0050954"], atlas, tr=2.0)
    np.testing.assert_array_equal(dense.values, tables.values)
    array, _ = read_scan(scans["npy"], atlas, tr=2.0)
    np.testing.assert_array_equal(array.values, wanted)


@pytest.mark.data
def test_real_cifti_is_read_with_its_labels(data_folder):
    path = data_folder / "nifti/cifti_conte69/Conte69.MyelinAndCorrThickness.32k_fs_LR.ptseries.nii"
    raw = read_ptseries(path)
    assert raw.values.shape == (2, 54)
    assert raw.labels[:2] == ["MEDIAL.WALL", "BA2_FRB08"]
    assert raw.regions is None


@pytest.mark.data
def test_a_real_csv_with_quoted_names(data_folder):
    raw = read_delimited(data_folder / "nifti" / "nitime" / "fmri_timeseries.csv")
    assert raw.values.shape == (250, 31)
    assert raw.labels[:4] == ["WM", "Vent", "Brain", "LCau"]
    assert raw.values[0, 3] == np.float32(-7.39443)


@pytest.mark.data
def test_haxby_equals_nilearns_masker(data_folder):
    from nilearn.maskers import NiftiLabelsMasker

    folder = data_folder / "nifti" / "haxby2001_25mm"
    volume = folder / "mask_hoc_25mm.nii.gz"
    scan = find_scans(folder / "task001_run001_bold_25mm.nii.gz")[0]
    ours, _ = read_scan(scan, load_atlas(volume))
    theirs = NiftiLabelsMasker(volume, standardize=None).fit_transform(str(scan.path))
    np.testing.assert_allclose(ours.values, theirs, rtol=1e-5)


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("abide1_ho111", "harvard-oxford"),
        ("abide1_cc400_filt", "cc400"),
        ("abide1_aal116_dparsf", "aal"),
    ],
)
def test_real_tables_fit_the_atlas_of_their_name(data_folder, folder, name):
    scan = find_scans(data_folder / folder)[0]
    own, _ = read_scan(scan, tr=2.0)
    ours, _ = read_scan(scan, load_atlas(name, folder=data_folder / "atlases"), tr=2.0)
    np.testing.assert_array_equal(ours.values, own.values)
    distance = np.linalg.norm(ours.coordinates - own.coordinates, axis=1)
    assert distance.max() < 1
