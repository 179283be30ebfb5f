"""Resampling keeps what is below the new Nyquist frequency, and nothing else."""

import numpy as np
import pytest
from scipy.signal import resample_poly

from cortexicon.tokenization.resampling_avq import num_resampled, resample

RATIOS = [(2.5, 2.0), (3.0, 2.0), (1.656, 2.0), (1.5, 2.0), (2.2, 2.0), (0.72, 2.0)]


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean((wanted - wanted.mean()) ** 2)))


def sinusoids(num_samples: int, interval: float, frequency: float) -> np.ndarray:
    """(num_samples, 8): eight phases, on an offset and a drift."""
    times = np.arange(num_samples)[:, None] * interval
    return np.sin(2 * np.pi * (frequency * times + np.arange(8) / 8))


@pytest.mark.parametrize(("tr", "target"), RATIOS)
@pytest.mark.parametrize("share_of_nyquist", [0.1, 0.4, 0.7])
def test_a_sinusoid_below_the_new_nyquist_frequency_is_kept(tr, target, share_of_nyquist):
    frequency = share_of_nyquist * 0.5 / max(tr, target)
    num_samples = int(400 / tr)
    found = resample(sinusoids(num_samples, tr, frequency), tr, target)
    wanted = sinusoids(len(found), target, frequency)
    # The ends rest on a mirrored scan; the last sample may lie after the last measured one.
    assert relative_error(found[10:-10], wanted[10:-10]) < 0.005
    assert relative_error(found, wanted) < (0.02 if share_of_nyquist < 0.5 else 0.06)


@pytest.mark.parametrize(("tr", "target", "frequency"), [(0.72, 2.0, 0.35), (1.0, 2.0, 0.30)])
def test_a_sinusoid_above_the_new_nyquist_frequency_is_suppressed(tr, target, frequency):
    found = resample(sinusoids(int(400 / tr), tr, frequency), tr, target)
    # The filter reaches 24 samples, and a mirrored sinusoid has a kink there.
    assert np.abs(found[25:-25]).max() < 0.002
    assert np.abs(found[10:-10]).max() < 0.03
    assert np.sqrt(np.mean(found**2)) < 0.07 * np.sqrt(0.5)
    naive = sinusoids(int(400 / tr), tr, frequency)[:: round(target / tr)]
    assert np.sqrt(np.mean(naive**2)) > 0.6, "taking every n-th sample would alias it"


@pytest.mark.parametrize(
    ("tr", "up", "down"), [(2.5, 5, 4), (3.0, 3, 2), (1.5, 3, 4), (0.72, 9, 25)]
)
def test_agrees_with_scipy_on_band_limited_noise(tr, up, down):
    noise = np.random.default_rng(0).normal(size=(int(600 / tr), 20))
    spectrum = np.fft.rfft(noise, axis=0)
    spectrum[np.fft.rfftfreq(len(noise), tr) > 0.6 * 0.5 / max(tr, 2.0)] = 0
    series = np.fft.irfft(spectrum, n=len(noise), axis=0)
    found = resample(series, tr, 2.0)
    wanted = resample_poly(series, up, down, axis=0, window=("kaiser", 8.0))[: len(found)]
    assert relative_error(found[15:-15], wanted[15:-15]) < 0.01


@pytest.mark.parametrize(("tr", "target"), RATIOS)
def test_offset_and_drift_pass_unchanged_to_the_very_ends(tr, target):
    num_samples = 200
    line = 1000.0 + 0.3 * np.arange(num_samples)[:, None] * tr * np.array([[1.0, -2.0]])
    found = resample(line, tr, target)
    times = np.minimum(np.arange(len(found)) * target, (num_samples - 1) * tr)
    np.testing.assert_allclose(found, 1000.0 + 0.3 * times[:, None] * [[1.0, -2.0]], rtol=1e-9)


def test_the_end_does_not_leak_into_the_beginning():
    series = np.zeros((200, 1))
    series[-1] = 100.0
    assert np.abs(resample(series - series.mean(), 2.5, 2.0)[:150]).max() < 1.5


@pytest.mark.parametrize(
    ("num_samples", "tr", "expected"),
    [(100, 2.4, 120), (64, 2.5, 80), (150, 1.656, 124), (3, 0.72, 1)],
)
def test_the_new_scan_holds_the_whole_intervals_that_fit(num_samples, tr, expected):
    assert num_resampled(num_samples, tr, 2.0) == expected
    assert len(resample(np.ones((num_samples, 1)), tr, 2.0)) == expected


def test_a_scan_is_resampled_alone_as_in_company():
    series = np.random.default_rng(0).normal(size=(120, 7))
    together = resample(series, 2.5, 2.0)
    alone = resample(series[:, 3:4], 2.5, 2.0)
    np.testing.assert_allclose(together[:, 3:4], alone, atol=1e-12)
