"""Bad input -> message: every message says what was expected, what was found, and where."""

import re

import numpy as np
import pandas as pd
import pytest

from cortexicon.cohorts import CohortError, ParcelSeries, load_cohort, read_series


def cell(table, row, column, value):
    """A damage that changes one cell of one table."""

    def change(tables):
        frame = getattr(tables, table)
        if table != "series":
            frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value

    return change


def column(table, name, values):
    """A damage that replaces a column; None drops it."""

    def change(tables):
        frame = getattr(tables, table)
        if values is None:
            del frame[name]
        else:
            frame[name] = values

    return change


def constant_regions(count):
    def change(tables):
        tables.series.iloc[30:60, 2 : 2 + count] = 5.0

    return change


def all_nan(tables):
    tables.series.iloc[30:60, 2:] = np.nan


def same_scan_twice(tables):
    tables.series.iloc[30:60, 2:] = tables.series.iloc[0:30, 2:].to_numpy()


def doubled_rows(tables):
    tables.series = pd.concat([tables.series, tables.series.iloc[:30]])


def dropped_rows(tables):
    tables.series = tables.series.drop(index=[7])


def background_column(tables):
    tables.series.insert(2, "background", np.float32(0.0))


def integer_column(tables):
    tables.series["r004"] = np.arange(len(tables.series))


def short_scans(tables):
    tables.series = tables.series[tables.series["t"] < 5]


def no_scan(tables):
    tables.series = tables.series[tables.series["participant_id"] != "1003"]


def spelled_twice(first, second):
    def change(tables):
        names = {"1000": first, "1001": second}
        for frame in (tables.participants, tables.series):
            frame["participant_id"] = frame["participant_id"].replace(names)

    return change


def declared_length(tables):
    tables.participants["n_timepoints"] = ["30"] * 11 + ["31"]


