"""Reading Parquet files of scans, whole or in parts, and refusing damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .build import FIXED_COLUMNS, SERIES_COLUMN
from .series import CohortError, some

# What pyarrow raises on damaged bytes, depending on where they are.
DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError)
_FIXED_TYPES = dict(
    zip(FIXED_COLUMNS, ("text", "text", "text", "a number", "an integer"), strict=True)
)


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file for reading in parts; raises `CohortError` when it is damaged."""
    size = path.stat().st_size
    if size == 0:
        raise CohortError(f"{path}: expected a Parquet file, found an empty file. Copy it again.")
    try:
        return pq.ParquetFile(path, memory_map=True)
    except DAMAGE as error:
        with path.open("rb") as file:
            first = file.read(8)
        raise CohortError(
            f"{path}: expected a Parquet file, found {size} bytes that are truncated or corrupted "
            f"(first bytes {first!r}; {_first_line(error)}). Copy the file again."
        ) from error


def read_parquet(path: Path, group: int | None = None) -> pa.Table:
    """Read a Parquet file, or one row group of it.

    Raises
    ------
    CohortError
        The file is empty or damaged.
    """
    return read_group(open_parquet(path), path, group)


def read_group(file: pq.ParquetFile, path: Path, group: int | None) -> pa.Table:
    """Read one row group (None: all) of an open file; raises `CohortError` on damage."""
    try:
        table = file.read() if group is None else file.read_row_group(group)
        table.validate(full=True)
    except DAMAGE as error:
        raise CohortError(
            f"{path}: expected readable Parquet data, found a corrupted part "
            f"({_first_line(error)}). Copy the file again."
        ) from error
    return table


def split_series(table: pa.Table, num_regions: int, path: Path) -> tuple[pa.Table, pa.ChunkedArray]:
    """Take a shard of `save_cohort` apart into plain columns and checked series.

    Parameters
    ----------
    table : pyarrow.Table
        Rows of a shard.
    num_regions : int
        Length that every volume must have.
    path : pathlib.Path
        Named in messages.

    Returns
    -------
    plain : pyarrow.Table
        All columns but the series.
    scans : pyarrow.ChunkedArray of list<list<float>>
        (time, regions) per row, without nulls.

    Raises
    ------
    CohortError
        A column is missing or of another type, or a scan has another number of regions.
    """
    redo = "Copy the file again."
    absent = [name for name in (*FIXED_COLUMNS, SERIES_COLUMN) if name not in table.column_names]
    if absent:
        raise CohortError(f"{path}: expected the columns {some(absent)}, found none. {redo}")
    for name, expected in _FIXED_TYPES.items():
        column = table.column(name)
        if column.null_count or not _is_a(expected, column.type):
            raise CohortError(
                f"{path}, column {name}: expected {expected} in every row, found {column.type} "
                f"with {column.null_count} empty. {redo}"
            )
    scans = table.column(SERIES_COLUMN)
    if isinstance(scans.type, pa.ExtensionType):
        scans = pa.chunked_array([chunk.storage for chunk in scans.chunks], scans.type.storage_type)
    if scans.type != pa.list_(pa.list_(pa.float32())):
        raise CohortError(
            f"{path}, column {SERIES_COLUMN}: expected (time, regions) of float32, found "
            f"{scans.type}. {redo}"
        )
    for chunk in scans.chunks:
        volumes = chunk.flatten()
        found = pc.unique(pc.list_value_length(volumes)).to_pylist()
        if chunk.null_count or volumes.flatten().null_count or not set(found) <= {num_regions}:
            raise CohortError(
                f"{path}, column {SERIES_COLUMN}: expected {num_regions} numbers in every volume, "
                f"found {some(found)}. {redo}"
            )
    return table.drop_columns([SERIES_COLUMN]).replace_schema_metadata(None), scans


def view_series(scan: pa.Array, num_regions: int) -> np.ndarray:
    """One scan, an array of one list<list<float>>, as float32 (time, regions) without a copy."""
    numbers = scan.flatten().flatten().to_numpy(zero_copy_only=True)
    return numbers.reshape(-1, num_regions)


def _is_a(expected: str, kind: pa.DataType) -> bool:
    if expected == "text":
        return pa.types.is_string(kind)
    if expected == "a number":
        return pa.types.is_floating(kind)
    return pa.types.is_integer(kind)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
