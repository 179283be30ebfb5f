"""A cohort in memory and on disk."""

import json

import numpy as np
import pandas as pd
import pytest

from cortexicon.cohorts import (
    CohortError,
    build,
    build_cohort,
    cohort_from_series,
    load_cohort,
    save_cohort,
)


def test_dataset_and_series_agree(cohort):
    row = cohort.dataset[7]
    scan = cohort.series("s07")
    assert row["time_series"].dtype == np.float32
    assert row["time_series"].shape == (22, 6)
    np.testing.assert_array_equal(row["time_series"], scan.values)
    assert (scan.tr, scan.site, scan.session, scan.atlas) == (3.0, "D", "", "toy")
    assert scan.coordinates.shape == (6, 3)
    assert cohort.participants.loc["s07", "sub_id"] == 50007
    assert "time_series" not in cohort.participants
    assert [s.subject_id for s in cohort] == cohort.subject_ids
    assert len(cohort) == 60


def test_round_trip_keeps_everything(cohort, tmp_path):
    path = save_cohort(cohort, tmp_path / "out", scans_per_shard=25)
    assert len(list((path / "data").iterdir())) == 3
    back = load_cohort(path)
    assert back.content_hash == cohort.content_hash
    assert back.dataset.features == cohort.dataset.features
    assert back.labels == cohort.labels
    np.testing.assert_array_equal(back.coordinates, cohort.coordinates)
    pd.testing.assert_frame_equal(back.participants, cohort.participants)
    for one, other in zip(back, cohort, strict=True):
        np.testing.assert_array_equal(one.values, other.values)


def test_shards_are_a_dataset_of_their_own(cohort, tmp_path):
    import datasets

    path = save_cohort(cohort, tmp_path / "out")
    files = str(path / "data" / "*.parquet")
    dataset = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))
    assert dataset["train"].features == cohort.dataset.features


def test_hash_sees_every_kind_of_change(cohort):
    def rebuilt(values=None, **columns):
        stacked = np.concatenate([s.values for s in cohort]) if values is None else values
        table = cohort.participants.reset_index().assign(**columns)
        return build_cohort(stacked, table, cohort.regions, cohort.atlas)

    assert rebuilt().content_hash == cohort.content_hash
    values = np.concatenate([s.values for s in cohort])
    values[3, 2] += 1e-3
    assert rebuilt(values).content_hash != cohort.content_hash
    assert rebuilt(tr=2.5).content_hash != cohort.content_hash
    assert rebuilt(age=30.0).content_hash != cohort.content_hash
    reversed_order = cohort.subset(cohort.subject_ids[::-1])
    assert reversed_order.content_hash == cohort.content_hash
    assert cohort.subset(cohort.subject_ids[1:]).content_hash != cohort.content_hash


def test_subset(cohort):
    part = cohort.subset(["s31", "s04"])
    assert part.subject_ids == ["s31", "s04"]
    np.testing.assert_array_equal(part.series("s04").values, cohort.series("s04").values)
    with pytest.raises(CohortError, match="1 unknown: nobody"):
        cohort.subset(["s01", "nobody"])
    with pytest.raises(CohortError, match="repeated"):
        cohort.subset(["s01", "s01"])
    with pytest.raises(CohortError, match="found 'nobody'"):
        cohort.series("nobody")


def test_saved_subset_loads(cohort, tmp_path):
    part = cohort.subset(cohort.subject_ids[10:20])
    assert load_cohort(save_cohort(part, tmp_path / "part")).content_hash == part.content_hash


