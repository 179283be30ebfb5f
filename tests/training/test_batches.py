"""Batches that are not finite leave no trace; accumulated ones do what one large one does."""

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from cortexicon.cohorts import load_cohort
from cortexicon.modeling import AVQModel
from cortexicon.training import TrainingError, atlases, avq, callbacks, collators, faults, lm, text


def spoil(monkeypatch, values, which=1):
    """Put `values` into a part of the first `which` training scans after they were checked."""
    real = collators.prepare_scans
    spoiled = []

    def prepare_scans(cohort, extractor, subject_ids, name, quiet=False):
        scans = real(cohort, extractor, subject_ids, name, quiet)
        if name == "training":
            for series in scans.series[:which]:
                series[:, 3] = values
            spoiled.extend(scans.subject_ids[:which])
        return scans

    monkeypatch.setattr(atlases, "prepare_scans", prepare_scans)
    return spoiled


def refusals(caught):
    return [str(one.message) for one in caught if one.category is faults.RefusedBatchWarning]


def log_of(folder):
    return [json.loads(line) for line in callbacks.log_lines(folder / "training_log.jsonl")]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_subject_that_is_not_finite_is_named_and_left_out(run, tmp_path, monkeypatch, value):
    spoiled = spoil(monkeypatch, value)
    seen = []
    real = AVQModel.forward

    def forward(self, input_values, *values, **keywords):
        seen.append(bool(torch.isfinite(input_values).all()))
        return real(self, input_values, *values, **keywords)

    monkeypatch.setattr(AVQModel, "forward", forward)
    arguments = [str(run / "avq.yaml"), "accumulation_steps=2"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert avq.main([*arguments, f"output={tmp_path / 'whole'}"]) == 0
    # Said once, not in every step, and never shown to the model.
    assert [text.partition("again: ")[2] for text in refusals(caught)] == [
        f"the data of {spoiled[0]} hold NaN or infinite values."
    ]
    assert all(seen)
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())

    # What is drawn instead follows from the step alone: a resumed run draws the same.
    def rate(step, *others):
        if step == 9:
            raise KeyboardInterrupt
        return callbacks.learning_rate_at(step, *others)

    with monkeypatch.context() as patch:
        patch.setattr(avq, "learning_rate_at", rate)
        with pytest.warns(faults.RefusedBatchWarning), pytest.raises(KeyboardInterrupt):
            avq.main([*arguments, f"output={tmp_path / 'two'}"])
    with pytest.warns(faults.RefusedBatchWarning):
        assert avq.main([*arguments, f"output={tmp_path / 'two'}", "resume=true"]) == 0
    resumed = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in weights.items())


def test_a_spoiled_value_under_the_mask_is_no_matter():
    guard = faults.StepGuard(Accelerator(cpu=True), 0, ["a", "b"])
    batch = {
        "input_values": torch.zeros(2, 4, 3).index_fill_(2, torch.tensor([1]), torch.nan),
        "region_mask": torch.tensor([[True, False, True]] * 2),
        "scan": torch.tensor([1, 0]),
    }
    assert not guard.refuses([batch])
    batch["region_mask"][1] = True
    with pytest.warns(faults.RefusedBatchWarning, match="data of a hold"):
        assert guard.refuses([batch])
    assert guard.excluded == {0}
    assert guard.attempt == 1


def test_training_stops_with_the_cause_when_nobody_is_left(run, tmp_path, monkeypatch):
    spoiled = spoil(monkeypatch, np.nan, which=100)
    with (
        pytest.warns(faults.RefusedBatchWarning),
        pytest.raises(TrainingError, match="Step 1: 5 batches in a row were refused") as error,
    ):
        avq.main([str(run / "avq.yaml"), f"output={tmp_path}"])
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + faults.MOST_TRIES + 1
    assert any(subject in lines[1] for subject in spoiled)


def bad_loss(monkeypatch, tries):
    """Make the reconstruction of some tries, counted from 0, NaN after the codebook was updated."""
    real, count = AVQModel._decode, 0

    def decode(self, *values):
        nonlocal count
        decoded = real(self, *values)
        if self.training:
            if count in tries:
                decoded = (
                    decoded
                    * torch.where(torch.arange(len(decoded)) == 2, torch.nan, 1.0)[:, None, None]
                )
            count += 1
        return decoded

    monkeypatch.setattr(AVQModel, "_decode", decode)


