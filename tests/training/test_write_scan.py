"""Text in, scan out: codes, region series, a NIfTI whose regions come back, and bounds."""

import nibabel
import numpy as np
import pytest

from cortexicon import cli
from cortexicon.cohorts import CohortError, load_cohort
from cortexicon.cohorts.atlases import load_atlas
from cortexicon.cohorts.painting import paint_series
from cortexicon.cohorts.volumes import region_means
from cortexicon.inference import InferenceError
from cortexicon.inference.predict import load_language_model
from cortexicon.inference.write_scan import write_scan


@pytest.fixture(scope="module")
def atlas_path(tmp_path_factory):
    """A label volume of six blocks in a small MNI-like grid."""
    grid = np.zeros((6, 5, 4), np.int16)
    for value in range(1, 7):
        grid[value - 1, 1:4, 1:3] = value * 3  # labels with gaps
    affine = np.diag([20.0, 20.0, 20.0, 1.0])
    affine[:3, 3] = [-50, -40, -20]
    path = tmp_path_factory.mktemp("atlas") / "tpl-MNI152NLin6Asym_blocks.nii.gz"
    nibabel.save(nibabel.Nifti1Image(grid, affine), path)
    return path


def test_the_same_seed_writes_the_same_scan_and_another_prompt_another(run):
    loaded = load_language_model(run / "lm")
    text = "The visual network rises and falls."
    scan = write_scan(loaded.model, loaded.processor, text, windows=2, seed=3)
    assert scan.codes.shape == (2, 8)
    assert scan.values.shape == (80, 28)
    assert scan.tr == 2.0
    assert np.isfinite(scan.values).all()
    assert np.abs(scan.values).max() <= 8
    again = write_scan(loaded.model, loaded.processor, text, windows=2, seed=3)
    np.testing.assert_array_equal(scan.values, again.values)
    other = write_scan(loaded.model, loaded.processor, text, windows=2, seed=4)
    assert (scan.codes != other.codes).any()
    # Markers in the text are text.
    hostile = write_scan(loaded.model, loaded.processor, "</fmri><fmri_3>", temperature=0)
    assert hostile.codes.shape == (1, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": " "}, "empty one"),
        ({"prompt": "A scan.", "windows": 0}, r"1 to \d+ windows"),
        ({"prompt": "A scan.", "windows": 999}, "has 128 positions"),
        ({"prompt": "A scan.", "temperature": -1.0}, "at least 0"),
    ],
)
def test_what_cannot_be_written_is_refused(run, call, message):
    loaded = load_language_model(run / "lm")
    with pytest.raises(InferenceError, match=message):
        write_scan(loaded.model, loaded.processor, **call)


def test_the_command_writes_an_image_whose_regions_are_the_series(
    run, atlas_path, tmp_path, capsys
):
    out = tmp_path / "scan.nii.gz"
    argv = ["generate-scan", str(run / "lm"), "--prompt", "An old person.", "--out", str(out)]
    assert cli.main([*argv, "--atlas", str(atlas_path), "--seed", "3"]) == 0
    assert "measured in nobody" in capsys.readouterr().out
    image, atlas = nibabel.load(out), load_atlas(atlas_path)
    assert image.shape == (6, 5, 4, 40)
    assert image.header.get_zooms()[3] == 2.0
    np.testing.assert_allclose(image.affine, atlas.image.affine)
    loaded = load_language_model(run / "lm")
    scan = write_scan(loaded.model, loaded.processor, "An old person.", atlas.coordinates, seed=3)
    np.testing.assert_allclose(region_means(out, atlas).values, scan.values, atol=1e-5)
    assert cli.main([*argv[:-1], str(tmp_path / "scan.mgz"), "--atlas", str(atlas_path)]) == 2
    assert ".nii.gz" in capsys.readouterr().err
    argv[1] = str(run / "avq")
    assert cli.main([*argv, "--atlas", str(atlas_path)]) == 2
    assert "is a codec" in capsys.readouterr().err


def test_series_that_do_not_fit_the_atlas_are_not_painted(run, atlas_path):
    atlas = load_atlas(atlas_path)
    with pytest.raises(CohortError, match="6 regions of"):
        paint_series(load_cohort(run / "cohort").series("sim-00000").values, atlas, 2.0)
    with pytest.raises(CohortError, match="finite"):
        paint_series(np.full((3, 6), np.nan), atlas, 2.0)
    with pytest.raises(CohortError, match="GiB"):
        paint_series(np.zeros((20_000_000, 6), np.float32), atlas, 2.0)
