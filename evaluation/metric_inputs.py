"""What the `evaluate` modules accept: nothing empty, nothing missing, everything of one length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import EvaluationError


def finite_numbers(name: str, values: Any, length: int | None = None) -> np.ndarray:
    """One finite number per row, float64 (rows,).

    Raises
    ------
    EvaluationError
        Empty, not one-dimensional, of another length, or with a value that is not finite.
    """
    array = np.asarray(values, np.float64)
    _check_length(name, array, length)
    broken = np.flatnonzero(~np.isfinite(array))
    if len(broken):
        raise EvaluationError(
            f"{name}: expected finite numbers, found {len(broken)} that are not, the first in row "
            f"{broken[0]}. Leave these rows out, or score an invalid answer as the median."
        )
    return array


def known_labels(name: str, values: Any, length: int | None = None) -> np.ndarray:
    """One label per row as text, (rows,).

    Raises
    ------
    EvaluationError
        Empty, not one-dimensional, of another length, or with an empty or missing label.
    """
    array = np.asarray(["" if value is None else str(value).strip() for value in values], str)
    _check_length(name, array, length)
    missing = np.flatnonzero(np.isin(np.char.lower(array), ("", "nan", "none", "<na>")))
    if len(missing):
        raise EvaluationError(
            f"{name}: expected a label in every row, found {len(missing)} missing, the first in "
            f"row {missing[0]}. Leave these rows out, or score them as the commonest class."
        )
    return array


def whole_codes(windows: Sequence[Any], num_codes: int) -> np.ndarray:
    """All codes of all windows, int64 (tokens,).

    Raises
    ------
    EvaluationError
        No code at all, or one outside 0..num_codes - 1.
    """
    codes = [np.asarray(window, np.int64).ravel() for window in windows]
    flat = np.concatenate(codes) if codes else np.empty(0, np.int64)
    if not len(flat):
        raise EvaluationError("predictions: expected codes, found none.")
    if flat.min() < 0 or flat.max() >= num_codes:
        raise EvaluationError(
            f"predictions: expected codes in 0..{num_codes - 1}, found {flat.min()}..{flat.max()}. "
            "Give the codebook's size as num_codes."
        )
    return flat


def paired_scans(predictions: Sequence[Any], references: Sequence[Any]) -> list[tuple]:
    """Pairs (raw, decoded) of float64 (time, regions).

    Raises
    ------
    EvaluationError
        No scan, an empty one, two of different shapes, or one that holds a value not finite.
    """
    if not len(references):
        raise EvaluationError("references: expected at least one scan, found none.")
    pairs = []
    for row, both in enumerate(zip(references, predictions, strict=True)):
        raw, decoded = (np.asarray(scan, np.float64) for scan in both)
        if raw.ndim != 2 or raw.shape != decoded.shape or min(raw.shape) < 1 or len(raw) < 2:
            raise EvaluationError(
                f"scan {row}: expected two arrays of one shape (time, regions), found "
                f"{raw.shape} and {decoded.shape}."
            )
        for name, values in (("references", raw), ("predictions", decoded)):
            if not np.isfinite(values).all():
                column = int(np.argwhere(~np.isfinite(values))[0, 1])
                raise EvaluationError(
                    f"{name}, scan {row}: expected finite values, found one that is not in region "
                    f"column {column}; set a region without a signal to 0 in both."
                )
        pairs.append((raw, decoded))
    return pairs


def _check_length(name: str, array: np.ndarray, length: int | None) -> None:
    if array.ndim != 1 or not len(array) or (length is not None and len(array) != length):
        raise EvaluationError(
            f"{name}: expected one value per row, {'at least one' if length is None else length} "
            f"of them, found shape {array.shape}."
        )
