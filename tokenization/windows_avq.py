"""Cutting one prepared scan into windows, and statistics over many prepared scans."""

from collections.abc import Sequence

import numpy as np

from .input_checks_avq import region_name
from .tokenization_errors import TokenizationError


def cut_windows(
    values: np.ndarray,
    length: int,
    starts: Sequence[int] | None,
    remainder: str,
    sampling_interval: float,
    where: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Windows of one scan.

    Parameters
    ----------
    values : ndarray float32 (time, regions)
    length : int
        Samples per window.
    starts : list of int, optional
        First samples of the windows; None: 0, length, 2 length ...
    remainder : {"drop", "pad"}
        "pad" also allows windows that reach beyond the scan.
    sampling_interval : float
        Seconds; for messages.
    where : str
        Put in front of messages.

    Returns
    -------
    windows : ndarray float32 (windows, length, regions)
        0 beyond the scan.
    time_mask : ndarray bool (windows, length)
        False beyond the scan.

    Raises
    ------
    TokenizationError
        No room for one window, or starts that are no integers or lie outside.
    """
    available = len(values)
    last = available - length if remainder == "drop" else available - 1
    if last < 0:
        raise TokenizationError(
            f"{where}expected at least one window of {length} samples "
            f"({length * sampling_interval:g} "
            f"s), found {available} samples at {sampling_interval:g} s "
            f"({available * sampling_interval:g} s); use remainder='pad' to pad the window, or "
            f"leave the scan out"
        )
    if starts is None:
        starts = range(0, last + 1, length)
    first = np.asarray(starts)
    if first.ndim != 1 or not len(first) or first.dtype.kind not in "iu":
        raise TokenizationError(f"{where}window_starts must be integers, found {first.tolist()}")
    outside = first[(first < 0) | (first > last)]
    if len(outside):
        raise TokenizationError(
            f"{where}window_starts must lie in 0..{last} (scan of {available} samples, windows of "
            f"{length}), found {int(outside[0])}"
        )
    windows = np.zeros((len(first), length, values.shape[1]), dtype=np.float32)
    time_mask = np.zeros((len(first), length), dtype=bool)
    for window, mask, start in zip(windows, time_mask, first, strict=True):
        piece = values[start : start + length]
        window[: len(piece)] = piece
        mask[: len(piece)] = True
    return windows, time_mask


def robust_statistics(
    scans: Sequence[tuple[np.ndarray, np.ndarray]], labels: Sequence[str] | None
) -> tuple[list[float], list[float]]:
    """Median and robust standard deviation of each region over all samples of all scans.

    Parameters
    ----------
    scans : list of (values float (time, regions), region_mask bool (regions,))
        Masked regions are left out scan by scan.
    labels : list of str, optional
        For messages.

    Returns
    -------
    center, scale : list of float, length regions
        Median, and 1.4826 times the median absolute deviation.

    Raises
    ------
    TokenizationError
        A region without signal in all scans, or constant in more than half of all samples.
    """
    center, scale = [], []
    for region in range(scans[0][0].shape[1]):
        seen = [values[:, region] for values, mask in scans if mask[region]]
        if not seen:
            raise TokenizationError(
                f"region {region_name(labels, region)} has no signal in any of the {len(scans)} "
                f"training scans, so it cannot be scaled; leave it out of the atlas"
            )
        samples = np.concatenate(seen)
        center.append(float(np.median(samples)))
        scale.append(float(1.4826 * np.median(np.abs(samples - center[-1]))))
        if scale[-1] <= 0:
            raise TokenizationError(
                f"region {region_name(labels, region)} is constant in more than half of the "
                f"training samples, so it cannot be scaled; leave it out of the atlas"
            )
    return center, scale
