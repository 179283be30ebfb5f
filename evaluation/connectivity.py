"""Connectivity over many scans: features of a cohort, and means with missing pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .scores import fisher_z, pearson, valid_regions

if TYPE_CHECKING:
    from cortexicon.cohorts import Cohort


class RunningMean:
    """Mean of vectors that come one by one; a missing entry (NaN) does not count."""

    def __init__(self) -> None:
        self.total: np.ndarray | None = None
        self.count: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        known = np.isfinite(values)
        if self.total is None or self.count is None:
            self.total = np.zeros(len(values))
            self.count = np.zeros(len(values), np.int64)
        self.total += np.where(known, values, 0.0)
        self.count += known

    def mean(self) -> np.ndarray:
        assert self.total is not None
        assert self.count is not None
        return np.divide(
            self.total, self.count, out=np.full(len(self.total), np.nan), where=self.count > 0
        )


def connectivity_features(cohort: Cohort, subject_ids: list[str]) -> np.ndarray:
    """Fisher-z correlation of the z-scored series at the scan's own TR, over the whole scan.

    Returns
    -------
    float32 array, (subjects, pairs)
        NaN where a region of the pair has no signal in that scan.
    """
    rows = []
    for subject_id in subject_ids:
        values = np.asarray(cohort.series(subject_id).values, np.float64)
        broken = ~np.isfinite(values).all(axis=0)
        values[:, broken] = 0.0  # a column of NaN is a region without a signal
        rows.append(fisher_z(values, valid_regions(values)))
    return np.stack(rows)


def standardised(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Centre and scale all parts by the training part's mean and SD of each feature.

    A missing value becomes 0, the training mean; so does a feature that training does not know.

    Parameters
    ----------
    train : float32, (subjects, features)
    others : float32, (subjects, features)

    Returns
    -------
    list of float32 arrays, training first
    """
    known = np.isfinite(train)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, train, 0.0).sum(axis=0) / count
    spread = np.sqrt((np.where(known, train - mean, 0.0) ** 2).sum(axis=0) / count)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-8)
    return [
        np.nan_to_num((part - mean) * scale, nan=0.0, posinf=0.0, neginf=0.0).astype(np.float32)
        for part in (train, *others)
    ]


def correlation_by_scan(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson correlation over pairs, of each scan with itself in another form.

    Parameters
    ----------
    first, second : float, (scans, pairs)
        Pairs that are NaN in either do not count.

    Returns
    -------
    float64 array, (scans,)
        NaN where one of the two does not vary.
    """
    return np.array([pearson(a, b) for a, b in zip(first, second, strict=True)])
