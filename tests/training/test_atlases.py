"""One codec from two parcellations of the same people; nobody held out is ever trained on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cortexicon.cohorts import cohort_from_series, load_cohort, load_split, save_cohort
from cortexicon.modeling import AVQModel
from cortexicon.tokenization import AVQFeatureExtractor
from cortexicon.training import TrainingError, avq
from cortexicon.training.atlases import atlas_at, prepare_atlases
from cortexicon.training.collators import draw_windows

from .test_resume import train_in_two_parts

ATLAS = "halves"


def halved(scan, name=ATLAS):
    """A scan in a coarser atlas: neighbouring regions averaged two by two."""
    return replace(
        scan,
        values=scan.values.reshape(len(scan.values), -1, 2).mean(2),
        labels=[f"{name} {number}" for number in range(len(scan.labels) // 2)],
        coordinates=scan.coordinates.reshape(-1, 2, 3).mean(1),
        atlas=name,
    )


def noise_like(scan, seed):
    """Another scan of the same shape."""
    values = np.random.default_rng(seed).normal(size=scan.values.shape)
    return replace(scan, values=values.astype(np.float32))


@pytest.fixture(scope="module")
def parts(run):
    return load_split(run / "split.json")[0]


@pytest.fixture(scope="module")
def coarse(run, tmp_path_factory):
    """Folder of the run's cohort in the coarser atlas."""
    scans = [halved(scan) for scan in load_cohort(run / "cohort")]
    return save_cohort(cohort_from_series(scans), tmp_path_factory.mktemp("coarse") / "cohort")


@pytest.fixture(scope="module")
def both(run, coarse, tmp_path_factory):
    """Checkpoint of the run's codec trained on both atlases."""
    folder = tmp_path_factory.mktemp("both") / "avq"
    config = str(run / "avq.yaml")
    assert avq.main([config, f"output={folder}", f"more_cohorts=[{coarse}]"]) == 0
    return folder


def extractor_of(run):
    model = AVQModel.from_pretrained(run / "avq")
    cohort = load_cohort(run / "cohort")
    return cohort, AVQFeatureExtractor(
        window_length=model.config.window_length,
        patch_length=model.config.patch_length,
        atlas=cohort.atlas,
        region_labels=cohort.labels,
        region_coordinates=cohort.coordinates,
    )


def test_every_atlas_has_one_turn_a_round_and_none_owns_the_even_steps():
    for count in (1, 2, 3):
        turns = [atlas_at(5, step, count) for step in range(60 * count)]
        for first in range(0, len(turns), count):
            assert sorted(turns[first : first + count]) == list(range(count))
        assert {atlas_at(5, step, count) for step in range(0, 2000, 20)} == set(range(count))
        assert turns == [atlas_at(5, step, count) for step in range(60 * count)]
    assert [atlas_at(5, step, 2) for step in range(40)] != [atlas_at(6, s, 2) for s in range(40)]


def test_parts_are_those_of_the_primary_split(run, coarse, parts):
    cohort, extractor = extractor_of(run)
    first, second = prepare_atlases(cohort, [coarse], parts, extractor, quiet=True)
    assert (first.atlas, second.atlas) == (cohort.atlas, ATLAS)
    for one in (first, second):
        assert one.training.subject_ids == parts["train"]
        assert one.validation.subject_ids == parts["validation"]
    batch = draw_windows(second.training, 40, 4, [0, 0, 0])
    assert batch["input_values"].shape == (4, 40, 14)
    expected = cohort.coordinates.reshape(-1, 2, 3).mean(1)
    np.testing.assert_allclose(batch["region_coordinates"][0].numpy(), expected, atol=1e-4)


def test_both_atlases_are_trained_on_and_validated(run, both):
    lines = [json.loads(line) for line in (both / "training_log.jsonl").read_text().splitlines()]
    assert {line["atlas"] for line in lines if "loss" in line} == {0, 1}
    held_out = [line for line in lines if "eval_r2" in line]
    assert [line["step"] for line in held_out] == [10, 12]
    for line in held_out:
        assert line["eval_r2"] != line[f"eval_r2_{ATLAS}"]
        assert 0 < line[f"eval_usage_{ATLAS}"] <= 1
    facts = json.loads((both / "run.json").read_text())
    assert facts["atlases"] == {"simulated28": 12, ATLAS: 12}
    assert len(facts["more_cohorts_hash"]) == 64
    # The checkpoint is of the primary atlas, and did learn from the other.
    assert AVQModel.from_pretrained(both).config.atlas == "simulated28"
    alone, together = (AVQModel.from_pretrained(folder) for folder in (run / "avq", both))
    assert not torch.equal(alone.from_text.weight, together.from_text.weight)


def test_no_held_out_scan_of_the_other_atlas_moves_a_weight(run, parts, both, tmp_path):
    held_out = [s for name, subjects in parts.items() if name != "train" for s in subjects]
    scans = [halved(scan) for scan in load_cohort(run / "cohort")]
    scans = [
        noise_like(scan, number) if scan.subject_id in held_out else scan
        for number, scan in enumerate(scans)
    ]
    scans.append(replace(noise_like(scans[0], 99), subject_id="of nobody's split"))
    save_cohort(cohort_from_series(scans), tmp_path / "cohort")
    config, output = str(run / "avq.yaml"), tmp_path / "avq"
    argv = [config, f"output={output}", f"more_cohorts=[{tmp_path / 'cohort'}]"]
    assert avq.main(argv) == 0
    expected = load_file(both / "model.safetensors")
    found = load_file(output / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    # Its validation scans were noise, so it is not that they were never looked at.
    last = [
        json.loads(folder.read_text().splitlines()[-1])
        for folder in (output / "training_log.jsonl", both / "training_log.jsonl")
    ]
    assert last[0]["eval_r2"] == last[1]["eval_r2"]
    assert last[0][f"eval_r2_{ATLAS}"] != last[1][f"eval_r2_{ATLAS}"]


def test_a_resumed_run_of_two_atlases_is_bit_equal(run, coarse, both, tmp_path, monkeypatch):
    config = tmp_path / "both.yaml"
    config.write_text(f"base: {run / 'avq.yaml'}\nmore_cohorts: [{coarse}]\n", encoding="utf-8")
    assert train_in_two_parts(monkeypatch, avq, str(config), tmp_path / "avq", 7) == 4
    expected = load_file(both / "model.safetensors")
    found = load_file(tmp_path / "avq" / "model.safetensors")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def strangers(scan):
    return replace(scan, subject_id=f"x{scan.subject_id}")


def moved(scan):
    return replace(scan, site="ELSEWHERE") if scan.subject_id.endswith("3") else scan


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (None, "simulated28", "another parcellation than 'simulated28'"),
        (strangers, ATLAS, "none of its 24 participants is in the train part"),
        (moved, ATLAS, r"site 'ELSEWHERE' for sim-00003.*3 such"),
    ],
)
def test_a_cohort_that_cannot_join_is_refused(run, parts, tmp_path, change, name, message):
    cohort, extractor = extractor_of(run)
    scans = [halved(scan, name) for scan in cohort]
    save_cohort(cohort_from_series(map(change, scans) if change else scans), tmp_path / "cohort")
    with pytest.raises(TrainingError, match=message) as caught:
        prepare_atlases(cohort, [tmp_path / "cohort"], parts, extractor, quiet=True)
    assert str(tmp_path / "cohort") in str(caught.value)
