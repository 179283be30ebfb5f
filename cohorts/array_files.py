"""Region series in the files of other tools: .tsv, .csv, .1D, .npy, .npz, .mat.

Each reader returns the numbers as they are stored, with the labels that the file itself gives;
which axis is time, and which region is which, is decided by `scan_files` from the labels.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .mat_files import read_variables
from .series import MIN_TIMEPOINTS, CohortError, check_labels, some
from .tables import MISSING, is_number

#: Names under which tools and people keep the series in .npz and .mat files.
SERIES_NAMES = {
    "time_series", "timeseries", "roisignals", "roi_signals", "roi_ts", "ts", "bold", "data",
    "signals", "values", "series", "x",
}  # fmt: skip
LABEL_NAMES = {
    "labels", "region_labels", "roi_labels", "regions", "names", "roi_names", "region_names",
}  # fmt: skip
TR_NAMES = {"tr", "t_r", "repetitiontime", "repetition_time"}


class RawSeries(NamedTuple):
    """What one file holds, before regions are matched.

    Attributes
    ----------
    values : numpy.ndarray, two-dimensional
        As stored.
    labels : list of str or None
        Names along one axis.
    label_axis : int or None
        Axis that `labels` names; None where both axes have that length.
    tr : float or None
        Repetition time in s.
    tr_source : str
        Where it was found, or why there is none.
    regions : pandas.DataFrame or None
        label, x, y, z (MNI mm), size, hemisphere where the file itself places its regions.
    warnings : tuple of str
        What is worth a look.
    """

    values: np.ndarray
    labels: list[str] | None = None
    label_axis: int | None = None
    tr: float | None = None
    tr_source: str = ""
    regions: pd.DataFrame | None = None
    warnings: tuple[str, ...] = ()


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one message with the path.

    NOTE: the parsers of NumPy, SciPy, nibabel and h5py answer random bytes with errors of about
    every type (IndexError, struct.error, tokenize errors, MemoryError); a list would have holes.

    Raises
    ------
    CohortError
        Not there, empty, a web page, or unreadable.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(16)
        if size == 0:
            raise CohortError(f"{path}: expected {what}, found an empty file. Copy it again.")
        if first.lstrip()[:1] == b"<":
            raise CohortError(
                f"{path}: expected {what}, found what looks like a web page ({first[:16]!r}). "
                "Download the file again."
            )
        yield
    except CohortError:
        raise
    except FileNotFoundError:
        todo = "Check the path."
        if path.is_symlink():
            todo = "It is a link to a file that is not here: get its content (datalad get)."
        raise CohortError(f"{path}: expected {what}, found no file. {todo}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise CohortError(f"{path}: expected {what}, found: {error.strerror}.") from None
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        raise CohortError(
            f"{path}: expected {what}, found {size} bytes that are truncated or corrupted "
            f"(first bytes {first[:8]!r}; {reason}). Copy the file again."
        ) from error


def _check_array(array: np.ndarray, path: Path, name: str = "") -> np.ndarray:
    """Refuse arrays that are not real numbers along two axes."""
    what = f"{path}{f', variable {name}' if name else ''}"
    if array.dtype.kind not in "fiu":
        raise CohortError(
            f"{what}: expected real numbers, found an array of {array.dtype}. Save it as float32."
        )
    if array.ndim != 2:
        raise CohortError(
            f"{what}: expected a two-dimensional array (time, regions), found shape {array.shape}. "
            "Save one scan per file."
        )
    return array


# --- text ---------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Text of a table; refuses what is empty, binary, UTF-16, Latin-1 or a web page."""
    with readable(path, "a table of region series"):
        raw = path.read_bytes()
    if not raw.strip():
        raise CohortError(f"{path}: expected a table, found an empty file. Write it again.")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw:
        raise CohortError(
            f"{path}: expected UTF-8 text, found bytes starting with {raw[:8]!r} (UTF-16 or a "
            "binary file). Save the table as UTF-8 text."
        )
    try:
        return raw.decode("utf-8-sig")  # a UTF-8 byte-order mark is no damage
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise CohortError(
            f"{path}, line {line}: expected UTF-8 text, found byte {raw[error.start]:#x}. "
            "Save the table as UTF-8."
        ) from None


