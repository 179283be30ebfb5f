"""A codec reads and writes another parcellation when it is told to, and only then."""

import json

import numpy as np
import pytest
import torch

from cortexicon.cli import main
from cortexicon.cohorts import (
    ParcelSeries,
    Split,
    cohort_from_series,
    load_cohort,
    save_cohort,
)
from cortexicon.inference import InferenceError, fit_to_atlas, load_checkpoint, read_codes

from .conftest import make_codec, save_checkpoint

REGIONS = 7


@pytest.fixture(scope="module")
def fine_cohort():
    """Three scans of seven regions of an atlas that no checkpoint stores."""
    generator = np.random.default_rng(7)
    places = generator.uniform(-60, 60, (REGIONS, 3)).astype(np.float32)
    labels = [f"place {number}" for number in range(REGIONS)]
    return cohort_from_series(
        ParcelSeries(
            generator.normal(size=(90, REGIONS)).astype(np.float32), labels, places, "fine", 2.0, s
        )
        for s in ("a", "b", "e")
    )


@pytest.fixture(params=["latent", "grid"])
def folders(request, cohort, fine_cohort, feature_extractor, tmp_path):
    """checkpoint/ of one layout, and both cohorts: toy/ and fine/."""
    changes = {"token_layout": request.param}
    if request.param == "grid":  # the number of tokens depends on the atlas
        changes["region_coordinates"] = cohort.coordinates.tolist()
    save_checkpoint(make_codec(0, **changes), feature_extractor, tmp_path / "checkpoint")
    save_cohort(cohort, tmp_path / "toy")
    save_cohort(fine_cohort, tmp_path / "fine")
    return tmp_path


def run(*words):
    return main([str(word) for word in words])


def test_another_atlas_is_refused_until_it_is_asked_for(folders, capsys):
    words = ("encode", folders / "checkpoint", folders / "fine", "--out", folders / "codes.parquet")
    assert run(*words) == 2
    message = capsys.readouterr().err
    for part in (
        "'toy'",
        "'fine'",
        str(folders / "fine"),
        str(folders / "checkpoint"),
        "any-atlas",
    ):
        assert part in message
    assert not (folders / "codes.parquet").exists()
    assert run(*words, "--any-atlas") == 0
    assert read_codes(folders / "codes.parquet").info.atlas == "fine"


def test_the_cohorts_own_coordinates_are_used(folders, fine_cohort):
    checkpoint = load_checkpoint(folders / "checkpoint")
    out = folders / "codes.parquet"
    run("encode", folders / "checkpoint", folders / "fine", "--out", out, "--any-atlas")
    scans, info = read_codes(out)
    np.testing.assert_allclose(info.region_coordinates, fine_cohort.coordinates, atol=1e-3)
    series = fine_cohort.series("b")
    windows = (series.values - series.values.mean(0)) / series.values.std(0)
    with torch.inference_mode():
        expected = checkpoint.codec.encode(
            torch.from_numpy(windows[:80].reshape(2, 40, REGIONS)),
            region_coordinates=torch.tensor(fine_cohort.coordinates)[None],
        )
    np.testing.assert_array_equal(scans[1].codes, expected.codes.numpy())


def test_the_checkpoints_own_atlas_keeps_its_extractor(folders, cohort, fine_cohort):
    checkpoint = load_checkpoint(folders / "checkpoint")
    assert fit_to_atlas(checkpoint, cohort, any_atlas=True) is checkpoint
    with pytest.raises(InferenceError, match="any_atlas=True"):
        fit_to_atlas(checkpoint, fine_cohort)
    fitted = fit_to_atlas(checkpoint, fine_cohort, any_atlas=True)
    grid = checkpoint.codec.config.token_layout == "grid"
    assert fitted.tokens_per_window == fitted.processor.tokens_per_window == (14 if grid else 8)
    assert checkpoint.tokens_per_window == (24 if grid else 8)
    kept = checkpoint.processor.feature_extractor
    assert (kept.atlas, kept.num_regions) == ("toy", 12), "the checkpoint itself is not changed"


def test_codes_decode_into_another_parcellation(folders, cohort, fine_cohort):
    checkpoint, codes = load_checkpoint(folders / "checkpoint"), folders / "codes.parquet"
    assert run("encode", checkpoint.folder, folders / "toy", "--out", codes) == 0
    words = ("decode", checkpoint.folder, codes, "--out", folders / "decoded")
    regions = ("--regions", folders / "fine" / "regions.tsv")
    assert run(*words, *regions, "--atlas", "fine") == 0
    decoded = load_cohort(folders / "decoded")
    assert (decoded.atlas, decoded.labels) == ("fine", fine_cohort.labels)
    scan = read_codes(codes).scans[0]
    with torch.inference_mode():
        expected = checkpoint.codec.decode(
            torch.from_numpy(scan.codes),
            torch.tensor(fine_cohort.coordinates)[None],
            torch.tensor(cohort.coordinates)[None],
        ).reconstruction
    found = decoded.series(scan.subject_id).values.reshape(expected.shape)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-3)


def test_a_table_of_regions_needs_the_name_of_its_atlas(folders, capsys):
    codes, out = folders / "codes.parquet", folders / "decoded"
    assert run("encode", folders / "checkpoint", folders / "toy", "--out", codes) == 0
    words = ("decode", folders / "checkpoint", codes, "--out", out)
    assert run(*words, "--regions", folders / "fine" / "regions.tsv") == 2
    assert "found only the table" in capsys.readouterr().err
    assert run(*words, "--atlas", "fine") == 2
    assert "found only the name" in capsys.readouterr().err
    assert not out.exists()


def test_scores_in_another_parcellation(folders):
    out = folders / "scores.json"
    words = ("evaluate", folders / "checkpoint", folders / "fine", "--json", out)
    assert run(*words) == 2
    assert run(*words, "--any-atlas") == 0
    scores = json.loads(out.read_text())
    grid = load_checkpoint(folders / "checkpoint").codec.config.token_layout == "grid"
    assert scores["atlas"] == "fine"
    assert scores["tokens_per_window"] == (14 if grid else 8)
    assert scores["num_subjects"] == 3


def test_the_split_of_the_other_atlas_serves(folders, cohort, capsys):
    parts = {"train": ["a", "c"], "validation": ["d"], "test": ["b", "e", "f"]}
    Split("holdout", [parts], cohort.content_hash).save(folders / "split.json")
    out = folders / "scores.json"
    words = ("evaluate", folders / "checkpoint", folders / "fine", "--json", out, "--any-atlas")
    assert run(*words, "--split", folders / "split.json") == 0
    scores = json.loads(out.read_text())
    assert set(scores["r2_per_subject"]) == {"b", "e"}
    assert scores["connectivity"]["num_training_scans"] == 1
    assert "3 of the split's subjects" in capsys.readouterr().err
    codes = folders / "codes.parquet"
    words = ("encode", folders / "checkpoint", folders / "fine", "--out", codes, "--any-atlas")
    assert run(*words, "--split", folders / "split.json") == 0
    assert [scan.subject_id for scan in read_codes(codes).scans] == ["b", "e"]
    others = {"train": ["x"], "validation": ["y"], "test": ["z"]}
    Split("holdout", [others], "0" * 64).save(folders / "others.json")
    assert run(*words, "--split", folders / "others.json") == 2
    assert "none of its subject ids" in capsys.readouterr().err
