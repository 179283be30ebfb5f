"""Atlases: every form of table, known centres and sizes, fingerprints, names, and refusals."""

import contextlib
import pickle

import nibabel
import numpy as np
import pandas as pd
import pytest
from nilearn import datasets

from cortexicon.cohorts import CohortError, read_regions
from cortexicon.cohorts.atlas_files import NAMES, known_atlas
from cortexicon.cohorts.atlas_tables import read_labels
from cortexicon.cohorts.atlases import load_atlas

AFFINE = np.diag([-2.0, 2.0, 2.0, 1.0])
AFFINE[:3, 3] = [10.0, -6.0, 4.0]


def label_data() -> np.ndarray:
    """Three regions in a grid of 11 x 6 x 5: left, right, and across the midline."""
    data = np.zeros((11, 6, 5), np.int16)
    data[8:10, 1, 2] = 4  # x = -6, -8
    data[1:3, 1:3, 2] = 7  # x = 8, 6
    data[4:7, 4, 0:2] = 12  # x = 2, 0, -2
    return data


@pytest.fixture
def write(tmp_path):
    def save(data, name="atlas.nii.gz", affine=AFFINE):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(data, affine), path)
        return path

    return save


def test_centres_sizes_and_hemispheres(write):
    atlas = load_atlas(write(label_data()))
    assert (atlas.name, atlas.values, len(atlas)) == ("atlas", (4, 7, 12), 3)
    assert atlas.labels == ("atlas_004", "atlas_007", "atlas_012")
    assert atlas.sizes.tolist() == [2, 4, 6]
    assert atlas.coordinates.dtype == np.float32
    np.testing.assert_allclose(atlas.coordinates, [[-7, -4, 8], [7, -3, 8], [0, 2, 5]])
    assert atlas.hemispheres == ("L", "R", "B")


TABLES = {
    "BIDS": ("dseg.tsv", "index\tname\tcolor\n0\tBack\t#0\n4\ta b\t#1\n7\tc\t#2\n12\td\t#3\n"),
    "cohort": ("t.tsv", "index\tcolumn\tlabel\tname\n0\tr0\t4\ta b\n1\tr1\t7\tc\n2\tr2\t12\td\n"),
    "saved": ("t.tsv", "label\tx\tatlas_value\na b\t1\t4\nc\t1\t7\nd\t1\t12\n"),
    "CSV": ("t.csv", '\ufeffROI number,name\n4,"a b"\n7,c\n12,d\n'),
    "semicolons": ("t.csv", "index;name\n4;a b\n7;c\n12;d\n"),
    "colours": ("order.txt", "4\ta b\t120\t18\t131\t0\n7\tc\t1\t2\t3\t0\n12\td\t1\t2\t3\t0\n"),
    "AAL": ("t.xml", "<atlas><data><label><index>4</index><name>a b</name></label><label><index>7"
            "</index><name>c</name></label><label><index>12</index><name>d</name></label></data></atlas>"),
    "FSL": ("t.xml", '<atlas><data><label index="3" x="1">a b</label><label index="6">c</label>'
            '<label index="11">d</label></data></atlas>'),
}  # fmt: skip


@pytest.mark.parametrize("form", TABLES)
def test_every_form_of_table_names_the_regions(write, tmp_path, form):
    name, text = TABLES[form]
    table = tmp_path / name
    table.write_text(text, encoding="utf-8")
    assert load_atlas(write(label_data()), labels=table).labels == ("a b", "c", "d")


def test_names_one_a_line_count_from_one(tmp_path):
    table = tmp_path / "names.txt"
    table.write_text("# comment\nHIP head\nGyrus, inferior\n", encoding="utf-8")
    assert read_labels(table)["label"].to_dict() == {1: "HIP head", 2: "Gyrus, inferior"}


def test_a_table_beside_the_volume_is_used(write, tmp_path):
    path = write(label_data(), "space-MNI152NLin6Asym_atlas-toy_dseg.nii.gz")
    (tmp_path / "space-MNI152NLin6Asym_atlas-toy_dseg.tsv").write_text(
        "index\tname\n4\tx\n7\ty\n12\tz\n99\tnot in the volume\n", encoding="utf-8"
    )
    atlas = load_atlas(path)
    assert atlas.labels == ("x", "y", "z")
    assert atlas.space == "MNI152NLin6Asym"
    assert load_atlas(path, space="mine").space == "mine"


