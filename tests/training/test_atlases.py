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
from cortexicon.training.atlases import Turns, atlas_at, paired_loss, prepare_atlases
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


@pytest.fixture(scope="module", params=[0.0, 0.5], ids=["alone", "paired"])
def pairing(request):
    """The weight of `paired_decoding`."""
    return request.param


@pytest.fixture(scope="module")
def both(run, coarse, pairing, tmp_path_factory):
    """Checkpoint of the run's codec trained on both atlases."""
    folder = tmp_path_factory.mktemp("both") / "avq"
    words = [f"output={folder}", f"more_cohorts=[{coarse}]", f"paired_decoding={pairing}"]
    assert avq.main([str(run / "avq.yaml"), *words]) == 0
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


@pytest.fixture(scope="module")
def atlases(run, coarse, parts):
    cohort, extractor = extractor_of(run)
    return prepare_atlases(cohort, [coarse], parts, extractor, quiet=True)


def test_paired_windows_are_the_same_moments_of_the_same_people(atlases):
    turns = Turns(atlases, seed=0, paired=True)
    for step in range(2):
        batch = draw_windows(turns.scans_at(step), 40, 6, [0, 0, step])
        own, other = turns.own(batch, step)
        fine, small = (own, other) if turns.at(step) == 0 else (other, own)
        assert fine["input_values"].shape == (6, 40, 28)
        assert small["input_values"].shape == (6, 40, 14)
        for part, one in ((fine, atlases[0]), (small, atlases[1])):
            places = torch.from_numpy(one.training.region_coordinates)[None]
            assert torch.equal(part["region_coordinates"], places)
        means = fine["input_values"].view(6, 40, 14, 2).mean(3)
        # The coarse region is the mean of two, z-scored anew; windows of others would not fit.
        joined = torch.stack([means.flatten(0, 1), small["input_values"].flatten(0, 1)])
        for region in range(14):
            assert torch.corrcoef(joined[:, :, region])[0, 1] > 0.9
    assert {turns.at(step) for step in range(2)} == {0, 1}


def test_without_pairing_a_batch_is_of_one_atlas(atlases):
    turns = Turns(atlases, seed=0, paired=False)
    for step in range(2):
        batch = draw_windows(turns.scans_at(step), 40, 4, [0, 0, step])
        own, other = turns.own(batch, step)
        assert own is batch
        assert other == {}
        assert batch["input_values"].shape[2] == (28, 14)[turns.at(step)]


def test_the_paired_loss_is_the_error_of_decoding_elsewhere_and_reaches_the_encoder(both, atlases):
    model = AVQModel.from_pretrained(both).eval()
    turns = Turns(atlases, seed=0, paired=True)
    batch, other = turns.own(draw_windows(turns.scans_at(0), 40, 4, [0, 0, 0]), 0)
    other["region_mask"][:, :3] = False
    out = model(**batch)
    decoded = model.decode(out.codes, other["region_coordinates"], batch["region_coordinates"])
    error = (decoded.reconstruction - other["input_values"])[:, :, 3:].square().mean()
    assert paired_loss(model, out, batch, other).item() == pytest.approx(error.item(), rel=1e-4)
    model.train()
    paired_loss(model, model(**batch), batch, other).backward()
    for weight in (model.encoder_out.weight, model.read_code.weight):
        assert weight.grad.abs().max() > 0


def test_pairing_needs_the_same_scans(atlases):
    with pytest.raises(TrainingError, match=r"found 0 of them and 12"):
        Turns(atlases[:1], seed=0, paired=True)
    cut = [values[:-1] for values in atlases[1].training.series]
    other = atlases[1]._replace(training=replace(atlases[1].training, series=cut))
    with pytest.raises(TrainingError, match=r"one scan in all cohorts, found \[\d+, \d+\]"):
        Turns([atlases[0], other], seed=0, paired=True)
    few = replace(
        atlases[1].training,
        subject_ids=atlases[1].training.subject_ids[2:],
        series=atlases[1].training.series[2:],
        region_masks=atlases[1].training.region_masks[2:],
    )
    joint = Turns([atlases[0], atlases[1]._replace(training=few)], 0, paired=True).scans_at(0)
    assert joint.subject_ids == atlases[0].training.subject_ids[2:]
    np.testing.assert_array_equal(joint.series[0][:, :28], atlases[0].training.series[2])
    np.testing.assert_array_equal(joint.series[0][:, 28:], few.series[0])


def test_both_atlases_are_trained_on_and_validated(run, both, pairing):
    lines = [json.loads(line) for line in (both / "training_log.jsonl").read_text().splitlines()]
    assert {line["atlas"] for line in lines if "loss" in line} == {0, 1}
    for line in lines:
        assert ("paired_loss" in line) == (pairing > 0 and "loss" in line)
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
    assert not torch.equal(alone.read_code.weight, together.read_code.weight)


def test_no_held_out_scan_of_the_other_atlas_moves_a_weight(run, parts, both, pairing, tmp_path):
    held_out = [s for name, subjects in parts.items() if name != "train" for s in subjects]
    scans = [halved(scan) for scan in load_cohort(run / "cohort")]
    scans = [
        noise_like(scan, number) if scan.subject_id in held_out else scan
        for number, scan in enumerate(scans)
    ]
    scans.append(replace(noise_like(scans[0], 99), subject_id="of nobody's split"))
    save_cohort(cohort_from_series(scans), tmp_path / "cohort")
    config, output = str(run / "avq.yaml"), tmp_path / "avq"
    words = [f"more_cohorts=[{tmp_path / 'cohort'}]", f"paired_decoding={pairing}"]
    assert avq.main([config, f"output={output}", *words]) == 0
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


def test_a_resumed_run_of_two_atlases_is_bit_equal(
    run, coarse, both, pairing, tmp_path, monkeypatch
):
    config = tmp_path / "both.yaml"
    lines = [f"base: {run / 'avq.yaml'}", f"more_cohorts: [{coarse}]"]
    config.write_text("\n".join([*lines, f"paired_decoding: {pairing}"]), encoding="utf-8")
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
