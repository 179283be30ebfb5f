"""Streaming a cohort through the codec."""

import logging

import numpy as np
import pytest
import torch

from cortexicon.inference import InferenceError, encode_cohort, reconstruct_cohort

TOKENS = 8  # 2 patches x 4 latents


def test_every_scan_comes_back_in_order_with_its_windows(codec, feature_extractor, cohort):
    scans = list(encode_cohort(codec, feature_extractor, cohort, progress=False))
    assert [scan.subject_id for scan in scans] == ["a", "b", "c", "d", "e", "f"]
    # 130 samples at 1.5 s are 195 s, 97 samples at 2 s: two windows of 40
    assert [len(scan.codes) for scan in scans] == [2, 2, 2, 1, 2, 2]
    for scan in scans:
        assert scan.codes.dtype == np.int64
        assert scan.codes.shape[1] == TOKENS
        assert 0 <= scan.codes.min() <= scan.codes.max() < 32


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_codes_do_not_depend_on_the_batch(codec, feature_extractor, cohort, batch_size):
    options = {"progress": False}
    expected = list(encode_cohort(codec, feature_extractor, cohort, batch_size=7, **options))
    found = list(encode_cohort(codec, feature_extractor, cohort, batch_size=batch_size, **options))
    for one, other in zip(expected, found, strict=True):
        assert one.subject_id == other.subject_id
        np.testing.assert_array_equal(one.codes, other.codes)


def test_chosen_subjects_only(codec, feature_extractor, cohort):
    scans = encode_cohort(codec, feature_extractor, cohort, ["e", "a"], progress=False)
    assert [scan.subject_id for scan in scans] == ["e", "a"]


def test_a_scan_that_cannot_be_encoded_is_named(codec, feature_extractor, cohort, caplog):
    skipped = []
    with caplog.at_level(logging.WARNING, logger="cortexicon.inference"):
        scans = list(
            encode_cohort(codec, feature_extractor, cohort, skipped=skipped, progress=False)
        )
    assert len(scans) + len(skipped) == len(cohort)
    (short,) = skipped
    assert short.subject_id == "short"
    assert "30 samples" in short.reason
    assert "short" in caplog.text
    assert "1 of 7" in caplog.text


def test_no_usable_scan_is_an_error(codec, feature_extractor, cohort):
    with pytest.raises(InferenceError, match=r"none of 1 scans .* 30 samples"):
        list(encode_cohort(codec, feature_extractor, cohort, ["short"], progress=False))


def test_batch_size_zero_is_refused(codec, feature_extractor, cohort):
    with pytest.raises(InferenceError, match="batch_size"):
        list(encode_cohort(codec, feature_extractor, cohort, batch_size=0, progress=False))


def test_encoding_never_updates_a_codebook_in_training(codec, feature_extractor, cohort):
    codec.train()
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    list(encode_cohort(codec, feature_extractor, cohort, progress=False))
    assert codec.training, "the mode must be put back"
    for name, value in codec.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_reconstruction_is_decode_of_encode(codec, feature_extractor, cohort):
    scans = list(reconstruct_cohort(codec, feature_extractor, cohort, batch_size=3, progress=False))
    codes = list(encode_cohort(codec, feature_extractor, cohort, progress=False))
    for scan, encoded in zip(scans, codes, strict=True):
        assert scan.subject_id == encoded.subject_id
        assert scan.raw.shape == scan.reconstruction.shape == (len(scan.codes) * 40, 12)
        assert scan.raw.dtype == scan.reconstruction.dtype == np.float32
        assert scan.region_mask.shape == (12,)
        np.testing.assert_array_equal(scan.codes, encoded.codes)
        series = cohort.series(scan.subject_id)
        features = feature_extractor(series.values, tr=series.tr)
        np.testing.assert_allclose(
            scan.raw, features["input_values"].numpy().reshape(-1, 12), atol=1e-6
        )
        with torch.inference_mode():
            forward = codec(features["input_values"], features["region_coordinates"])
        np.testing.assert_allclose(
            scan.reconstruction, forward.reconstruction.numpy().reshape(-1, 12), atol=1e-5
        )