def test_a_region_that_only_the_table_places_stays(write, tmp_path):
    table = tmp_path / "centres.dat"
    table.write_text("4 -7 -4 8\r\n5 30 -20 10\r\n7 7 -3 8\r\n12 0 2 5", encoding="utf-8")
    atlas = load_atlas(write(label_data()), labels=table)
    assert atlas.values == (4, 5, 7, 12)
    assert atlas.sizes.tolist() == [2, 0, 4, 6]
    np.testing.assert_allclose(atlas.coordinates[1], [30, -20, 10])


def test_hemispheres_come_from_the_name_first(write, tmp_path):
    table = tmp_path / "t.tsv"
    for names, sides in (
        (("7Networks_RH_Vis_1", "Right Thalamus", "Vermis_10"), "RRB"),
        (("HIP-head-l-rh", "Frontal_Sup_L", "THA-lh"), "RLL"),
        (("all", "Rolandic", "Left"), "LRL"),
    ):
        rows = "".join(f"{v}\t{n}\n" for v, n in zip((4, 7, 12), names, strict=True))
        table.write_text("index\tname\n" + rows, encoding="utf-8")
        assert "".join(load_atlas(write(label_data()), labels=table).hemispheres) == sides


def test_the_fingerprint_is_of_the_content(write, tmp_path):
    data = label_data()
    first = load_atlas(write(data)).sha256
    assert len(first) == 64
    assert load_atlas(write(data.astype(np.float32), "sub/atlas.nii")).sha256 == first
    changed = data.copy()
    changed[0, 0, 0] = 4
    moved = AFFINE.copy()
    moved[0, 3] += 1
    table = tmp_path / "t.tsv"
    table.write_text("index\tname\n4\ta\n7\tb\n12\tc\n", encoding="utf-8")
    others = {
        load_atlas(write(changed, "a/atlas.nii")).sha256,
        load_atlas(write(data, "b/atlas.nii", moved)).sha256,
        load_atlas(write(data, "c/atlas.nii"), labels=table).sha256,
    }
    assert len(others | {first}) == 4


def test_the_table_reads_back_as_regions(write, tmp_path):
    atlas = load_atlas(write(label_data()))
    table = atlas.regions_table()
    table.drop(columns="column").to_csv(tmp_path / "regions.tsv", sep="\t", index=False)
    again = read_regions(tmp_path / "regions.tsv")
    for name in ("label", "x", "y", "z", "size", "hemisphere", "column"):
        assert again[name].tolist() == table[name].tolist(), name
    assert table["atlas_value"].tolist() == ["4", "7", "12"]


def test_an_atlas_can_be_sent_to_another_process(write):
    atlas = load_atlas(write(label_data()))
    again = pickle.loads(pickle.dumps(atlas))
    assert again.sha256 == atlas.sha256
    assert np.array_equal(again.image.dataobj, atlas.image.dataobj)


def wrong_volumes():
    data = label_data()
    maps = np.stack([data, data], axis=-1)
    nan = data.astype(np.float32)
    nan[0, 0, 0] = np.nan
    return {
        "a mask": (data > 0, "2 to 20000 regions, found 1 values besides 0. Is it a mask"),
        "nothing": (data * 0, "found 0 values besides 0"),
        "probabilities": (data * 0.1, "whole numbers, found 0.7 and"),
        "NaN": (nan, "whole numbers, found nan and 0 more"),
        "four axes": (maps, r"three axes, found shape \(11, 6, 5, 2\)"),
        "negative": (data - 4, "labels from 1 and background 0, found -4"),
        "huge": (data.astype(np.int32) * 2_000_000, "labels up to 10000000, found 2.4e"),
        "overflow": (data * 1e30, "labels below 2147483648, found 1.2e"),
        "an image": (np.arange(30000, dtype=np.int32).reshape(30, 100, 10), "found 29999 values"),
    }


