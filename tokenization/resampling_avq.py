"""Resampling of region time series in time, with anti-aliasing, for any ratio of two intervals."""

from functools import lru_cache

import numpy as np

# Zero crossings of the sinc on each side, in samples of the slower of the two rates.
_ZERO_CROSSINGS = 24
# Cut-off (-6 dB) as a part of the lower Nyquist frequency. With this kernel the transition band is
# 15 % of that frequency wide, so the stop band begins where aliasing would.
_CUTOFF = 0.92
# Kaiser window for a stop band of -60 dB.
_KAISER_BETA = 5.65


def num_resampled(num_samples: int, interval: float, new_interval: float) -> int:
    """Number of samples after resampling: ``floor(num_samples * interval / new_interval)``.

    A scan of `num_samples` volumes lasts ``num_samples * interval`` seconds; the new grid holds the
    whole new intervals that fit into it, from the same first sample.
    """
    # NOTE: the small term keeps 100 x 2.4 s / 2.0 s at 120, although it is 119.99... in binary.
    return int(np.floor(num_samples * interval / new_interval + 1e-6))


@lru_cache(maxsize=64)
def _resampling_matrix(num_samples: int, interval: float, new_interval: float) -> np.ndarray:
    """Weights float64 (new time, time) of a Kaiser-windowed sinc, the scan mirrored at its ends."""
    slower = max(interval, new_interval)
    half_width = _ZERO_CROSSINGS * slower  # s
    margin = int(np.ceil(half_width / interval)) + 1  # mirrored samples on each side
    position = np.arange(-margin, num_samples + margin)
    times = _new_times(num_samples, interval, new_interval)
    distance = times[:, None] - position[None, :] * interval  # s, (new time, mirrored time)
    window = np.i0(_KAISER_BETA * np.sqrt(np.clip(1.0 - (distance / half_width) ** 2, 0.0, None)))
    weights = np.where(
        np.abs(distance) < half_width, window * np.sinc(_CUTOFF * distance / slower), 0
    )
    weights /= weights.sum(axis=1, keepdims=True)  # a constant stays exactly what it is

    folded = position % (2 * num_samples)
    folded = np.where(folded < num_samples, folded, 2 * num_samples - 1 - folded)
    matrix = np.zeros((num_samples, len(times)))
    np.add.at(matrix, folded, weights.T)
    return np.ascontiguousarray(matrix.T)


def _new_times(num_samples: int, interval: float, new_interval: float) -> np.ndarray:
    """Times in seconds of the new samples.

    NOTE: going from a long to a short interval, the last new samples lie after the last measured
    one; they repeat its time, since a sinc does not extrapolate.
    """
    times = np.arange(num_resampled(num_samples, interval, new_interval)) * new_interval
    return np.minimum(times, (num_samples - 1) * interval)


def resample(series: np.ndarray, interval: float, new_interval: float) -> np.ndarray:
    """Resample time series to another sampling interval, with anti-aliasing.

    A straight line is taken off each series first and put back afterwards, and what remains is
    mirrored at both ends, so that neither drift nor offset rings at the edges and nothing wraps
    around. The filter is a linear-phase windowed sinc at the lower of the two Nyquist frequencies,
    the same kind as ``scipy.signal.resample_poly``, but for ratios that need not be rational
    (1.656 s to 2 s). It is one matrix product; the matrix is cached per (length, interval) pair.

    Parameters
    ----------
    series : ndarray, float, shape (time, regions)
        At least two samples. Must be finite.
    interval, new_interval : float
        Seconds between two samples, before and after.

    Returns
    -------
    ndarray, float64, shape (floor(time * interval / new_interval), regions)
        Sample 0 stays at the time of sample 0.
    """
    num_samples = len(series)
    series = np.asarray(series, dtype=np.float64)
    old_times = np.arange(num_samples) * interval
    centre = old_times.mean()
    slope = (old_times - centre) @ series / np.sum((old_times - centre) ** 2)  # (regions,) per s
    mean = series.mean(axis=0)
    residual = series - mean - np.outer(old_times - centre, slope)
    new_times = _new_times(num_samples, interval, new_interval)
    matrix = _resampling_matrix(num_samples, float(interval), float(new_interval))
    return matrix @ residual + mean + np.outer(new_times - centre, slope)
