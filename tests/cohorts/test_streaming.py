"""Prepared cohorts that are mapped from disk or streamed instead of loaded."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from datasets.distributed import split_dataset_by_node

from cortexicon.cohorts import (
    CohortError,
    load_cohort,
    map_cohort,
    read_windows,
    save_cohort,
    series_views,
    stream_cohort,
)


@pytest.fixture
def folder(cohort, tmp_path):
    """The sixty scans in eight shards."""
    return save_cohort(cohort, tmp_path / "cohort", scans_per_shard=8)


def buffer_address(array):
    return array.__array_interface__["data"][0]


def test_a_mapped_cohort_is_the_loaded_one(cohort, folder):
    mapped = map_cohort(folder)
    assert mapped.content_hash == cohort.content_hash
    assert mapped.dataset.features == cohort.dataset.features
    pd.testing.assert_frame_equal(mapped.participants, cohort.participants)
    for one, other in zip(mapped, cohort, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
    # The files are data that `datasets` itself maps: nothing of the series lies in memory.
    assert len(mapped.dataset.cache_files) == 8


def test_the_second_opening_reads_the_arrow_files_and_decodes_nothing(folder, monkeypatch):
    first = map_cohort(folder).content_hash

    def decoded(*_):
        raise AssertionError("the shards were decoded again")

    monkeypatch.setattr("cortexicon.cohorts.streaming._write_arrow", decoded)
    assert map_cohort(folder).content_hash == first


def test_an_incomplete_cache_is_written_again(cohort, folder):
    map_cohort(folder)
    (cache,) = (folder / "mapped").iterdir()
    file = cache / "scans-00003-of-00008.arrow"
    file.write_bytes(file.read_bytes()[:-200])
    assert map_cohort(folder).content_hash == cohort.content_hash
    (cache / "digests.json").write_text("{")
    assert map_cohort(folder).content_hash == cohort.content_hash
    assert [path.name for path in (folder / "mapped").iterdir()] == [cache.name]


def test_damaged_shards_leave_no_cache(folder, tmp_path):
    shard = folder / "data" / "scans-00005-of-00008.parquet"
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(CohortError, match=r"scans-00005-of-00008\.parquet: .* truncated"):
        map_cohort(folder, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*")) == []


def test_another_content_than_the_hash_says_is_refused(folder, tmp_path):
    facts = json.loads((folder / "cohort.json").read_text())
    (folder / "cohort.json").write_text(json.dumps(facts | {"content_hash": "0" * 64}))
    with pytest.raises(CohortError, match="files changed after they were written"):
        map_cohort(folder, cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_a_clear_error(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CohortError, match="give another folder as cache"):
        map_cohort(folder, cache=tmp_path / "file")


@pytest.mark.parametrize("opened", [load_cohort, map_cohort])
def test_views_share_memory_and_windows_are_copies(folder, opened):
    cohort = opened(folder)
    views = series_views(cohort)
    for view, scan in zip(views, cohort, strict=True):
        np.testing.assert_array_equal(view, scan.values)
        assert not view.flags.writeable
    again = series_views(cohort)
    assert [buffer_address(v) for v in again] == [buffer_address(v) for v in views]
    rows, starts = [3, 59, 3], [0, 4, 7]
    windows = read_windows(views, rows, starts, 10)
    assert (windows.shape, windows.dtype) == ((3, 10, 6), np.float32)
    for window, row, start in zip(windows, rows, starts, strict=True):
        np.testing.assert_array_equal(window, views[row][start : start + 10])
    windows[:] = 0  # belongs to the caller
    assert views[3].any()


def test_views_of_a_subset_are_its_own_scans(cohort):
    part = cohort.subset(["s31", "s04", "s59"])
    for view, scan in zip(series_views(part), part, strict=True):
        np.testing.assert_array_equal(view, scan.values)


def test_a_window_beyond_the_scan_is_refused(cohort):
    views = series_views(cohort)
    for start in (-1, 11):
        with pytest.raises(CohortError, match=f"scan 0: .*20 volumes, found {start} to"):
            read_windows(views, [0], [start], 10)


def test_a_stream_passes_over_every_scan(cohort, folder):
    stream = stream_cohort(folder)
    assert (stream.labels, stream.atlas) == (cohort.labels, "toy")
    np.testing.assert_array_equal(stream.coordinates, cohort.coordinates)
    assert stream.scans.num_shards == 8
    rows = list(stream.scans)
    assert [row["subject_id"] for row in rows] == cohort.subject_ids
    for row, scan in zip(rows, cohort, strict=True):
        assert row["time_series"].dtype == np.float32
        np.testing.assert_array_equal(row["time_series"], scan.values)
        assert (row["tr"], row["site"]) == (scan.tr, scan.site)
    assert rows[7]["iq"] is None  # 7 % 7: missing stays missing
    assert rows[8]["iq"] == 108.0


def test_ranks_and_workers_share_the_scans_without_doubles(cohort, folder):
    shuffled = stream_cohort(folder).scans.shuffle(seed=3, buffer_size=10)
    orders = []
    for world_size, workers in ((2, 0), (2, 2), (3, 0)):
        seen = []
        for rank in range(world_size):
            part = split_dataset_by_node(shuffled, rank, world_size)
            loader = torch.utils.data.DataLoader(part, batch_size=None, num_workers=workers)
            seen.append([row["subject_id"] for row in loader])
        found = sorted(name for part in seen for name in part)
        assert found == cohort.subject_ids, (world_size, workers)
        assert min(map(len, seen)) >= 60 // world_size - 8
        orders.append(seen)
    assert orders[0][0] != sorted(orders[0][0])


def test_a_stream_goes_on_from_its_state(folder):
    scans = stream_cohort(folder).scans.shuffle(seed=3, buffer_size=1)
    whole = [row["subject_id"] for row in scans]
    first = []
    for row in scans:
        first.append(row["subject_id"])
        if len(first) == 17:
            break
    state = scans.state_dict()
    resumed = stream_cohort(folder).scans.shuffle(seed=3, buffer_size=1)
    resumed.load_state_dict(state)
    assert first + [row["subject_id"] for row in resumed] == whole


def test_a_stream_names_the_damaged_shard_when_it_gets_there(folder):
    shard = folder / "data" / "scans-00006-of-00008.parquet"
    shard.write_bytes(b"PAR1" + shard.read_bytes()[:300])
    scans = iter(stream_cohort(folder).scans)
    for _ in range(48):
        next(scans)
    with pytest.raises(CohortError, match=r"scans-00006-of-00008\.parquet"):
        next(scans)


@pytest.mark.parametrize("opened", [map_cohort, stream_cohort])
def test_only_prepared_cohorts_are_opened(tables, tmp_path, opened):
    with pytest.raises(CohortError, match=r"found no cohort\.json there"):
        opened(tables.write(tmp_path / "tables"))


def test_a_shard_of_other_regions_is_refused(cohort, folder, tmp_path):
    regions = pd.read_csv(folder / "regions.tsv", sep="\t")
    regions.iloc[:5].to_csv(folder / "regions.tsv", sep="\t", index=False)
    for opened in (load_cohort, map_cohort, lambda path: list(stream_cohort(path).scans)):
        with pytest.raises(CohortError, match="expected 5 numbers in every volume, found 6"):
            opened(folder)


def test_flipped_bytes_are_an_error_of_ours_or_nothing(cohort, tmp_path):
    whole = save_cohort(cohort.subset(cohort.subject_ids[:20]), tmp_path / "whole", 10)
    expected = load_cohort(whole).content_hash
    rng = np.random.default_rng(0)
    refused = 0
    for number in range(150):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        path = files[number % len(files)]
        data = bytearray(path.read_bytes())
        for place in rng.integers(0, len(data), 4):
            data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            # participants.tsv is for people; everything else is under the hash.
            assert load_cohort(folder).content_hash == expected
        except CohortError:
            refused += 1
        try:
            list(stream_cohort(folder).scans)
            assert map_cohort(folder).content_hash == expected
        except CohortError:
            pass
        shutil.rmtree(folder)
    assert refused > 75