@pytest.mark.parametrize("fault", wrong_volumes())
def test_what_is_no_label_volume_is_refused(write, fault):
    data, message = wrong_volumes()[fault]
    with pytest.raises(CohortError, match=message):
        load_atlas(write(data.astype(np.uint8) if data.dtype == bool else data))


WRONG_TABLES = {
    "a value without a name": ("index\tname\n4\ta\n7\tb\n", "without a name: 12"),
    "doubled name": ("index\tname\n4\ta\n7\ta\n12\tb\n", "duplicated: a"),
    "doubled value": ("index\tname\n4\ta\n4\tb\n", "every value once, found 4 twice"),
    "negative value": ("index\tname\n-4\ta\n", "from 0 to 2147483647, found -4"),
    "a name as value": ("index\tname\nfour\ta\n", "whole number, found 'four'"),
    "no values": ("name\tnetwork\na\tVis\n", "column with the values"),
    "columns of other names": ("nr,what\n4,a\n7,b\n", "column with the values .* found nr, what"),
    "long line": ("index,name,color\n4,Gyrus, inferior,#1\n", "row 2: expected 3 columns, found 4"),
    "endless line": ("index,name\n4," + "x" * 140000, "found damage .field larger"),
    "short line": ("index\tname\tcolor\n4\ta\n", "row 2: expected 3 columns, found 2"),
    "web page": ("<html>\n<body>404</body>", "no table: '<html>"),
    "empty": ("\n\n", "found an empty file"),
    "only a header": ("index\tname\n", "found no region"),
    "binary": ("4\ta\0\n", "no table"),
}


@pytest.mark.parametrize("fault", WRONG_TABLES)
def test_a_table_that_does_not_fit_is_refused(write, tmp_path, fault):
    text, message = WRONG_TABLES[fault]
    table = tmp_path / "t.tsv"
    table.write_text(text, encoding="utf-8")
    with pytest.raises(CohortError, match=message):
        load_atlas(write(label_data()), labels=table)


def test_damaged_tables_are_refused(tmp_path):
    xml = tmp_path / "t.xml"
    xml.write_text("<atlas><label><index>1</index>", encoding="utf-8")
    with pytest.raises(CohortError, match="expected XML with labels, found damage"):
        read_labels(xml)
    xml.write_text("<atlas><label><index>1</index></label></atlas>", encoding="utf-8")
    with pytest.raises(CohortError, match="an index and a name"):
        read_labels(xml)
    latin = tmp_path / "t.txt"
    latin.write_bytes("1\tCortex pr\xe9frontal\n".encode("latin-1"))
    with pytest.raises(CohortError, match="found byte 0xe9"):
        read_labels(latin)
    with pytest.raises(CohortError, match="expected a label table, found none"):
        read_labels(tmp_path / "absent.tsv")


def test_byte_flips_in_tables_end_in_a_table_or_in_words(tmp_path):
    rng = np.random.default_rng(0)
    for name, text in TABLES.values():
        raw = np.frombuffer(text.encode(), np.uint8)
        for _ in range(60):
            flipped = raw.copy()
            flipped[rng.integers(0, len(raw), 2)] = rng.integers(0, 256, 2)
            path = tmp_path / name
            path.write_bytes(flipped.tobytes())
            with contextlib.suppress(CohortError):
                assert isinstance(read_labels(path), pd.DataFrame)


# ------------------------------------------------------------------ by name


def test_names_in_every_spelling():
    for name in NAMES:
        assert known_atlas(name).name == name
        assert known_atlas(name.upper().replace("-", "_")).name == name
    for text, name in (
        ("Schaefer2018_400Parcels_17Networks", "schaefer400-17"),
        ("schaefer1000-7", "schaefer1000"),
        ("Schaefer-100", "schaefer100"),
        ("HO", "harvard-oxford"),
        ("Tian S2", "tian-s2"),
    ):
        assert known_atlas(text).name == name


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(CohortError, match=r"found 'shaefer400'\. Did you mean schaefer400"):
        load_atlas("shaefer400")
    for text in ("schaefer150", "schaefer", "tian-s5", "cc300"):
        with pytest.raises(CohortError, match="Names: schaefer100 to schaefer1000, aal, aal3"):
            load_atlas(text)