def test_a_loss_that_is_nan_leaves_no_trace(run, tmp_path, monkeypatch):
    """Steps 0 to 11, the codebook starts at 6: the first tries of 3, 8 and 9 go wrong."""
    states = []
    real = faults.StepGuard.judge

    def judge(guard, *values):
        real(guard, *values)
        model = [module for module in made if module.training][-1]
        states.append((guard.step, guard.accepted, model.quantizer.code_count.clone()))

    made = []
    build = avq.build_model

    def build_model(*values):
        made.append(build(*values))
        return made[-1]

    monkeypatch.setattr(avq, "build_model", build_model)
    monkeypatch.setattr(faults.StepGuard, "judge", judge)
    bad_loss(monkeypatch, {3, 9, 11})
    with pytest.warns(faults.RefusedBatchWarning) as caught:
        assert avq.main([str(run / "avq.yaml"), f"output={tmp_path}"]) == 0
    assert [step for step, accepted, _ in states if not accepted] == [3, 8, 9]
    assert [step for step, accepted, _ in states if accepted] == list(range(12))
    for (_, _, before), (_, accepted, after) in itertools.pairwise(states):
        assert accepted or torch.equal(before, after)
    subjects = set(load_cohort(run / "cohort").subject_ids)
    for message in refusals(caught):
        assert "the model's output for" in message
        assert message.split(" for ")[1].split(" is ")[0] in subjects
    assert all(np.isfinite(line["loss"]) for line in log_of(tmp_path) if "loss" in line)


def test_a_loss_that_stays_nan_stops_training_and_the_state_is_whole(run, tmp_path, monkeypatch):
    bad_loss(monkeypatch, set(range(9, 100)))
    with (
        pytest.warns(faults.RefusedBatchWarning),
        pytest.raises(TrainingError, match=r"Step 10: 5 batches.*\n.*output for.*(\n.*)*lower"),
    ):
        avq.main([str(run / "avq.yaml"), f"output={tmp_path}"])
    monkeypatch.undo()
    assert avq.main([str(run / "avq.yaml"), f"output={tmp_path}", "resume=true"]) == 0
    for name, value in load_file(run / "avq" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], value), name


@pytest.mark.parametrize(("script", "stage"), [(text, "text"), (lm, "lm")])
def test_a_gradient_that_is_not_finite_is_dropped(run, tmp_path, monkeypatch, script, stage):
    real, count = Accelerator.clip_grad_norm_, 0

    def clip(self, parameters, *values):
        nonlocal count
        parameters = list(parameters)
        if count == 4:
            next(p for p in parameters if p.grad is not None).grad.fill_(torch.inf)
        count += 1
        return real(self, parameters, *values)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    with pytest.warns(
        faults.RefusedBatchWarning, match=r"Step 5: .*norm of its gradient (inf|nan)"
    ):
        assert script.main([str(run / f"{stage}.yaml"), f"output={tmp_path}"]) == 0
    assert count == 11  # ten steps, one of them twice
    weights = load_file(tmp_path / "model.safetensors")
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


# ------------------------------------------------------------------ accumulation


def test_shares_of_a_draw_are_the_draw():
    scans = collators.PreparedScans(
        [f"s{k}" for k in range(20)],
        [np.full((50, 3), k, dtype=np.float32) for k in range(20)],
        [np.ones(3, dtype=bool)] * 20,
        {},
        np.zeros((3, 3), dtype=np.float32),
    )
    whole = collators.draw_windows(scans, 40, 12, [5, 0, 7, 0])
    parts = [collators.draw_windows(scans, 40, 3, [5, 0, 7, 0], share, 4) for share in range(4)]
    for key in ("input_values", "scan"):
        assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
    assert (whole["input_values"][:, 0, 0] == whole["scan"]).all()
    without = collators.draw_windows(scans, 40, 12, [5, 0, 7, 1], 0, 1, excluded={0, 3, 19})
    assert not {0, 3, 19} & set(without["scan"].tolist())
    assert len(set(without["scan"].tolist())) == 12


def test_four_batches_of_two_are_one_of_eight(run, tmp_path):
    """The same windows, the same mean gradient, so the same trajectory up to rounding.

    As long as nothing is quantised: from its start on the codebook is updated by every batch, and
    the second of a step meets another one than the first. Text is drawn anew for every batch.
    """
    arguments = [str(run / "avq.yaml"), "adversary=false", "log_steps=1", "codebook_start=0.75"]
    arguments.append("closed_form_start=false")  # it takes a number of batches, whatever their size
    trajectories, updates = [], []
    for parts in (1, 4):
        output = tmp_path / str(parts)
        sizes = [f"batch_size={8 // parts}", f"accumulation_steps={parts}"]
        assert avq.main([*arguments, *sizes, f"output={output}"]) == 0
        trajectories.append([line for line in log_of(output) if "loss" in line])
        updates.append(int(load_file(output / "model.safetensors")["quantizer.updates"]))
    one, four = trajectories
    assert [line["step"] for line in one] == list(range(1, 13))
    for a, b in zip(one[:9], four[:9], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3), a["step"]
    # That it is no accident: other windows give another loss.
    assert min(abs(a["loss"] / b["loss"] - 1) for a, b in itertools.pairwise(one[:9])) > 1e-3
    assert updates == [3, 4 * 3]
