"""Cohorts larger than memory: mapped from disk, streamed shard by shard, read by the window.

A folder of `save_cohort` holds compressed Parquet, which has to be decoded before a window can be
cut from it. Two ways around holding all of it in memory:

* `map_cohort` decodes it once into uncompressed Arrow files beside it. They are memory-mapped, so
  any window of any scan is read at the speed of the disk or of the page cache, in any order.
* `stream_cohort` passes over the shards in order, a row group at a time, as
  `datasets.IterableDataset` does: shuffled through a buffer, divided between ranks and workers.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from .build import SERIES_COLUMN, Cohort, digest_values, to_dataset
from .series import CohortError
from .shards import DAMAGE, open_parquet, read_group, split_series, view_series
from .storage import Description, check_hash, describe_prepared


class StreamedCohort(NamedTuple):
    """A prepared cohort whose scans are read while one iterates over them.

    Attributes
    ----------
    scans : datasets.IterableDataset
        Dictionaries of the columns of `Cohort.dataset`; `time_series` is float32 (time, regions).
        Shuffling, `split_dataset_by_node` and the workers of a DataLoader divide it by shards.
    regions : pandas.DataFrame
    labels : list of str
    coordinates : numpy.ndarray of float32, shape (regions, 3), MNI mm
    atlas, content_hash : str
        As of `Cohort`. NOTE: the hash is the one written with the cohort; a stream that is not
        read to its end cannot be compared with it.
    """

    scans: datasets.IterableDataset
    regions: pd.DataFrame
    labels: list[str]
    coordinates: np.ndarray
    atlas: str
    content_hash: str


def stream_cohort(path: str | Path) -> StreamedCohort:
    """Open a folder written by `save_cohort` for reading in passes, without loading it.

    Damaged data are reported when the pass reaches them.

    Parameters
    ----------
    path : path
        As many shards as ranks times workers at least, so that each has some to read:
        `save_cohort(cohort, path, scans_per_shard=...)`.

    Raises
    ------
    CohortError
        Not such a folder, or its description is damaged.
    """
    path, known = _describe(path)
    scans = datasets.IterableDataset.from_generator(
        _read_scans,
        gen_kwargs={
            "shards": [str(shard) for shard in known.shards],
            "num_regions": len(known.regions),
        },
    )
    coordinates = known.regions[["x", "y", "z"]].to_numpy(np.float32)
    labels = [str(label) for label in known.regions["label"]]
    return StreamedCohort(
        scans, known.regions, labels, coordinates, known.atlas, known.content_hash
    )


def map_cohort(path: str | Path, cache: str | Path | None = None) -> Cohort:
    """Open a folder written by `save_cohort` with its series on disk instead of in memory.

    The first call decodes the shards, compares the content hash and leaves uncompressed Arrow
    files; later calls map those. They may be deleted at any time.

    Parameters
    ----------
    path : path
    cache : path, optional
        Folder for the Arrow files, about 4 bytes x volumes x regions. Default: ``PATH/mapped``.

    Raises
    ------
    CohortError
        As `load_cohort`; the cache cannot be written.
    """
    path, known = _describe(path)
    folder = path / "mapped" if cache is None else Path(cache)
    folder = folder / known.content_hash[:16]
    digests = _read_digests(folder)
    if digests is None:
        scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
        try:
            scratch.mkdir(parents=True)
            digests = _write_arrow(known, scratch)
            check_hash(_open_arrow(scratch, known, path, digests), known.content_hash)
            shutil.rmtree(folder, ignore_errors=True)  # what an older, damaged cache left
            os.replace(scratch, folder)
        except OSError as error:
            # Another process may have been faster; what it wrote is as good.
            digests = _read_digests(folder)
            if digests is None:
                raise CohortError(
                    f"{folder}: expected to write the mapped series, found: {error}. Check space "
                    "and permissions, or give another folder as cache."
                ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    cohort = _open_arrow(folder, known, path, digests)
    check_hash(cohort, known.content_hash)
    return cohort


def series_views(cohort: Cohort) -> list[np.ndarray]:
    """Every scan as a read-only view of Arrow's memory, in the order of the cohort.

    Nothing is copied or decoded: a slice of a view is a window, and of a mapped cohort only the
    pages of that window are read from disk. `Cohort.dataset` in numpy format copies the whole
    scan for each window.

    Returns
    -------
    list of numpy.ndarray of float32, shape (time, regions)
    """
    rows = cohort.dataset.select_columns([SERIES_COLUMN]).with_format("arrow")
    count = len(cohort.labels)
    return [view_series(rows[row].column(0).chunk(0).storage, count) for row in range(len(cohort))]


def read_windows(
    views: Sequence[np.ndarray], rows: Sequence[int], starts: Sequence[int], length: int
) -> np.ndarray:
    """Copy windows out of `series_views`.

    Parameters
    ----------
    views : sequence of numpy.ndarray of float32, shape (time, regions)
    rows, starts : sequence of int, length batch
        Which scan, and the first volume of the window in it.
    length : int
        Volumes.

    Returns
    -------
    numpy.ndarray of float32, shape (batch, length, regions)

    Raises
    ------
    CohortError
        A window reaches beyond its scan.
    """
    windows = np.empty((len(rows), length, views[0].shape[1]), np.float32)
    for window, row, start in zip(windows, rows, starts, strict=True):
        if start < 0 or start + length > len(views[row]):
            raise CohortError(
                f"scan {row}: expected a window within its {len(views[row])} volumes, found "
                f"{start} to {start + length}. Draw starts of 0 to volumes - length."
            )
        window[:] = views[row][start : start + length]
    return windows


def _describe(path: str | Path) -> tuple[Path, Description]:
    path = Path(path)
    if not (path / "cohort.json").is_file():
        raise CohortError(
            f"{path}: expected a prepared cohort, found no cohort.json there. Write one with "
            "save_cohort or `cortexicon prepare`."
        )
    return path, describe_prepared(path)


def _read_groups(shard: Path, num_regions: int) -> Iterator[tuple[pa.Table, pa.ChunkedArray]]:
    """Plain columns and series of one row group after another."""
    file = open_parquet(shard)
    for group in range(file.num_row_groups):
        yield split_series(read_group(file, shard, group), num_regions, shard)


def _read_scans(shards: list[str], num_regions: int) -> Iterator[dict[str, Any]]:
    """Scans of the shards, one dictionary each."""
    for shard in shards:
        for plain, scans in _read_groups(Path(shard), num_regions):
            for row, record in enumerate(plain.to_pylist()):
                # A copy: a view in a shuffling buffer would keep its whole row group in memory.
                values = view_series(scans.slice(row, 1).chunk(0), num_regions).copy()
                yield record | {SERIES_COLUMN: values}


def _write_arrow(known: Description, folder: Path) -> dict[str, str]:
    """Decode every shard into an Arrow file; returns the digest of each scan by subject id."""
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    count = len(known.regions)
    for shard in known.shards:
        path = folder / f"{shard.stem}.arrow"
        writer = None
        with pa.OSFile(str(path), "wb") as sink:
            for plain, scans in _read_groups(shard, count):
                for row, subject in enumerate(plain.column("subject_id").to_pylist()):
                    values = view_series(scans.slice(row, 1).chunk(0), count)
                    digests[subject] = digest_values(values)
                table = to_dataset(plain, scans, count).data.table
                if writer is None:
                    writer = pa.ipc.new_stream(sink, table.schema)
                writer.write_table(table)
            if writer is None:
                raise CohortError(f"{shard}: expected scans, found none. Write the cohort again.")
            writer.close()
        sizes[path.name] = path.stat().st_size
    (folder / "digests.json").write_text(json.dumps({"sizes": sizes, "digests": digests}) + "\n")
    return digests


def _read_digests(folder: Path) -> dict[str, str] | None:
    """Digests of a complete folder of Arrow files; None where there is none."""
    try:
        facts = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
        complete = all(
            (folder / name).stat().st_size == size for name, size in facts["sizes"].items()
        )
        return dict(facts["digests"]) if complete else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _open_arrow(folder: Path, known: Description, path: Path, digests: dict[str, str]) -> Cohort:
    """The cohort whose series lie in the Arrow files of a folder."""
    files = sorted(folder.glob("*.arrow"))
    try:
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
        return Cohort(
            datasets.concatenate_datasets(parts), known.regions, known.atlas, path, dict(digests)
        )
    except DAMAGE as error:
        raise CohortError(
            f"{folder}: expected Arrow files of {path}, found damage ({error}). Delete the folder; "
            "it is written again."
        ) from error
