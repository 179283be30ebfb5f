"""Label tables of atlases, in the forms in which they are passed around."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from .series import CohortError

#: Columns that hold the value of a region in the label volume, and its name; the first found wins.
VALUE_COLUMNS = ("atlas_value", "index", "value", "id", "key", "roi number", "roi_number", "roi")
NAME_COLUMNS = ("name", "label", "region", "roi_name", "structure")


def label_table(rows: list[tuple]) -> pd.DataFrame:
    """A table of regions by their value in the label volume.

    Parameters
    ----------
    rows : list of (value, name) or (value, name, x, y, z)
        An empty name stands for none; coordinates in mm.

    Returns
    -------
    pandas.DataFrame
        label, x, y, z (NaN where not given), indexed by value; background 0 left out.
    """
    full = [(*row, np.nan, np.nan, np.nan) if len(row) == 2 else row for row in rows if row[0] != 0]
    table = pd.DataFrame([row[1:] for row in full], columns=["label", "x", "y", "z"])
    table.index = pd.Index([row[0] for row in full], dtype="int64", name="value")
    return table


def read_labels(path: Path | None) -> pd.DataFrame:
    """Read a label table; None gives an empty one.

    Understands tables with a header (BIDS ``dseg.tsv``, ``regions.tsv``, CSV), colour tables
    (value, name, colours), ``value x y z``, one name a line, and the XML files of AAL and FSL.

    Returns
    -------
    pandas.DataFrame
        As `label_table` makes it.

    Raises
    ------
    CohortError
        Not there, empty, not text, damaged XML, no column of values, a value twice, a line that
        does not fit.
    """
    if path is None:
        return label_table([])
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CohortError(
            f"{path}: expected a label table, found none: {error.strerror}. Check the path."
        ) from None
    try:
        rows = _read_xml(raw, path) if path.suffix.lower() == ".xml" else _read_text(raw, path)
    except csv.Error as error:
        raise CohortError(f"{path}: expected a label table, found damage ({error}).") from None
    if not rows:
        raise CohortError(f"{path}: expected a label table, found no region. Check the file.")
    seen: set[int] = set()
    for row in rows:
        if row[0] in seen:
            raise CohortError(
                f"{path}: expected every value once, found {row[0]} twice. Repair the table."
            )
        if not 0 <= row[0] < 2**31:
            raise CohortError(
                f"{path}: expected values from 0 to 2147483647, found {row[0]}. Repair the table."
            )
        seen.add(row[0])
    return label_table(rows)


def _read_xml(raw: bytes, path: Path) -> list[tuple]:
    """AAL: ``<label><index>1</index><name>..</name></label>``; FSL: ``<label index="0">..``."""
    try:
        tree = ElementTree.fromstring(raw)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise CohortError(
            f"{path}: expected XML with labels, found damage ({error}). Download it again."
        ) from None
    rows = []
    for label in tree.iter("label"):
        index, name = label.findtext("index"), label.findtext("name")
        shift = 0
        if index is None:  # FSL counts maps from 0, and its label volumes from 1
            index, name, shift = label.get("index"), label.text, 1
        if index is None or name is None:
            raise CohortError(
                f"{path}: expected an index and a name in every label, found "
                f"{ElementTree.tostring(label)[:80]!r}. Repair the file."
            )
        rows.append((_integer(index, path) + shift, name.strip()))
    return rows


def _read_text(raw: bytes, path: Path) -> list[tuple]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CohortError(
            f"{path}: expected UTF-8 text, found byte {raw[error.start]:#x}. Save it as UTF-8."
        ) from None
    if "\0" in text or text.lstrip()[:1] == "<":
        raise CohortError(
            f"{path}: expected a label table, found what is no table: {text[:40]!r}. "
            "Download it again."
        )
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise CohortError(f"{path}: expected a label table, found an empty file.")
    delimiter = next((mark for mark in "\t;," if mark in lines[0]), "\t")
    header = [cell.lower() for cell in _cells(lines[0], delimiter)]
    if len(header) > 1 and not _is_integer(header[0]):
        if set(header) & {*VALUE_COLUMNS, *NAME_COLUMNS}:
            below = [_cells(line, delimiter) for line in lines[1:]]
            return _read_header_table(below, header, path)
        # Names may hold commas, but below a header lie values.
        if any(_is_integer(cell) for line in lines[1:2] for cell in _cells(line, delimiter)):
            raise _no_values(header, path)
    if not _is_integer(_words(lines[0])[0]):  # one name a line, the values are 1, 2, ...
        return [(value, line) for value, line in enumerate(lines, start=1)]
    rows: list[tuple] = []
    for line in lines:
        value, *rest = _words(line)
        numbers = [_number(cell) for cell in rest]
        if len(rest) == 3 and None not in numbers:
            rows.append((_integer(value, path), "", *numbers))
        else:
            rows.append((_integer(value, path), rest[0] if rest else ""))
    return rows


def _read_header_table(cells: list[list[str]], header: list[str], path: Path) -> list[tuple]:
    for number, row in enumerate(cells, start=2):
        if len(row) < len(header) or any(row[len(header) :]):
            raise CohortError(
                f"{path}, row {number}: expected {len(header)} columns, found {len(row)}. "
                "Repair the line; put names that hold the separator in quotes."
            )
    values = [name for name in VALUE_COLUMNS if name in header]
    if {"label", "name"} <= set(header):
        # A cohort's regions.tsv counts rows in `index`, and has the volume's values in `label`.
        place = header.index("label")
        if all(_is_integer(row[place]) for row in cells):
            values = ["label"]
    if not values:
        raise _no_values(header, path)
    names = [name for name in NAME_COLUMNS if name in header and name != values[0]]
    column, name_column = header.index(values[0]), header.index(names[0]) if names else None
    return [
        (_integer(row[column], path), "" if name_column is None else row[name_column])
        for row in cells
    ]


def _no_values(header: list[str], path: Path) -> CohortError:
    return CohortError(
        f"{path}: expected a column with the values of the label volume "
        f"({', '.join(VALUE_COLUMNS)}), found {', '.join(header)[:200]}. Name it index."
    )


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == "\t":
        return [cell.strip() for cell in line.split("\t")]
    reader = csv.reader([line], delimiter=delimiter, skipinitialspace=True)
    return [cell.strip() for cell in next(reader)]


def _words(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d{1,10}(\.0*)?", text) is not None


def _integer(text: str, path: Path) -> int:
    if not _is_integer(text.strip()):
        raise CohortError(
            f"{path}: expected the value of a region, a whole number, found {text[:40]!r}. "
            "Repair the table."
        )
    return int(float(text))


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) <= 1e4 else None
