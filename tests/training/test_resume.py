"""A run that was killed and resumed ends as one that was not."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cortexicon.training import TrainingError, avq, callbacks, lm


def stopped_at(monkeypatch, script, step):
    """Make `script` die as if by Ctrl-C when it begins step `step`, counted from 0."""
    real = callbacks.learning_rate_at

    def rate(now, *others):
        if now == step:
            raise KeyboardInterrupt
        return real(now, *others)

    monkeypatch.setattr(script, "learning_rate_at", rate)


def train_in_two_parts(monkeypatch, script, config, output, step):
    """Run `script` into `output`, kill it at `step`, and resume it; the step that was saved."""
    with monkeypatch.context() as patch:
        stopped_at(patch, script, step)
        with pytest.raises(KeyboardInterrupt):
            script.main([config, f"output={output}"])
    saved = json.loads((output / "state" / "state.json").read_text(encoding="utf-8"))["step"]
    assert script.main([config, f"output={output}", "resume=true"]) == 0
    return saved


def assert_same_log(one, two):
    """Two logs hold the same lines but for the clock, and no line twice."""

    def lines(folder):
        text = (folder / "training_log.jsonl").read_text(encoding="utf-8")
        found = [json.loads(line) for line in text.splitlines()]
        for line in found:
            del line["seconds"]
        return found

    assert lines(one) == lines(two)
    kinds = [(line["step"], "loss" in line) for line in lines(two)]
    assert len(set(kinds)) == len(kinds)


# Steps are saved every 4: after 4, before the codebook's start at 6, and after 8.
# Lines up to step 6 and 10 are in the log when the run dies, so the resumed run must drop some.
@pytest.mark.parametrize(("step", "saved"), [(7, 4), (11, 8)])
def test_a_resumed_codec_is_bit_equal(run, tmp_path, monkeypatch, step, saved):
    config = str(run / "avq.yaml")
    assert train_in_two_parts(monkeypatch, avq, config, tmp_path / "avq", step) == saved
    whole = load_file(run / "avq" / "model.safetensors")
    resumed = load_file(tmp_path / "avq" / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert any("codebook" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert_same_log(run / "avq", tmp_path / "avq")
    assert not (tmp_path / "avq" / "state").exists()


# Validation comes every 5 steps: after 8, the best score so far is known from the log alone.
@pytest.mark.parametrize(("step", "saved"), [(7, 4), (9, 8)])
def test_a_resumed_language_model_is_bit_equal(run, tmp_path, monkeypatch, step, saved):
    config = str(run / "lm.yaml")
    assert train_in_two_parts(monkeypatch, lm, config, tmp_path / "lm", step) == saved
    whole = load_file(run / "lm" / "model.safetensors")
    resumed = load_file(tmp_path / "lm" / "model.safetensors")
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert_same_log(run / "lm", tmp_path / "lm")


def test_a_run_killed_before_its_first_state_begins_again(run, tmp_path, monkeypatch):
    config, output = str(run / "avq.yaml"), tmp_path / "avq"
    with monkeypatch.context() as patch:
        stopped_at(patch, avq, 3)
        with pytest.raises(KeyboardInterrupt):
            avq.main([config, f"output={output}"])
    assert not (output / "state").exists()
    avq.main([config, f"output={output}", "resume=true"])
    assert_same_log(run / "avq", output)


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    callbacks.save_state(tmp_path, model, optimizer, step=5, seconds=1.5)
    (tmp_path / "state").rename(tmp_path / "state.old")
    (tmp_path / "state.new").mkdir()
    again = torch.nn.Linear(2, 2)
    fresh = torch.optim.AdamW(again.parameters())
    assert callbacks.load_state(tmp_path, again, fresh) == (5, 1.5, 0)
    assert torch.equal(again.weight, model.weight)
    moments = [optimizer.state_dict()["state"][0][key] for key in ("exp_avg", "exp_avg_sq")]
    restored = [fresh.state_dict()["state"][0][key] for key in ("exp_avg", "exp_avg_sq")]
    assert all(torch.equal(a, b) for a, b in zip(moments, restored, strict=True))


def test_resuming_under_other_arguments_is_refused(run, tmp_path, monkeypatch):
    config, output = str(run / "avq.yaml"), tmp_path / "avq"
    with monkeypatch.context() as patch:
        stopped_at(patch, avq, 7)
        with pytest.raises(KeyboardInterrupt):
            avq.main([config, f"output={output}"])
    changes = ["learning_rate=0.5", "batch_size=4"]
    with pytest.raises(TrainingError) as error:
        avq.main([config, f"output={output}", "resume=true", *changes])
    lines = str(error.value).splitlines()
    assert str(output) in lines[0]
    before = yaml.safe_load((run / "avq.yaml").read_text(encoding="utf-8"))
    assert lines[1:] == [
        f"  batch_size: {before['batch_size']} -> 4",
        f"  learning_rate: {avq.AVQArguments.learning_rate} -> 0.5",
    ]
