"""`cortexicon cross-atlas` on a tiny codec and the same scans in two atlases."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cortexicon.cli import main
from cortexicon.cohorts import Split, cohort_from_series, save_cohort

from .conftest import make_codec, save_checkpoint


def halved(scan):
    """The scan in a coarser atlas: neighbouring regions averaged two by two."""
    return replace(
        scan,
        values=scan.values.reshape(len(scan.values), -1, 2).mean(2),
        labels=[f"half {number}" for number in range(len(scan.labels) // 2)],
        coordinates=scan.coordinates.reshape(-1, 2, 3).mean(1),
        atlas="halves",
    )


@pytest.fixture(params=["latent", "grid"])
def folder(request, cohort, feature_extractor, tmp_path):
    """checkpoint/, toy/, halves/ and split.json."""
    changes = {"token_layout": request.param, "region_coordinates": cohort.coordinates.tolist()}
    save_checkpoint(make_codec(0, **changes), feature_extractor, tmp_path / "checkpoint")
    save_cohort(cohort, tmp_path / "toy")
    save_cohort(cohort_from_series(map(halved, cohort)), tmp_path / "halves")
    parts = {"train": ["a", "b", "c"], "validation": ["d"], "test": ["e", "f", "short"]}
    Split("holdout", [parts], cohort.content_hash).save(tmp_path / "split.json")
    return tmp_path


def run(folder):
    names = ("checkpoint", "toy", "halves")
    options = ("--split", folder / "split.json", "--json", folder / "scores.json")
    return main(["cross-atlas", *(str(folder / name) for name in names), *map(str, options)])


def test_the_same_scans_in_two_atlases(folder, capsys):
    assert run(folder) == 0
    scores = json.loads((folder / "scores.json").read_text())
    assert (scores["source_atlas"], scores["target_atlas"]) == ("toy", "halves")
    systems = {row["system"]: row for row in scores["systems"]}
    assert len(systems) == 6
    assert set(systems["series of the source, ridge map"]["r2_per_subject"]) == {"e", "f"}
    # The target is a linear map of the source, and z-scores are no obstacle to it.
    assert systems["series of the source, ridge map"]["r2"] > 0.95
    assert scores["num_fitted"] == {"train": 2, "validation": 1}, "c has another TR"
    assert list(scores["left_out"]) == ["short"]
    printed = capsys.readouterr().out
    assert "toy -> halves, 2 test scans" in printed
    row = systems["codes of the source, decoded at the target"]
    assert f"{row['r2']:.3f}" in printed


def test_scans_that_are_not_the_same_are_refused(folder, cohort, capsys):
    scans = [halved(scan) for scan in cohort]
    scans = [replace(s, values=s.values[1:]) if s.subject_id == "e" else s for s in scans]
    save_cohort(cohort_from_series(scans), folder / "halves")
    assert run(folder) == 2
    message = capsys.readouterr().err
    assert "Subject e" in message
    assert "n_timepoints 90" in message
    assert "89" in message
    assert not (folder / "scores.json").exists()


def test_other_people_are_refused(folder, cohort, capsys):
    scans = [replace(halved(scan), subject_id=f"x{scan.subject_id}") for scan in cohort]
    save_cohort(cohort_from_series(scans), folder / "halves")
    assert run(folder) == 2
    assert "train 0, validation 0, test 0" in capsys.readouterr().err


def test_what_the_codec_decodes_elsewhere_is_scored(folder, cohort):
    """R2 of the first row by hand, for one scan."""
    import torch

    from cortexicon.inference import encode_cohort, fit_to_atlas, load_checkpoint

    assert run(folder) == 0
    scores = json.loads((folder / "scores.json").read_text())
    checkpoint = load_checkpoint(folder / "checkpoint")
    coarse = cohort_from_series(map(halved, cohort))
    extractor = checkpoint.processor.feature_extractor
    (scan,) = encode_cohort(checkpoint.codec, extractor, cohort, ["e"], progress=False)
    places = [torch.tensor(one.coordinates)[None] for one in (coarse, cohort)]
    with torch.inference_mode():
        decoded = checkpoint.codec.decode(torch.from_numpy(scan.codes), *places).reconstruction
    fitted = fit_to_atlas(checkpoint, coarse, any_atlas=True).processor.feature_extractor
    target = fitted(coarse.series("e").values, tr=2.0)["input_values"].numpy().reshape(-1, 6)
    error = ((decoded.numpy().reshape(-1, 6) - target) ** 2).sum()
    expected = 1 - error / ((target - target.mean(0)) ** 2).sum()
    assert scores["systems"][0]["r2_per_subject"]["e"] == pytest.approx(float(expected), abs=1e-4)
    assert np.isfinite(expected)
