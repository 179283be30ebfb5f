"""A zero-phase band-pass for region time series: Butterworth, forwards and backwards."""

from functools import lru_cache

import numpy as np

# Order of the low-pass prototype; the band-pass has twice as many poles.
_ORDER = 2
# Samples of the odd extension at each end: three times the number of coefficients.
_EXTENSION = 3 * (2 * _ORDER + 1)
# A scan must be longer than its extension.
SHORTEST_SCAN = _EXTENSION + 1


@lru_cache(maxsize=16)
def _butterworth(low: float, high: float, interval: float) -> tuple[np.ndarray, ...]:
    """Numerator (5,), denominator (5,) with a leading 1, and the filter's state (4,) under a step.

    The poles of the analog prototype are moved to the band, whose edges are pre-warped, and mapped
    to the unit disc by the bilinear transform.
    """
    nyquist = 0.5 / interval
    edges = 4.0 * np.tan(0.5 * np.pi * np.array([low, high]) / nyquist)  # rad per half a sample
    width, centre = edges[1] - edges[0], np.sqrt(edges[0] * edges[1])
    angles = np.pi * (2 * np.arange(_ORDER) + 1 + _ORDER) / (2 * _ORDER)
    half = 0.5 * width * np.exp(1j * angles)
    root = np.sqrt(half**2 - centre**2 + 0j)
    poles = np.concatenate([half + root, half - root])
    poles = (4.0 + poles) / (4.0 - poles)
    denominator = np.poly(poles).real
    # Zeros: `_ORDER` at frequency 0 and as many at the Nyquist frequency.
    numerator = np.poly(np.repeat([1.0, -1.0], _ORDER))
    middle = np.exp(2j * np.arctan(centre / 4.0))  # where the response is largest: gain 1 there
    numerator = numerator * abs(np.polyval(denominator, middle) / np.polyval(numerator, middle))
    # State z of the transposed direct form after endless ones: z[k] = z[k+1] + b[k+1] - a[k+1] y.
    level = numerator.sum() / denominator.sum()
    state = np.cumsum((numerator - denominator * level)[:0:-1])[::-1]
    return numerator, denominator, state


def _forwards(series: np.ndarray, coefficients: tuple[np.ndarray, ...]) -> np.ndarray:
    """The causal filter over axis 0, begun in the state that the first sample would keep up."""
    numerator, denominator, start = coefficients
    state = start[:, None] * series[0]  # (poles, regions)
    gain, feedback = numerator[1:, None], denominator[1:, None]
    out = np.empty_like(series)
    for sample, row in enumerate(series):
        out[sample] = numerator[0] * row + state[0]
        following = gain * row - feedback * out[sample]
        following[:-1] += state[1:]
        state = following
    return out


def band_pass_filter(series: np.ndarray, interval: float, low: float, high: float) -> np.ndarray:
    """Keep the frequencies of a band, without shifting anything in time.

    Butterworth of order 2, run forwards and then backwards, so that the response is the square of
    the filter's magnitude: 1/2 (-6 dB in amplitude) at both edges. Before that both ends are
    continued by 15 samples of the series turned about its end point, and each run begins in the
    state of a series that has always had its first value. These are the conventions of
    ``scipy.signal.filtfilt`` with ``scipy.signal.butter(2, [low, high], "band", fs=1/interval)``;
    tests compare the two. The filter itself is one recursion in NumPy, so that a checkpoint needs
    no SciPy.

    Parameters
    ----------
    series : ndarray, float, shape (time, regions)
        At least 16 samples. Must be finite.
    interval : float
        Seconds between two samples.
    low, high : float
        Edges of the band, Hz; 0 < low < high < 0.5 / interval.

    Returns
    -------
    ndarray, float64, shape (time, regions)
        Mean and drift of the scan are gone.
    """
    series = np.asarray(series, dtype=np.float64)
    coefficients = _butterworth(float(low), float(high), float(interval))
    before = 2.0 * series[0] - series[_EXTENSION:0:-1]
    after = 2.0 * series[-1] - series[-2 : -_EXTENSION - 2 : -1]
    extended = np.concatenate([before, series, after])
    once = _forwards(extended, coefficients)
    twice = _forwards(once[::-1], coefficients)[::-1]
    return np.ascontiguousarray(twice[_EXTENSION:-_EXTENSION])
