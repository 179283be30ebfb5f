"""Checks at the door of AVQFeatureExtractor, of one array and its sampling interval."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .tokenization_errors import TokenizationError

_SHORTEST_TR, _LONGEST_TR = 0.05, 20.0  # s
# No scanner and no normalisation writes this; it comes from a division by almost zero.
_LARGEST_VALUE = 1e15
# A sample this many robust standard deviations away from the median is reported.
_OUTLIER_SD = 1e4


def as_series(x: Any, where: str) -> np.ndarray:
    """One scan as float64 (time, regions), or the reason why it cannot be one."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().numpy()
    try:
        series = np.asarray(x)
    except ValueError as error:
        raise TokenizationError(
            f"{where}expected an array (time, regions), found rows of different lengths"
        ) from error
    if series.dtype.kind not in "fiu":
        raise TokenizationError(
            f"{where}expected real numbers, found an array of type {series.dtype}; convert the "
            f"table to float32 and leave text columns out"
        )
    if series.ndim != 2:
        hint = (
            "; pass several scans as a list of (time, regions) arrays" if series.ndim == 3 else ""
        )
        raise TokenizationError(
            f"{where}expected one scan of shape (time, regions), found shape {series.shape}{hint}"
        )
    if 0 in series.shape:
        raise TokenizationError(f"{where}expected samples and regions, found shape {series.shape}")
    return series.astype(np.float64)


def checked_interval(name: str, value: Any, where: str = "") -> float:
    """A sampling interval in seconds, or the reason why it cannot be one."""
    if value is None:
        raise TokenizationError(
            f"{where}{name} is missing: give the repetition time in seconds, e.g. {name}=2.0 "
            f"(BIDS: RepetitionTime); it is never guessed"
        )
    number = (int, float, np.integer, np.floating)
    if not isinstance(value, number) or isinstance(value, bool):
        raise TokenizationError(f"{where}{name} must be a number of seconds, found {value!r}")
    if value >= 100:
        raise TokenizationError(
            f"{where}{name} {value:g} looks like milliseconds; expected seconds, e.g. "
            f"{name}={value / 1000:g}"
        )
    if not _SHORTEST_TR <= value <= _LONGEST_TR:
        raise TokenizationError(
            f"{where}{name} must lie between {_SHORTEST_TR:g} and {_LONGEST_TR:g} s, found "
            f"{value:g}"
        )
    return float(value)


def checked_band(band: Any, sampling_interval: float) -> list[float]:
    """Edges of a pass band in Hz, or the reason why they cannot be ones."""
    nyquist = 0.5 / sampling_interval
    try:
        low, high = (float(edge) for edge in band)
    except (TypeError, ValueError) as error:
        raise TokenizationError(
            f"band_pass must be two frequencies in Hz, [low, high], e.g. [0.01, 0.1], found "
            f"{band!r}"
        ) from error
    if not 0 < low < high < nyquist:
        raise TokenizationError(
            f"band_pass must be [low, high] with 0 < low < high < {nyquist:g} Hz, half the "
            f"sampling rate of one sample every {sampling_interval:g} s; found {[low, high]}"
        )
    return [low, high]


def check_magnitude(series: np.ndarray, labels: Sequence[str] | None, where: str) -> None:
    """Infinite or absurd values mean a broken file; NaN is a missing region and handled later."""
    bad = np.argwhere(np.abs(series) > _LARGEST_VALUE)  # False for NaN
    if len(bad):
        sample, region = bad[0]
        raise TokenizationError(
            f"{where}expected values below {_LARGEST_VALUE:g}, found {series[sample, region]:g} at "
            f"sample {sample}, region {region_name(labels, region)} ({len(bad)} such values); "
            f"the file is damaged or was divided by almost zero: extract this scan again"
        )


def warn_of_outliers(values: np.ndarray, labels: Sequence[str] | None, where: str) -> None:
    """Warn of samples beyond 1e4 robust standard deviations, with their place.

    NOTE: only regions whose largest z-score exceeds 6 can hold one and need a median.
    """
    spread = values.std(axis=0)
    suspects = np.flatnonzero(np.abs(values - values.mean(axis=0)).max(axis=0) > 6 * spread)
    for region in suspects:
        distance = np.abs(values[:, region] - np.median(values[:, region]))
        sample = int(distance.argmax())
        if distance[sample] > _OUTLIER_SD * 1.4826 * np.median(distance):
            warnings.warn(
                f"{where}sample {sample} of region {region_name(labels, region)} lies more than "
                f"{_OUTLIER_SD:g} standard deviations from the median; check this scan for a spike",
                stacklevel=4,
            )


def region_name(labels: Sequence[str] | None, region: int | np.integer) -> str:
    """How a message names a region."""
    return f"{int(region)}" if labels is None else f"{int(region)} ({labels[int(region)]})"
