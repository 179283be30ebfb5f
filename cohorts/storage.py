"""A prepared cohort on disk: Parquet shards, a region table and a content hash."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from .build import Cohort, to_dataset
from .series import CohortError, some
from .shards import read_parquet, split_series
from .tables import read_table, to_numbers

FORMAT_VERSION = 1


def save_cohort(cohort: Cohort, path: str | Path, scans_per_shard: int = 256) -> Path:
    """Write a cohort as Parquet shards; the folder appears complete or not at all.

    Layout::

        PATH/cohort.json                  format, atlas, counts, content hash
        PATH/regions.tsv                  one row per region
        PATH/participants.tsv             for reading by people; not read back
        PATH/data/scans-00000-of-N.parquet  what `datasets.load_dataset("parquet")` reads too

    Parameters
    ----------
    path : path
        Folder to write. A prepared cohort that is there is replaced.
    scans_per_shard : int
        Scans per Parquet file, each in row groups of 32 scans.

    Raises
    ------
    CohortError
        The path holds something else, or cannot be written.
    """
    path = Path(path)
    if path.exists() and not (path / "cohort.json").is_file() and _occupied(path):
        raise CohortError(
            f"{path}: expected a new folder or a prepared cohort to replace, found something else. "
            "Choose another path."
        )
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        (scratch / "data").mkdir(parents=True)
        _write(cohort, scratch, scans_per_shard)
        old = path.parent / f".{path.name}.{uuid.uuid4().hex}.old"
        if path.exists():
            os.replace(path, old)
        os.replace(scratch, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CohortError(
            f"{path}: expected to write the cohort, found: {error}. Check space and permissions."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _occupied(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def _write(cohort: Cohort, folder: Path, scans_per_shard: int) -> None:
    """Write the files of `save_cohort` into an existing folder."""
    table = cohort.dataset.with_format("arrow")[:]
    info = {"info": {"features": cohort.dataset.features.to_dict()}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    shards = max(1, -(-len(cohort) // scans_per_shard))
    for shard in range(shards):
        pq.write_table(
            table.slice(shard * scans_per_shard, scans_per_shard),
            folder / "data" / f"scans-{shard:05d}-of-{shards:05d}.parquet",
            row_group_size=32,
            compression="zstd",
            use_dictionary=False,
        )
    cohort.regions.to_csv(folder / "regions.tsv", sep="\t", index=False, na_rep="n/a")
    cohort.participants.to_csv(folder / "participants.tsv", sep="\t", na_rep="n/a")
    facts = {
        "format": FORMAT_VERSION,
        "atlas": cohort.atlas,
        "num_scans": len(cohort),
        "num_regions": len(cohort.labels),
        "num_shards": shards,
        "content_hash": cohort.content_hash,
    }
    (folder / "cohort.json").write_text(json.dumps(facts, indent=2) + "\n")


class Description(NamedTuple):
    """What a prepared cohort's folder says about itself, read without its series.

    Attributes
    ----------
    atlas, content_hash : str
        As of `Cohort`.
    regions : pandas.DataFrame
        As of `Cohort`.
    shards : list of pathlib.Path
        Parquet files, in order.
    """

    atlas: str
    content_hash: str
    regions: pd.DataFrame
    shards: list[Path]


def describe_prepared(path: Path) -> Description:
    """Read cohort.json and regions.tsv of a folder written by `save_cohort`.

    Raises
    ------
    CohortError
        Damage, another version of the format, or another number of shards than were written.
    """
    try:
        facts = json.loads((path / "cohort.json").read_text(encoding="utf-8"))
        known = facts["format"], facts["atlas"], facts["content_hash"], facts["num_shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise CohortError(
            f"{path / 'cohort.json'}: expected the description of a cohort, found damage "
            f"({error!r}). Write the cohort again."
        ) from error
    version, atlas, expected_hash, num_shards = known
    if version != FORMAT_VERSION:
        raise CohortError(
            f"{path}: expected cohort format {FORMAT_VERSION}, found {version}. Write the cohort "
            "again with this version of cortexicon."
        )
    shards = sorted((path / "data").glob("scans-*.parquet"))
    if len(shards) != num_shards:
        raise CohortError(
            f"{path / 'data'}: expected {num_shards} shards, found {len(shards)}. "
            "Copy the folder again."
        )
    regions = read_table(path / "regions.tsv").reset_index(drop=True)
    absent = [name for name in ("label", "x", "y", "z", "size") if name not in regions]
    if absent:
        raise CohortError(
            f"{path / 'regions.tsv'}: expected the columns {some(absent)}, found none. "
            "Write the cohort again."
        )
    for name in ("x", "y", "z", "size"):
        regions[name] = to_numbers(regions[name], path / "regions.tsv")
    return Description(str(atlas), str(expected_hash), regions, shards)


def load_prepared(path: Path) -> Cohort:
    """Read a folder written by `save_cohort` and compare its content hash."""
    atlas, expected_hash, regions, shards = describe_prepared(path)
    parts = [split_series(read_parquet(shard), len(regions), shard) for shard in shards]
    plain = join_tables([table for table, _ in parts], path)
    scans = pa.chunked_array([chunk for _, column in parts for chunk in column.chunks])
    cohort = Cohort(to_dataset(plain, scans, len(regions)), regions, atlas, path)
    check_hash(cohort, expected_hash)
    return cohort


def check_hash(cohort: Cohort, expected: str) -> None:
    """Refuse a cohort read from disk whose content is not what was written."""
    if cohort.content_hash != expected:
        raise CohortError(
            f"{cohort.path}: expected content hash {expected[:12]}, found "
            f"{cohort.content_hash[:12]}: the files changed after they were written. "
            "Write the cohort again."
        )


def join_tables(tables: list[pa.Table], path: Path) -> pa.Table:
    """One table of the rows of all shards; raises `CohortError` when their columns differ."""
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise CohortError(
            f"{path / 'data'}: expected the same columns in every shard, found: "
            f"{str(error).splitlines()[0]}. Write the cohort again."
        ) from error