def _numbers(rows: list[list[str]], header: list[str] | None, lines: list[int], path: Path):
    """Numbers of text cells, shape as `rows`; NaN where missing, damage named by line."""
    cells = [cell for row in rows for cell in row]
    try:
        if "_" in "".join(cells):  # Python reads 1_000 as a number, no tool writes it
            raise ValueError
        flat = [float(cell) for cell in cells]
    except ValueError:
        flat = []
        width = len(rows[0])
        for place, cell in enumerate(cells):
            try:
                if "_" in cell:
                    raise ValueError
                flat.append(float("nan" if cell in MISSING else cell))
            except ValueError:
                row, column = divmod(place, width)
                comma = re.fullmatch(r"[-+]?\d+,\d+", cell) is not None
                todo = "Write decimal points instead of decimal commas." if comma else "Repair it."
                raise CohortError(
                    f"{path}, line {lines[row]}, column {header[column] if header else column + 1}"
                    f": expected a number, found {cell[:40]!r}. {todo}"
                ) from None
    with np.errstate(over="ignore"):
        return np.array(flat, np.float64).reshape(len(rows), -1).astype(np.float32)


def _rectangle(rows: list[list[str]], width: int, lines: list[int], path: Path, hint: str) -> None:
    for row, line in zip(rows, lines, strict=True):
        if len(row) != width:
            raise CohortError(
                f"{path}, line {line}: expected {width} columns, found {len(row)}. "
                f"Repair the line.{hint}"
            )


def read_delimited(path: Path) -> RawSeries:
    """Read a .tsv or .csv of region series with a header, by its labels.

    A header of labels means regions in columns; a first column of text means regions in rows.
    A column `t` or `time`, and a nameless first column that only counts, are left out.

    Raises
    ------
    CohortError
        Damage as `read_table` names it: no header or a doubled one, ragged lines, decimal
        commas, text among the numbers, UTF-16; each with its line.
    """
    text = read_text(path)
    first = text.lstrip("\r\n").split("\n", 1)[0]
    mark = "\t" if "\t" in first else ";" if ";" in first else ","
    if path.suffix.lower() == ".tsv" and mark != "\t" and mark in first:
        raise CohortError(
            f"{path}, line 1: expected columns separated by tabs, found {first[:40]!r}. "
            "Save the table tab-separated."
        )
    if '"' in text:
        try:
            split = list(csv.reader(text.splitlines(), delimiter=mark))
        except csv.Error as error:
            raise CohortError(
                f"{path}: expected a table, found text that cannot be split into columns "
                f"({error}). Write it again."
            ) from None
    else:
        split = [line.split(mark) for line in text.splitlines()]
    table = [(number, [c.strip() for c in row]) for number, row in enumerate(split, start=1)]
    table = [(number, row) for number, row in table if any(row)]
    if not table:
        raise CohortError(f"{path}: expected a table, found no text in it. Write it again.")
    header = table[0][1]
    rows, lines = [row for _, row in table[1:]], [number for number, _ in table[1:]]
    counts = [str(i) for i in range(len(header) + 1)]
    counted = header[1:] in (counts[: len(header) - 1], counts[1 : len(header)])
    numeric = [name for name in header if is_number(name)]
    if numeric and len(numeric) * 2 >= len(header) and not counted and header != counts[1:]:
        raise CohortError(
            f"{path}, line {table[0][0]}: expected a header with region labels, found numbers "
            f"({some(numeric, 3)}): no header. Add a first line with the labels, or save the "
            "numbers as .npy, which has none."
        )
    if not rows:
        raise CohortError(f"{path}: expected rows below the header, found none.")
    for row, line in zip(rows, lines, strict=True):
        if row == header:
            raise CohortError(
                f"{path}, line {line}: expected data, found the header again (doubled header). "
                "Remove the line."
            )
    commas = " Decimal commas? Write decimal points." if mark == "," else ""
    _rectangle(rows, len(header), lines, path, commas)
    in_rows = not any(is_number(row[0]) or row[0] in MISSING for row in rows)
    if in_rows and len(header) > 1:
        labels = [row[0] for row in rows]
        check_labels(labels, str(path))
        values = _numbers([row[1:] for row in rows], header[1:], lines, path)
        return RawSeries(values, labels, 0)
    if header[0].lower() in ("t", "time") or (
        header[0].lower() in ("", "index", "unnamed: 0")
        and [row[0] for row in rows] == [str(i) for i in range(len(rows))]
    ):
        header, rows = header[1:], [row[1:] for row in rows]
    check_labels(header, f"{path}, line {table[0][0]}")
    return RawSeries(_numbers(rows, header, lines, path), header, 1)