def test_the_best_file_of_a_folder_is_taken(write, tmp_path):
    with pytest.raises(CohortError, match="expected the label volume of atlas a424"):
        load_atlas("a424", folder=tmp_path)
    with pytest.raises(CohortError, match="expected a folder of atlases, found nothing"):
        load_atlas("a424", folder=tmp_path / "absent")
    write(label_data(), "A424.nii.gz")
    assert load_atlas("a424", folder=tmp_path).sizes.tolist() == [2, 4, 6]
    more = label_data()
    more[0, 0, 0] = 4
    write(more, "deep/er/A424+2mm.nii.gz")
    (tmp_path / "A424_Coordinates.dat").write_text("4 1 1 1\n7 2 2 2\n12 3 3 3\n20 4 4 4\n")
    atlas = load_atlas("A424", folder=tmp_path)
    assert (atlas.name, atlas.space) == ("a424", "MNI152")
    assert atlas.sizes.tolist() == [3, 4, 6, 0]
    assert atlas.labels == ("A424_004", "A424_007", "A424_012", "A424_020")


def test_aal_is_not_taken_for_aal3(write, tmp_path):
    write(label_data(), "AAL3v1_2mm.nii.gz")
    with pytest.raises(CohortError, match="label volume of atlas aal "):
        load_atlas("aal", folder=tmp_path)
    assert load_atlas("aal3", folder=tmp_path).labels[0] == "AAL3_004"


# ------------------------------------------------------------------ nilearn's fetchers
# The real fetchers run; they find their files in the cache that the test fills.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NILEARN_DATA", str(tmp_path))
    monkeypatch.delenv("NILEARN_SHARED_DATA", raising=False)
    return tmp_path


def test_schaefer_through_the_fetcher(write, cache):
    numbered = np.zeros((20, 6, 5), np.int16)
    numbered.reshape(-1)[:100] = np.arange(1, 101)
    stem = "schaefer_2018/Schaefer2018_100Parcels_17Networks_order"
    write(numbered, f"{stem}_FSLMNI152_2mm.nii.gz")
    rows = [
        f"{i}\t17Networks_{'LH' if i <= 50 else 'RH'}_Vis_{i}\t1\t2\t3\t0" for i in range(1, 101)
    ]
    (cache / f"{stem}.txt").write_text("\n".join(rows) + "\n")
    atlas = load_atlas("schaefer100-17")
    assert (atlas.name, len(atlas), atlas.space) == ("schaefer100-17", 100, "MNI152NLin6Asym")
    assert (atlas.labels[0], atlas.labels[99]) == ("17Networks_LH_Vis_1", "17Networks_RH_Vis_100")
    assert atlas.hemispheres == ("L",) * 50 + ("R",) * 50


@pytest.mark.parametrize(
    ("name", "volume"), [("aal", "aal_SPM12/aal/atlas/AAL"), ("aal3", "aal_3v2/AAL3/AAL3v1")]
)
def test_aal_through_the_fetcher(write, cache, name, volume):
    write(label_data(), f"{volume}.nii")
    (cache / f"{volume}.xml").write_text(TABLES["AAL"][1])
    atlas = load_atlas(name)
    assert (atlas.name, atlas.labels, atlas.values) == (name, ("a b", "c", "d"), (4, 7, 12))


def test_craddock_through_the_fetcher(write, cache):
    stack = np.zeros((30, 30, 1, 3), np.int16)
    for place, count in enumerate((50, 198, 391)):
        stack[..., 0, place].reshape(-1)[:count] = np.arange(1, count + 1)
    write(stack, "craddock_2012/tcorr05_2level_all.nii.gz")
    assert len(load_atlas("cc200")) == 198
    assert load_atlas("cc400").labels[390] == "CC400_391"


