"""codes.parquet: what is written comes back, and what does not belong is refused."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from cortexicon.cohorts import load_cohort
from cortexicon.inference import (
    InferenceError,
    ScanCodes,
    decode_codes,
    describe_codes,
    encode_cohort,
    read_codes,
    reconstruct_cohort,
    write_codes,
)


@pytest.fixture
def codes_path(codec, feature_extractor, cohort, tmp_path):
    scans = encode_cohort(codec, feature_extractor, cohort, progress=False)
    path = tmp_path / "sub folder" / "codes.parquet"
    assert write_codes(path, scans, describe_codes(codec, cohort)) == 6
    return path


def test_codes_round_trip(codec, feature_extractor, cohort, codes_path):
    scans, info = read_codes(codes_path)
    expected = encode_cohort(codec, feature_extractor, cohort, progress=False)
    for one, other in zip(expected, scans, strict=True):
        assert one[:3] == other[:3]
        np.testing.assert_array_equal(one.codes, other.codes)
    assert info.codebook_fingerprint == codec.codebook_fingerprint()
    assert info.cohort_hash == cohort.content_hash
    assert info.atlas == "toy"
    assert info.region_labels == cohort.labels
    assert (info.window_length, info.patch_length, info.sampling_interval) == (40, 20, 2.0)


def test_decoding_writes_a_cohort_of_the_reconstructions(
    codec, feature_extractor, cohort, codes_path, tmp_path
):
    decode_codes(codec, codes_path, tmp_path / "decoded", progress=False)
    decoded = load_cohort(tmp_path / "decoded")
    assert decoded.atlas == cohort.atlas
    assert decoded.labels == cohort.labels
    np.testing.assert_allclose(decoded.coordinates, cohort.coordinates, atol=1e-3)
    scans = list(reconstruct_cohort(codec, feature_extractor, cohort, progress=False))
    assert len(decoded) == len(scans)
    for scan in scans:
        series = decoded.series(scan.subject_id)
        assert series.tr == 2.0
        assert series.site == "here"
        np.testing.assert_allclose(series.values, scan.reconstruction, atol=1e-4)


def test_codes_of_another_codebook_are_refused(other_codec, codes_path, tmp_path):
    with pytest.raises(InferenceError, match="codes of codebook") as caught:
        decode_codes(other_codec, codes_path, tmp_path / "decoded", progress=False)
    assert other_codec.codebook_fingerprint()[:12] in str(caught.value)
    assert not (tmp_path / "decoded").exists()


def test_an_interrupted_write_leaves_nothing(codec, cohort, tmp_path):
    def broken():
        yield ScanCodes("a", "", "", np.zeros((1, 8), np.int64))
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_codes(tmp_path / "codes.parquet", broken(), describe_codes(codec, cohort))
    assert list(tmp_path.iterdir()) == []


def truncated(path):
    path.write_bytes(path.read_bytes()[:-40])


def not_parquet(path):
    path.write_text("<html>404</html>")


def without_metadata(path):
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def out_of_range(path):
    table = pq.read_table(path)
    fields = json.loads(table.schema.metadata[b"cortexicon_codes"])
    fields["num_codes"] = 3
    pq.write_table(
        table.replace_schema_metadata({b"cortexicon_codes": json.dumps(fields).encode()}), path
    )


def missing(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "truncated or of another kind"),
        (not_parquet, "truncated or of another kind"),
        (without_metadata, "which codebook"),
        (out_of_range, r"subject a: expected codes in 0\.\.2"),
        (missing, "found nothing"),
    ],
)
def test_a_bad_file_is_refused_by_name(codes_path, damage, message):
    damage(codes_path)
    with pytest.raises(InferenceError, match=message) as caught:
        read_codes(codes_path)
    assert str(codes_path) in str(caught.value)