def read_1d(path: Path) -> RawSeries:
    """Read AFNI's .1D: columns of numbers, labels in a comment line (``#1  #2  #3``) or none.

    Also the output of 3dROIstats, whose header begins with File and Sub-brick.

    Raises
    ------
    CohortError
        Text among the numbers, ragged lines, complex or repeated entries.
    """
    comments: list[list[str]] = []
    rows: list[list[str]] = []
    lines: list[int] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        tokens = line.replace(",", " ").split()
        if not tokens:
            continue
        if tokens[0].startswith("#"):
            comments.append([token.lstrip("#") for token in tokens if token != "#"])
        elif tokens[0] == "File" and not rows:
            comments.append(tokens)
        else:
            rows.append(tokens)
            lines.append(number)
    if not rows:
        raise CohortError(f"{path}: expected rows of numbers, found none. Write the file again.")
    _rectangle(rows, len(rows[0]), lines, path, "")
    # The last comment with one word per column holds the labels; other comments are prose.
    labels = next((words for words in reversed(comments) if len(words) == len(rows[0])), None)
    if labels and labels[:1] == ["File"]:
        skip = 2 if labels[1:2] == ["Sub-brick"] else 1
        labels = [re.sub(r"^(Mean|NZMean)_", "", label) for label in labels[skip:]]
        rows = [row[skip:] for row in rows]
    if not rows[0]:
        raise CohortError(f"{path}: expected columns of numbers, found none.")
    if labels is not None:
        check_labels(labels, str(path))
    return RawSeries(_numbers(rows, labels, lines, path), labels, None if labels is None else 1)


# --- arrays -------------------------------------------------------------------------------------


def read_npy(path: Path) -> RawSeries:
    """Read one array of numbers; a pickled one is refused, never run."""
    what = "a NumPy array file (.npy)"
    with readable(path, what):
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            reader = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if reader is None:
                raise ValueError(f"format version {version}")
            shape, _, dtype = reader(file)
            left = path.stat().st_size - file.tell()
        if dtype.hasobject:
            raise CohortError(
                f"{path}: expected numbers, found pickled Python objects, which could run code. "
                "Save the array again as float32: numpy.save(path, array.astype('float32'))."
            )
        if (count := int(np.prod(shape, dtype=object)) * dtype.itemsize) != left:
            raise CohortError(
                f"{path}: expected {count} bytes of shape {shape} and {dtype}, found {left}: "
                "truncated or corrupted. Copy the file again."
            )
        array = np.load(path, allow_pickle=False)
    return RawSeries(_check_array(array, path))


def read_npz(path: Path) -> RawSeries:
    """Read the one series of an .npz, with labels and TR where it names them."""
    with readable(path, "a NumPy archive (.npz)"):
        found: dict[str, Any] = {}
        pickled = []
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an archive; name it .npy")
            for name in archive.files:
                try:
                    found[name] = archive[name]
                except ValueError as error:
                    if "pickle" not in str(error).lower():
                        raise
                    pickled.append(name)
        found = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        return choose(found, [f"{name} (pickled objects)" for name in pickled], path)


def choose(found: dict[str, np.ndarray], others: list[str], path: Path) -> RawSeries:
    """Take series, labels and TR out of the named arrays of a .npz or .mat file.

    Parameters
    ----------
    others : list of str
        What else the file holds, for the message.

    Raises
    ------
    CohortError
        No array that could be a scan, or several.
    """
    series = {
        name: array
        for name, array in found.items()
        if array.dtype.kind in "fiu"
        and array.ndim == 2
        and min(array.shape) >= 2
        and max(array.shape) >= MIN_TIMEPOINTS
    }
    named = [name for name in series if name.lower() in SERIES_NAMES]
    if len(series) > 1 and len(named) == 1:
        series = {named[0]: series[named[0]]}
    if len(series) != 1:
        shapes = [f"{name} {array.dtype}{list(array.shape)}" for name, array in found.items()]
        many = "several that could be the series" if series else "none"
        raise CohortError(
            f"{path}: expected one two-dimensional array of numbers (time, regions), found {many}: "
            f"{some(shapes + others, 8) or 'an empty file'}. Keep one, or name it time_series."
        )
    ((name, values),) = series.items()
    _check_array(values, path, name)
    texts = {n: a for n, a in found.items() if n.lower() in LABEL_NAMES and a.dtype.kind in "US"}
    labels, axis = None, None
    if texts:
        labels = [_text(item).strip() for item in next(iter(texts.values())).ravel()]
        check_labels(labels, str(path))
        if len(labels) not in values.shape:
            raise CohortError(
                f"{path}: expected as many labels as regions of {name} {values.shape}, found "
                f"{len(labels)}. Save the labels that belong to the columns."
            )
        if values.shape[0] != values.shape[1]:
            axis = values.shape.index(len(labels))
    for key, array in found.items():
        if key.lower() in TR_NAMES and array.size == 1 and array.dtype.kind in "fiu":
            return RawSeries(values, labels, axis, float(array.ravel()[0]), f"variable {key}")
    return RawSeries(values, labels, axis)


def _text(item: Any) -> str:
    return item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item)


def read_mat(path: Path) -> RawSeries:
    """Read the one series of a MATLAB file, with labels and TR where it names them.

    Raises
    ------
    CohortError
        Damaged; version 7.3 without h5py, or 4; no or several arrays that could be the series.
    """
    with readable(path, "a MATLAB file (.mat)"):
        return choose(*read_variables(path), path)
