"""The comparison of extraction: both systems read the same files and agree.

Nothing here depends on how long anything takes.
"""

import json

import numpy as np
import pytest

from cortexicon.cohorts.atlases import load_atlas
from cortexicon.cohorts.images import load_image
from cortexicon.evaluation import EvaluationError, extraction_speed

SIZES = {"shape": (15, 18, 15), "volumes": 12, "regions": 8, "repeats": 1}


@pytest.fixture
def in_this_process(monkeypatch):
    """Measure here; a process for each takes seconds to import its libraries."""
    monkeypatch.setattr(
        extraction_speed,
        "_in_own_process",
        lambda system, image, atlas: extraction_speed.measure_one(system, image, atlas),
    )


def test_both_systems_agree_on_every_file(tmp_path, in_this_process):
    results = extraction_speed.compare_extraction(tmp_path, **SIZES)
    assert list(results["files"]) == ["int16.nii", "int16.nii.gz", "float32.nii", "float32.nii.gz"]
    for file in results["files"].values():
        assert file["largest_relative_difference"] < 1e-6
        assert file["faster"] > 0
        for one in file["systems"].values():
            assert one["peak_bytes"] >= one["imported_bytes"] > 0
    left = sorted(path.suffix for path in tmp_path.iterdir())
    assert left == [".gz", ".npy", ".npy"]  # the atlas and the last values; the images are gone
    table = extraction_speed.render_extraction(json.loads(json.dumps(results)))
    assert table.count("| float32.nii.gz |") == 3
    assert "| mark | plain at least 5, gz at least 1.5 |" in table


def test_the_files_are_what_they_say(tmp_path):
    path, signal = extraction_speed.make_atlas(tmp_path / "atlas.nii.gz", (15, 18, 15), 8)
    atlas = load_atlas(path)
    assert len(atlas) == 8
    image = load_image(extraction_speed.make_image(tmp_path / "bold.nii", signal, 12, "int16"))
    data = image.get_fdata()
    assert data.shape == (15, 18, 15, 12)
    assert np.array_equal(image.affine, atlas.image.affine)
    assert ((data.std(axis=-1) > 0) == (signal > 0)).all()
    assert (signal[np.asanyarray(atlas.image.dataobj) > 0] > 0).all()
    assert 0.5 < (data.std(axis=-1)[signal > 0] / signal[signal > 0]).mean() * 100 < 1.5


def test_sizes_that_make_no_sense_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="at least 1"):
        extraction_speed.compare_extraction(tmp_path, **SIZES | {"repeats": 0})
    with pytest.raises(EvaluationError, match="no room for 80000 regions"):
        extraction_speed.compare_extraction(tmp_path, **SIZES | {"regions": 80000})


def test_a_measurement_that_fails_says_why(tmp_path):
    missing = tmp_path / "absent.nii"
    with pytest.raises(EvaluationError, match=r"region_means on absent\.nii failed") as error:
        extraction_speed._in_own_process("region_means", missing, missing)
    assert "expected a NIfTI file, found nothing" in str(error.value)


def test_a_wrong_size_on_the_command_line_needs_no_traceback(capsys):
    assert extraction_speed.main(["--volumes", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_every_measurement_is_a_process_of_its_own(tmp_path, capsys):
    out = tmp_path / "figures.json"
    given = ["--volumes", "10", "--repeats", "1", "--types", "int16", "--folder", str(tmp_path)]
    assert extraction_speed.main([*given, "--json", str(out)]) == 0
    assert "| int16.nii.gz |" in capsys.readouterr().out
    figures = json.loads(out.read_text(encoding="utf-8"))
    for file in figures["files"].values():
        assert file["largest_relative_difference"] < 1e-6
        # A process that had imported both systems would hold as much for either.
        assert (
            file["systems"]["region_means"]["imported_bytes"]
            < (file["systems"]["NiftiLabelsMasker"]["imported_bytes"])
        )
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
