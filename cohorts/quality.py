"""What a scan looks like before anything is trained on it: figures per scan, and their table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from .series import ParcelSeries

#: Columns that every quality table has, in this order; what a reader adds follows them.
QUALITY_COLUMNS = (
    "subject_id",
    "session",
    "task",
    "run",
    "status",
    "reason",
    "source",
    "kind",
    "n_timepoints",
    "n_regions",
    "n_missing",
    "n_constant",
    "masked_regions",
    "tr",
    "tr_source",
    "mean_fd",
    "n_scrubbed",
    "median_sd",
    "median_tsnr",
    "median_dvars",
    "max_dvars",
    "global_signal_sd",
    "warnings",
)


def scan_quality(series: ParcelSeries) -> dict[str, Any]:
    """Figures of one scan that need nothing but its series.

    Parameters
    ----------
    series : ParcelSeries
        Values (time, regions) in any unit.

    Returns
    -------
    dict
        n_timepoints, n_regions, n_missing (regions with NaN), n_constant, masked_regions (labels),
        median_sd (unit of the series), median_tsnr (mean / SD; NaN for centred series),
        median_dvars and max_dvars (see `dvars`), global_signal_sd (SD of the mean of the z-scored
        regions: 0 for independent regions, 1 for one signal everywhere), warnings, tr (s).

    Raises
    ------
    CohortError
        The scan fails `ParcelSeries.validate`.
    """
    health = series.validate()
    usable = series.values[:, health.region_mask].astype(np.float64)  # (time, usable regions)
    deviation, mean = usable.std(axis=0), usable.mean(axis=0)
    steps = dvars(series.values, health.region_mask)
    # A series whose mean is within its noise was centred before; its ratio says nothing.
    ratio = np.where(np.abs(mean) > deviation, np.abs(mean) / deviation, np.nan)
    centred = not np.isfinite(ratio).any()
    return {
        "n_timepoints": len(series.values),
        "n_regions": len(series.labels),
        "n_missing": len(health.missing_regions),
        "n_constant": len(health.constant_regions),
        "masked_regions": ", ".join(health.missing_regions + health.constant_regions),
        "tr": series.tr,
        "median_sd": float(np.median(deviation)),
        "median_tsnr": math.nan if centred else float(np.nanmedian(ratio)),
        "median_dvars": float(np.median(steps)),
        "max_dvars": float(steps.max()),
        "global_signal_sd": float(((usable - mean) / deviation).mean(axis=1).std()),
        "warnings": " ".join(health.warnings),
    }


def dvars(values: np.ndarray, region_mask: np.ndarray) -> np.ndarray:
    """How much the whole picture changes from volume to volume, in units of the regions' own SD.

    Power et al. 2012 (NeuroImage 59:2142), over regions instead of voxels, each z-scored first.

    Parameters
    ----------
    values : numpy.ndarray of float, shape (time, regions)
        Any unit; NaN only outside the mask.
    region_mask : numpy.ndarray of bool, shape (regions,)
        Regions that count.

    Returns
    -------
    numpy.ndarray of float64, shape (time - 1,)
        1.41 for white noise; smaller the smoother the series.
    """
    usable = values[:, region_mask].astype(np.float64)
    scaled = (usable - usable.mean(axis=0)) / usable.std(axis=0)
    return np.sqrt((np.diff(scaled, axis=0) ** 2).mean(axis=1))


def quality_table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per scan that was found, used or not.

    Parameters
    ----------
    rows : iterable of mapping
        Keys of `QUALITY_COLUMNS` and any others; missing ones become n/a.

    Returns
    -------
    pandas.DataFrame
        `QUALITY_COLUMNS`, then the other keys in alphabetical order; counts as integers that may
        be missing.
    """
    listed = [dict(row) for row in rows]
    extra = sorted({key for row in listed for key in row} - set(QUALITY_COLUMNS))
    table = pd.DataFrame(listed, columns=[*QUALITY_COLUMNS, *extra])
    for name in table:
        kinds = {type(row[name]) for row in listed if row.get(name) is not None}
        if kinds == {int}:  # else a count that some scans lack would be written as 236.0
            table[name] = table[name].astype("Int64")
    return table


def plain_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts in types that JSON keeps exactly; NaN becomes None, lists become text.

    A fact then reads the same whether it comes from a scan that was just read or from a file.
    """
    return {str(key): _plain(value) for key, value in facts.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)
