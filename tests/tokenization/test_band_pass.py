"""The band-pass is scipy's filtfilt, and the feature extractor applies it where it says."""

import json

import numpy as np
import pytest
from scipy.signal import butter, filtfilt

from cortexicon.tokenization import AVQFeatureExtractor, TokenizationError
from cortexicon.tokenization.band_pass_avq import SHORTEST_SCAN, band_pass_filter

BAND = [0.01, 0.1]


@pytest.fixture
def filtering(coordinates: np.ndarray) -> AVQFeatureExtractor:
    return AVQFeatureExtractor(
        window_length=40,
        patch_length=10,
        atlas="test30",
        region_labels=[f"R{region:02d}" for region in range(30)],
        region_coordinates=coordinates,
        band_pass=BAND,
    )


def scan_like(kind: str, num_samples: int, num_regions: int = 20) -> np.ndarray:
    """White noise, or noise with the slow spectrum, offset and drift of BOLD."""
    noise = np.random.default_rng(num_samples).normal(size=(num_samples, num_regions))
    if kind == "noise":
        return noise
    slow = np.cumsum(noise, axis=0) * 0.3 + noise
    return 10_000 + 30 * slow + np.linspace(0, 500, num_samples)[:, None]


@pytest.mark.parametrize("kind", ["noise", "bold"])
@pytest.mark.parametrize(
    ("interval", "low", "high"),
    [(2.0, 0.01, 0.1), (2.0, 0.008, 0.24), (0.72, 0.01, 0.1), (3.0, 0.01, 0.08)],
)
@pytest.mark.parametrize("num_samples", [SHORTEST_SCAN, 80, 240])
def test_agrees_with_filtfilt_from_the_first_sample_to_the_last(
    kind, interval, low, high, num_samples
):
    series = scan_like(kind, num_samples)
    numerator, denominator = butter(2, [low, high], "band", fs=1 / interval)
    wanted = filtfilt(numerator, denominator, series, axis=0)
    found = band_pass_filter(series, interval, low, high)
    error = np.abs(found - wanted) / wanted.std()
    # Measured: at most 4e-12 anywhere (series at 0.72 s), as small at the ends as inside.
    assert error[15:-15].max(initial=0) < 1e-9
    assert error.max() < 1e-9


def test_keeps_the_band_where_it_is_and_nothing_else():
    times = np.arange(600) * 2.0
    for frequency, gain in ((0.03, 1.0), (0.01, 0.5), (0.1, 0.5), (0.002, 0.0), (0.2, 0.0)):
        wave = np.sin(2 * np.pi * frequency * times + 0.7)[:, None]
        found = band_pass_filter(wave + 5.0, 2.0, *BAND)[150:-150]
        np.testing.assert_allclose(found, gain * wave[150:-150], atol=0.02)


def test_the_extractor_filters_after_resampling_and_before_the_z_score(filtering, extractor, scan):
    for tr in (2.0, 2.5):
        values, mask = filtering.prepare_scan(scan, tr)
        unscaled, _ = extractor._checked_scan(scan, tr, extractor._columns, True, "")
        wanted = filtfilt(*butter(2, BAND, "band", fs=0.5), unscaled, axis=0)
        wanted = (wanted - wanted.mean(0)) / wanted.std(0)
        np.testing.assert_allclose(values, wanted, atol=1e-5)
        assert mask.all()
        assert np.abs(values - extractor.prepare_scan(scan, tr)[0]).mean() > 0.1
    # Windows are cut from the filtered scan, not filtered one by one.
    out = filtering(scan, tr=2.5, return_tensors="np")
    np.testing.assert_array_equal(out["input_values"], values[:160].reshape(4, 40, 30))


def test_masked_regions_stay_masked_and_leave_the_others_alone(filtering, scan):
    whole, _ = filtering.prepare_scan(scan, 2.5)
    broken = scan.copy()
    broken[5, 2] = np.nan
    broken[:, 7] = 1000.1
    values, mask = filtering.prepare_scan(broken, 2.5)
    assert np.flatnonzero(~mask).tolist() == [2, 7]
    assert not values[:, [2, 7]].any()
    np.testing.assert_allclose(values[:, mask], whole[:, mask], atol=1e-6)


def test_the_band_is_saved_and_goes_along_to_another_atlas(filtering, extractor, scan, tmp_path):
    filtering.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["band_pass"] == BAND
    loaded = AVQFeatureExtractor.from_pretrained(tmp_path)
    np.testing.assert_array_equal(
        loaded.prepare_scan(scan, 2.5)[0], filtering.prepare_scan(scan, 2.5)[0]
    )
    assert filtering.for_atlas("other", ["a"], [[0, 0, 0]]).band_pass == BAND
    extractor.save_pretrained(tmp_path)
    assert AVQFeatureExtractor.from_pretrained(tmp_path).band_pass is None


def test_a_scan_too_short_for_the_filter_is_refused(filtering, scan):
    with pytest.raises(TokenizationError, match=r"sub-1: expected at least 16 samples.*found 12"):
        filtering.prepare_scan(scan[:12], 2.0, where="sub-1: ")
