"""Strict reading of tab-separated tables: text in, typed numbers out, damage named by line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from .series import CohortError, check_labels, some

MISSING = ("", "n/a", "N/A", "NA", "nan", "NaN")


def read_table(path: Path) -> pd.DataFrame:
    """Read a tab-separated table as text, refusing the usual damage.

    Returns
    -------
    pandas.DataFrame
        All cells as str, indexed by line number in the file (the header is line 1).

    Raises
    ------
    CohortError
        Not there, empty, not text, not tab-separated, no header or a doubled one, ragged lines.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CohortError(f"{path}: expected a table, found no file. Check the path.") from None
    if not raw.strip():
        raise CohortError(f"{path}: expected a table, found an empty file. Write it again.")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in raw:
        raise CohortError(
            f"{path}: expected UTF-8 text, found bytes starting with {raw[:8]!r} (UTF-16 or a "
            "binary file). Save the table as UTF-8 text."
        )
    try:
        lines = raw.decode("utf-8-sig").splitlines()  # a UTF-8 byte-order mark is no damage
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise CohortError(
            f"{path}, line {line}: expected UTF-8 text, found byte {raw[error.start]:#x}. "
            "Save the table as UTF-8."
        ) from None
    if lines[0].lstrip().startswith("<"):
        raise CohortError(
            f"{path}: expected a table, found what looks like a web page: {lines[0][:40]!r}. "
            "Download the file again."
        )
    header = [name.strip() for name in lines[0].split("\t")]
    if len(header) == 1 and re.search("[,;]", lines[0]):
        raise CohortError(
            f"{path}, line 1: expected columns separated by tabs, found {lines[0][:40]!r}. "
            "Save the table tab-separated."
        )
    numeric = [name for name in header if is_number(name)]
    # "region 0 1 2 ..." is the header of a table with regions in rows and time in columns.
    counted = header[1:] in ([str(i + k) for i in range(len(header) - 1)] for k in (0, 1))
    if numeric and len(numeric) * 2 >= len(header) and not counted:
        raise CohortError(
            f"{path}, line 1: expected a header with column names, found numbers "
            f"({some(numeric, 3)}): no header. Add a first line with the column names."
        )
    check_labels(header, f"{path}, line 1")
    rows, numbers = [], []
    for number, text in enumerate(lines[1:], start=2):
        cells = [cell.strip() for cell in text.split("\t")]
        if not any(cells):
            continue
        if cells == header:
            raise CohortError(
                f"{path}, line {number}: expected data, found the header again (doubled header). "
                "Remove the line."
            )
        if len(cells) != len(header):
            raise CohortError(
                f"{path}, line {number}: expected {len(header)} columns, found {len(cells)}. "
                "Repair the line."
            )
        rows.append(cells)
        numbers.append(number)
    if not rows:
        raise CohortError(f"{path}: expected rows below the header, found none.")
    return pd.DataFrame(rows, columns=header, index=pd.Index(numbers, name="line"), dtype=object)


def is_number(text: str) -> bool:
    """Whether a cell holds a finite number."""
    try:
        float(text)
    except ValueError:
        return False
    return text.lower() not in ("nan", "inf", "infinity")


def to_numbers(column: pd.Series, path: Path) -> np.ndarray:
    """Numbers of a text column, NaN where missing; raises with column and line."""
    numbers = np.full(len(column), np.nan)
    for place, (line, text) in enumerate(column.items()):
        if text in MISSING:
            continue
        try:
            numbers[place] = float(text)
        except ValueError:
            comma = re.fullmatch(r"[-+]?\d+,\d+", text) is not None
            advice = "Write decimal points instead of decimal commas." if comma else "Repair it."
            raise CohortError(
                f"{path}, line {line}, column {column.name}: expected a number, found {text!r}. "
                f"{advice}"
            ) from None
    return numbers