def test_harvard_oxford_through_the_fetcher(write, cache):
    folder = "fsl/data/atlases/HarvardOxford"
    cortex, below = np.zeros((10, 4, 4), np.int16), np.zeros((10, 4, 4), np.int16)
    cortex[1, 1, 1], cortex[8, 1, 1], cortex[1, 2, 1], cortex[8, 2, 1] = 1, 2, 3, 4
    below[[1, 8], 1, 1], below[2, 3, 3], below[7, 3, 3], below[4, 3, 3] = 1, 2, 3, 4
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = -9
    write(cortex, f"{folder}/HarvardOxford-cortl-maxprob-thr25-2mm.nii.gz", affine)
    write(below, f"{folder}/HarvardOxford-sub-maxprob-thr25-2mm.nii.gz", affine)
    for kind, names in (
        (
            "Cortical-Lateralized",
            ("Left Frontal Pole", "Right Frontal Pole", "Left Insula", "Right Insula"),
        ),
        (
            "Subcortical",
            ("Left Cerebral White Matter", "Left Thalamus", "Right Thalamus", "Brain-Stem"),
        ),
    ):
        rows = "".join(f'<label index="{i}">{name}</label>' for i, name in enumerate(names))
        (cache / f"fsl/data/atlases/HarvardOxford-{kind}.xml").write_text(
            f"<atlas><data>{rows}</data></atlas>"
        )
    atlas = load_atlas("harvard-oxford")
    assert set(atlas.labels) == {
        "Left Frontal Pole", "Right Frontal Pole", "Left Insula", "Right Insula",
        "Left Thalamus", "Right Thalamus", "Brain-Stem",
    }  # fmt: skip
    place = atlas.labels.index("Right Thalamus")
    assert atlas.sizes[place] == 1
    np.testing.assert_allclose(atlas.coordinates[place], [5, 6, 6])
    for label, side, x in zip(
        atlas.labels, atlas.hemispheres, atlas.coordinates[:, 0], strict=True
    ):
        if label != "Brain-Stem":
            assert label.startswith("Left" if x < 0 else "Right")
            assert side == label[0]


def test_without_a_network_the_advice_is_a_folder(monkeypatch):
    def offline(*_, **__):
        raise OSError("Failed to resolve the host\nlong trace")

    monkeypatch.setattr(datasets, "fetch_atlas_schaefer_2018", offline)
    with pytest.raises(CohortError, match=r"could not fetch it \(Failed to resolve the host\)"):
        load_atlas("schaefer400")
    with pytest.raises(CohortError, match=r"nilearn does not fetch it\. Put a424"):
        load_atlas("a424")


# ------------------------------------------------------------------ the real files

COUNTS = {
    "schaefer100": 100, "schaefer400": 400, "aal": 116, "aal3": 166, "cc200": 200, "cc400": 392,
    "harvard-oxford": 111, "a424": 424, "tian-s3": 50,
}  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize("name", COUNTS)
def test_real_atlases_by_name(data_folder, name):
    atlas = load_atlas(name, folder=data_folder / "atlases")
    assert len(atlas) == COUNTS[name]
    assert (atlas.sizes > 0).all()
    assert (np.abs(atlas.coordinates) < 110).all()
    sides = np.array(atlas.hemispheres)
    assert (atlas.coordinates[sides == "L", 0] < 1).all()
    assert (atlas.coordinates[sides == "R", 0] > -1).all()
    assert min((sides == "L").sum(), (sides == "R").sum()) > 0.4 * len(atlas)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "cohort"),
    [("cc200", "abide1_cc200"), ("cc400", "abide1_cc400_filt"), ("ho", "abide1_ho111")],
)
def test_real_atlases_are_those_of_the_cohorts(data_folder, name, cohort):
    regions = data_folder / cohort / "regions.tsv"
    wanted = pd.read_csv(regions, sep="\t", keep_default_na=False)
    table = regions if name == "ho" else None
    atlas = load_atlas(name, folder=data_folder / "atlases", labels=table)
    assert list(atlas.labels) == wanted["name"].tolist()
    assert list(atlas.values) == wanted["label"].tolist()
    assert atlas.sizes.tolist() == wanted["n_voxels_3mm"].tolist()
    np.testing.assert_allclose(atlas.coordinates, wanted[["x", "y", "z"]], atol=0.006)
    assert "".join(atlas.hemispheres) == "".join(wanted["hemisphere"]).replace("M", "B")