TABLES = {
    "infinite value": (
        cell("series", 37, "r004", np.inf),
        r"subject 1001: expected finite values .* found inf at time point 7, region region4",
    ),
    "1e30": (cell("series", 37, "r004", 1e30), r"found 1e\+30 at time point 7, region region4"),
    "more than 10 % constant": (
        constant_regions(3),
        r"subject 1001: expected at most 10% of 20 regions without signal, found 3 "
        r"\(3 constant, 0 with NaN\): region0, region1, region2",
    ),
    "all-NaN subject": (all_nan, r"subject 1001: .* found NaN in every region"),
    "TR missing": (cell("participants", 1, "tr", "n/a"), r"subject 1001: .*TR missing"),
    "TR column missing": (column("participants", "tr", None), r"expected a column tr"),
    "TR 0": (cell("participants", 1, "tr", "0"), r"subject 1001: expected a TR above 0 s"),
    "TR in milliseconds": (
        cell("participants", 1, "tr", "2000"),
        r"subject 1001: .*TR 2000 looks like milliseconds: write 2\.",
    ),
    "TR absurd": (cell("participants", 1, "tr", "30"), r"between 0\.05 and 20 s, found TR 30"),
    "one region too many": (
        background_column,
        r"expected the 20 regions of atlas cohort .* found 21 series\. Extra: background",
    ),
    "one region too few": (column("series", "r003", None), r"found 19 series.*missing: r003"),
    "integers": (integer_column, r"column r004: expected float32, found int64"),
    "duplicated labels": (
        cell("regions", 4, "label", "region3"),
        r"regions\.tsv: expected unique region labels, found 1 duplicated: region3",
    ),
    "empty label": (cell("regions", 4, "label", ""), r"found empty labels at positions 4"),
    "coordinate missing": (
        cell("regions", 4, "y", "n/a"),
        r"regions\.tsv, line 6, column y: expected an MNI coordinate within 150 mm, found 'n/a'",
    ),
    "coordinates in micrometres": (cell("regions", 4, "y", "35000"), r"line 6, column y: .*150 mm"),
    "decimal commas": (
        cell("participants", 1, "age", "21,5"),
        r"participants\.tsv, line 3, column age: expected a number, found '21,5'\. .*commas",
    ),
    "decimal commas elsewhere": (
        column("participants", "fiq", ["101,5"] + ["100"] * 11),
        r"line 2, column fiq: .*'101,5'",
    ),
    "text for an age": (cell("participants", 1, "age", "old"), r"line 3, column age: .*'old'"),
    "sex coded 1/2": (
        column("participants", "sex", ["1", "2"] * 6),
        r"line 2, column sex: expected F or M, found 1, 2\. .*sex_codes=",
    ),
    "age -9999": (
        cell("participants", 1, "age", "-9999"),
        r"line 3, column age: .*found -9999, which stands for missing \(1 rows\)",
    ),
    "IQ -999": (column("participants", "fiq", ["-999", "100"] * 6), r"column fiq: .*\(6 rows\)"),
    "age in months": (
        column("participants", "age", [str(200 + i) for i in range(12)]),
        r"column age: expected years, .*200 to 211 .*look like months",
    ),
    "one age of 300": (cell("participants", 1, "age", "300"), r"line 3, column age: .*found 300"),
    "site missing": (
        cell("participants", 1, "site", "n/a"),
        r"line 3, column site: expected the scanner's name, found 'n/a'",
    ),
    "no site column": (column("participants", "site", None), r"expected a column site, found"),
    "no id column": (column("participants", "participant_id", None), r"a column participant_id"),
    "sub-01 and 01": (
        spelled_twice("sub-01", "01"),
        r"lines 2 and 3, column participant_id: .*'sub-01' and '01', the same subject",
    ),
    "01 and 1": (spelled_twice("01", "1"), r"found '01' and '1', the same subject"),
    "one sub_id twice": (
        column("participants", "sub_id", ["7", "7", *map(str, range(8, 18))]),
        r"lines 2 and 3, column sub_id: .*the same subject",
    ),
    "same scan twice": (same_scan_twice, r"subjects 1000 and 1001: .*the same scan twice"),
    "rows doubled": (doubled_rows, r"participant 1000: .*repeated ones \(the same scan twice\?\)"),
    "rows lost": (dropped_rows, r"participant 1000: expected time points 0 to 28 .*missing ones"),
    "cut after writing": (declared_length, r"participant 1011: expected 31 time points .*found 30"),
    "participant without scan": (no_scan, r"Without scan: 1003; without row: none"),
    "five volumes": (short_scans, r"expected at least 10 time points, found 5"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name, tables, tmp_path):
    damage, pattern = TABLES[name]
    damage(tables)
    folder = tables.write(tmp_path / "cohort")
    with pytest.raises(CohortError) as caught:
        load_cohort(folder)
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


def test_undamaged_tables_load(tables, tmp_path):
    """Guards the table above: without damage the same folder is fine."""
    cohort = load_cohort(tables.write(tmp_path / "cohort"))
    assert len(cohort) == 12
    assert cohort.labels[0] == "region0"


def rewrite(name, change):
    """A damage to the bytes of one file."""

    def damage(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def remove(name):
    return lambda folder: (folder / name).unlink()


PEOPLE, BOLD = "participants.tsv", "timeseries/bold.parquet"
FILES = {
    "no participants": (remove(PEOPLE), r"found no participants\.tsv"),
    "no regions": (remove("regions.tsv"), r"found no regions\.tsv"),
    "no series": (remove(BOLD), r"found no timeseries/bold\.parquet"),
    "empty table": (rewrite(PEOPLE, lambda b: b""), r"participants\.tsv: .*found an empty file"),
    "empty series": (rewrite(BOLD, lambda b: b""), r"bold\.parquet: .*found an empty file"),
    "truncated series": (
        rewrite(BOLD, lambda b: b[: len(b) // 2]),
        r"bold\.parquet: .*truncated or corrupted .*Copy the file again",
    ),
    "damaged series": (
        rewrite(BOLD, lambda b: b[:4] + bytes(len(b) // 2) + b[4 + len(b) // 2 :]),
        r"bold\.parquet: .*corrupted",
    ),
    "web page as series": (
        rewrite(BOLD, lambda b: b"<!DOCTYPE html><html></html>"),
        r"bold\.parquet: .*first bytes b'<!DOCTYP'",
    ),
    "web page as table": (rewrite(PEOPLE, lambda b: b"<html>\nno"), r"looks like a web page"),
    "UTF-16": (rewrite(PEOPLE, lambda b: b.decode().encode("utf-16")), r"UTF-16"),
    "Latin-1": (
        rewrite(PEOPLE, lambda b: b.replace(b"\tA\t", b"\t\xc9\t", 1)),
        r"participants\.tsv, line 2: expected UTF-8 text, found byte 0xc9",
    ),
    "no header": (
        rewrite("regions.tsv", lambda b: b"1\t2.0\t3.0\t4.0\n"),
        r"regions\.tsv, line 1: .*no header",
    ),
    "doubled header": (
        rewrite(PEOPLE, lambda b: b.splitlines(True)[0] + b),
        r"participants\.tsv, line 2: .*doubled header",
    ),
    "doubled column": (
        rewrite(PEOPLE, lambda b: b.replace(b"age", b"sex", 1)),
        r"participants\.tsv, line 1: .*duplicated: sex",
    ),
    "commas between columns": (
        rewrite(PEOPLE, lambda b: b.replace(b"\t", b",")),
        r"line 1: expected columns separated by tabs",
    ),
    "ragged line": (
        rewrite(PEOPLE, lambda b: b.replace(b"\tF\t", b"\t", 1)),
        r"participants\.tsv, line 2: expected 5 columns, found 4",
    ),
    "header only": (
        rewrite(PEOPLE, lambda b: b.splitlines(True)[0]),
        r"expected rows below the header, found none",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tables, tmp_path):
    damage, pattern = FILES[name]
    folder = tables.write(tmp_path / "cohort")
    damage(folder)
    with pytest.raises(CohortError) as caught:
        load_cohort(folder)
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)


def test_byte_order_mark_is_harmless(tables, tmp_path):
    folder = tables.write(tmp_path / "cohort")
    path = folder / PEOPLE
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_cohort(folder).subject_ids[0] == "1000"


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(CohortError, match="expected a cohort folder, found nothing"):
        load_cohort(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CohortError, match="expected a cohort folder, found a file"):
        load_cohort(tmp_path / "file")


LABELS = [f"region{i}" for i in range(20)]
ARRAYS = {
    "transposed": (lambda x: x.T, {}, r"found shape \(20, 30\): transposed\. Pass time_axis"),
    "square": (lambda x: x[:20], {}, r"shape \(20, 20\): it could be either way round"),
    "wrong number of regions": (
        lambda x: x[:, :19],
        {},
        r"expected shape \(time, 20\) for atlas toy, found \(30, 19\)",
    ),
    "three axes": (lambda x: x[None], {}, r"two-dimensional array \(time, regions\)"),
    "text": (lambda x: x.astype(str), {}, r"expected numbers, found an array of <U"),
    "objects": (lambda x: x.astype(object), {}, r"found an array of object"),
    "time axis 2": (lambda x: x, {"time_axis": 2}, r"expected time_axis 0 or 1, found 2"),
    "TR None": (lambda x: x, {"tr": None}, r"TR missing"),
    "TR text": (lambda x: x, {"tr": "fast"}, r"found 'fast', which is not a number"),
    "coordinates": (
        lambda x: x,
        {"coordinates": np.zeros((19, 3))},
        r"expected finite MNI coordinates of shape \(20, 3\), found \(19, 3\)",
    ),
    "labels": (lambda x: x, {"labels": ["region0"] * 20}, r"duplicated: region0"),
}


def make_series(values, **changes):
    facts = {
        "labels": LABELS,
        "coordinates": np.zeros((20, 3)),
        "atlas": "toy",
        "tr": 2.0,
        "subject_id": "s1",
    }
    return ParcelSeries.from_array(values, **(facts | changes))


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name):
    damage, changes, pattern = ARRAYS[name]
    values = np.random.default_rng(0).standard_normal((30, 20))
    with pytest.raises(CohortError, match=pattern) as caught:
        make_series(damage(values), **changes)
    assert "subject s1" in str(caught.value)


def write_series(path, values, labels, regions_in_rows=False):
    frame = pd.DataFrame(values, columns=labels)
    if regions_in_rows:
        frame = frame.T.rename_axis("region").reset_index()
    frame.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path


@pytest.fixture
def regions():
    return pd.DataFrame({"label": LABELS, "x": 1.0, "y": 2.0, "z": 3.0})


def test_labels_decide_the_orientation(regions, tmp_path):
    values = np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32)  # square
    order = np.random.default_rng(1).permutation(20)
    shuffled = [LABELS[i] for i in order]
    for in_rows in (False, True):
        path = write_series(tmp_path / "scan.tsv", values[:, order], shuffled, in_rows)
        scan = read_series(path, regions, "toy", 2.0, "s1")
        assert scan.labels == LABELS
        np.testing.assert_allclose(scan.values, values, rtol=1e-6)


def test_series_table_of_another_atlas(regions, tmp_path):
    values = np.random.default_rng(0).standard_normal((30, 20))
    path = write_series(tmp_path / "scan.tsv", values, ["other", *LABELS[1:]])
    with pytest.raises(CohortError, match="Extra: other; missing: region0"):
        read_series(path, regions, "toy", 2.0, "s1")


def test_missing_cells_mask_the_region(regions, tmp_path):
    values = np.random.default_rng(0).standard_normal((30, 20))
    values[:, 3] = np.nan
    path = write_series(tmp_path / "scan.tsv", values, LABELS)
    health = read_series(path, regions, "toy", 2.0, "s1").validate()
    assert health.missing_regions == ("region3",)
    path.write_text(path.read_text().replace("n/a", "0,5", 1))
    with pytest.raises(CohortError, match=r"line 2, column region3: .*'0,5'.*commas"):
        read_series(path, regions, "toy", 2.0, "s1")
