"""Differences between two systems of connectivity codes on the same scans, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import EvaluationError
from .scores import area_under_curve

Cells = Sequence[Mapping[str, Any]]


def differences(ours: Cells, other: Cells, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """First system minus second, fold by fold on the same scans.

    Parameters
    ----------
    ours, other : sequence of dict
        `score_cell` of the same folds in the same order.
    resamples : int
    seed : int

    Returns
    -------
    dict
        `full`, `deviation` (median over scans of the difference), `NAME_mae` (mean over scans of
        the difference of absolute errors), `NAME_auc` (mean over folds of the difference of AUC),
        each a list [value, low, high]: 95 % interval over scans drawn with replacement within
        folds, the same draws for both systems. A correlation that is undefined is left out.

    Raises
    ------
    EvaluationError
        The two were not scored on the same scans.
    """
    sizes = [len(cell["full"]) for cell in ours]
    if sizes != [len(cell["full"]) for cell in other]:
        raise EvaluationError(
            f"expected both systems on the same folds, found {sizes} and "
            f"{[len(cell['full']) for cell in other]} scans."
        )
    rng = np.random.default_rng(seed)
    draws = [rng.integers(0, size, (resamples, size)) for size in sizes]
    # The first row is the sample itself.
    draws = [np.vstack([np.arange(size), rows]) for size, rows in zip(sizes, draws, strict=True)]

    def judged(values: np.ndarray) -> list[float]:
        low, high = np.nanpercentile(values[1:], [2.5, 97.5])
        return [float(values[0]), float(low), float(high)]

    found: dict[str, Any] = {}
    for name in ("full", "deviation"):
        gaps = [
            np.array(a[name], float) - np.array(b[name], float)
            for a, b in zip(ours, other, strict=True)
        ]
        if all(np.isfinite(gap).any() for gap in gaps):
            drawn = [gap[rows] for gap, rows in zip(gaps, draws, strict=True)]
            found[name] = judged(np.nanmedian(np.concatenate(drawn, axis=1), axis=1))
    for target, first in ours[0]["targets"].items():
        pairs = [
            (a["targets"][target], b["targets"][target]) for a, b in zip(ours, other, strict=True)
        ]
        for a, b in pairs:
            if not np.array_equal(a["y"], b["y"]):
                raise EvaluationError(f"{target}: expected the same people in both systems.")
        if first["number"]:
            gaps = [_errors(a) - _errors(b) for a, b in pairs]
            drawn = [gap[rows] for gap, rows in zip(gaps, draws, strict=True)]
            found[f"{target}_mae"] = judged(np.concatenate(drawn, axis=1).mean(axis=1))
        else:
            gaps = [
                np.array([_auc(a, row) - _auc(b, row) for row in rows])
                for (a, b), rows in zip(pairs, draws, strict=True)
            ]
            found[f"{target}_auc"] = judged(np.nanmean(gaps, axis=0))
    return found


def _errors(part: Mapping[str, Any]) -> np.ndarray:
    return np.abs(np.array(part["y"], float) - np.array(part["y_hat"], float))


def _auc(part: Mapping[str, Any], rows: np.ndarray) -> float:
    return area_under_curve(np.array(part["y"])[rows] > 0, np.array(part["y_hat"])[rows])