def test_saving_replaces_a_cohort_and_nothing_else(cohort, tmp_path):
    path = save_cohort(cohort, tmp_path / "out")
    save_cohort(cohort.subset(["s01", "s02"]), path)
    assert len(load_cohort(path)) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(CohortError, match="found something else"):
        save_cohort(cohort, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


def test_failed_save_leaves_the_old_cohort_and_no_rest(cohort, tmp_path, monkeypatch):
    path = save_cohort(cohort, tmp_path / "out")

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full_disk)
    with pytest.raises(CohortError, match="No space left on device"):
        save_cohort(cohort.subset(["s01"]), path)
    assert len(load_cohort(path)) == 60
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_changed_files_are_noticed(cohort, tmp_path):
    path = save_cohort(cohort, tmp_path / "out", scans_per_shard=25)
    table = (path / "regions.tsv").read_text()
    (path / "regions.tsv").write_text(table.replace("region3", "region9"))
    with pytest.raises(CohortError, match="files changed after they were written"):
        load_cohort(path)
    (path / "regions.tsv").write_text(table)
    facts = json.loads((path / "cohort.json").read_text())
    (path / "cohort.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(CohortError, match="expected cohort format 1, found 99"):
        load_cohort(path)
    (path / "cohort.json").write_text("{")
    with pytest.raises(CohortError, match=r"cohort\.json: .*found damage"):
        load_cohort(path)
    (path / "cohort.json").write_text(json.dumps(facts))
    next((path / "data").iterdir()).unlink()
    with pytest.raises(CohortError, match="expected 3 shards, found 2"):
        load_cohort(path)


def test_cohort_from_series_aligns_by_label(cohort):
    scans = [cohort.series("s00"), cohort.series("s01").reorder(cohort.labels[::-1])]
    built = cohort_from_series(scans, cohort.participants)
    np.testing.assert_array_equal(built.series("s01").values, cohort.series("s01").values)
    assert built.participants.loc["s01", "age"] == cohort.participants.loc["s01", "age"]
    with pytest.raises(CohortError, match="one scan per participant, found more for s00"):
        cohort_from_series([scans[0], scans[0]])
    with pytest.raises(CohortError, match="found none"):
        cohort_from_series([])


def test_unusable_scans_may_stay_when_marked(tables, tmp_path):
    tables.series.iloc[30:60, 2:] = 0.0
    tables.participants["recommended"] = ["True", "False"] + ["True"] * 10
    quality = load_cohort(tables.write(tmp_path / "cohort")).quality()
    assert "found 20 (20 constant" in quality.loc["1001", "problem"]
    assert (quality["problem"].drop("1001") == "").all()


def test_types_of_a_participants_table(tables, tmp_path):
    tables.participants["fiq"] = ["n/a"] + ["101"] * 11
    tables.participants["sex"] = ["female", "m"] + ["2"] * 10
    tables.participants["eyes"] = ["open"] * 11 + ["n/a"]
    folder = tables.write(tmp_path / "cohort")
    cohort = load_cohort(folder, atlas="mine", sex_codes={"1": "M", "2": "F"})
    table = cohort.participants
    assert cohort.atlas == "mine"
    assert table["sex"].tolist() == ["F", "M"] + ["F"] * 10
    assert np.isnan(table["fiq"].iloc[0])
    assert table["fiq"].iloc[1] == 101.0
    assert table["age"].dtype == np.float64
    assert pd.isna(table["eyes"].iloc[-1])
    assert "sex: F 11, M 1" in cohort.summary()


def test_rows_in_any_order(tables, tmp_path):
    expected = load_cohort(tables.write(tmp_path / "one")).series("1004").values
    tables.series = tables.series.sample(frac=1, random_state=0)
    shuffled = load_cohort(tables.write(tmp_path / "two"))
    np.testing.assert_array_equal(shuffled.series("1004").values, expected)


@pytest.mark.data
def test_real_cohort(data_folder):
    cohort = load_cohort(data_folder / "abide1_cc200")
    assert (len(cohort), len(cohort.labels), cohort.atlas) == (918, 200, "cc200")
    assert cohort.participants["recommended"].sum() == 752
    assert cohort.participants["site"].nunique() == 16
    scan = cohort.series("CMU_a_0050642")
    assert scan.values.shape == (236, 200)
    assert scan.values[0, :2].tolist() == [-2.0, 6.5]
    assert cohort.labels[0] == "CC200_001"
    assert cohort.regions.loc[0, "network"] == "Visual"
    quality = cohort.quality()[cohort.participants["recommended"]]
    assert (quality["problem"] == "").all()
    zeros = cohort.participants["n_zero_regions"][cohort.participants["recommended"]]
    assert (quality["n_constant"] == zeros).all()


def test_a_cohort_of_more_numbers_than_a_chunk_holds(cohort, tmp_path, monkeypatch):
    # The limit of 2**31 - 1 numbers, made small: 60 scans of 20 to 24 volumes, 6 regions.
    values = np.concatenate([scan.values for scan in cohort])
    table = cohort.participants.reset_index()
    monkeypatch.setattr(build, "MAX_CHUNK", 1000)
    chunked = build_cohort(values, table, cohort.regions, cohort.atlas)
    assert chunked.dataset.data.column("time_series").num_chunks > 5
    assert chunked.content_hash == cohort.content_hash
    for subject in cohort.subject_ids:
        np.testing.assert_array_equal(chunked.series(subject).values, cohort.series(subject).values)
    save_cohort(chunked, tmp_path / "chunked")
    assert load_cohort(tmp_path / "chunked").content_hash == cohort.content_hash
