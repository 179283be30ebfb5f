"""`train encoder-lm`: three encoders under one flag, its controls, a run that resumes bit-equal."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from cortexicon.cohorts import load_cohort, load_split
from cortexicon.evaluation.predictions import read_predictions
from cortexicon.modeling import ConfigurationError, FMRIPrefixLM, FMRIPrefixLMConfig
from cortexicon.training import TrainingError, encoder_lm, frozen_encoders, mae, vlm

TARGETS = [
    {"name": "age", "kind": "number", "minimum": 15, "maximum": 85, "question": "Age?"},
    {"name": "sex", "kind": "class", "question": "Sex?"},
]
ARMS = ("avq", "mae", "vision")


def write(path, values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def encoders(run, tmp_path_factory):
    """Folder of a tiny trained encoder of each kind."""
    folder = tmp_path_factory.mktemp("encoders")
    common = {
        "cohort": str(run / "cohort"),
        "split": str(run / "split.json"),
        "max_steps": 1,
        "batch_size": 2,
        "cpu": True,
    }
    small = {
        "window_length": 40,
        "patch_length": 10,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "decoder_hidden_size": 8,
        "decoder_intermediate_size": 8,
        "decoder_num_attention_heads": 2,
        "position_features": 8,
    }
    values = {**common, "output": str(folder / "mae"), "model": small}
    assert mae.main([write(folder / "mae.yaml", values)]) == 0
    values = {
        **common,
        "output": str(folder / "vision"),
        "family": "qwen2_vl",
        "tiny": True,
        "targets": TARGETS[1:],
        "image_size": [56, 56],
        "window_length": 40,
        "prompts_per_scan": 1,
    }
    assert vlm.main([write(folder / "vision.yaml", values)]) == 0
    return {"avq": run / "avq", "mae": folder / "mae", "vision": folder / "vision"}


@pytest.fixture
def start(run, encoders, tmp_path):
    """`start(arm, *overrides, name=...)` runs the command and returns its folder."""

    def main(arm, *overrides, name="lm"):
        values = {
            "output": str(tmp_path / name),
            "cohort": str(run / "cohort"),
            "split": str(run / "split.json"),
            "encoder": arm,
            "checkpoint": str(encoders[arm]),
            "text_model": str(run / "text"),
            "targets": TARGETS,
            "windows_per_scan": 2,
            "prefix_tokens": 4 if arm == "mae" else 0,
            "projector_hidden_size": 16,
            "max_steps": 6,
            "batch_size": 4,
            "warmup_steps": 1,
            "log_steps": 2,
            "eval_steps": 3,
            "save_steps": 2,
            "cpu": True,
        }
        assert encoder_lm.main([write(tmp_path / f"{name}.yaml", values), *overrides]) == 0
        return tmp_path / name

    return main


@pytest.mark.parametrize("arm", ARMS)
def test_each_encoder_answers_about_held_out_subjects(start, run, arm):
    folder = start(arm)
    rows = read_predictions([folder / "predictions.csv"])
    split = load_split(run / "split.json", load_cohort(run / "cohort"))[0]
    for part in ("validation", "test", "test_sites"):
        for target in ("age", "sex"):
            mine = rows[(rows["part"] == part) & (rows["target"] == target)]
            assert sorted(mine["subject_id"]) == sorted(split.get(part, []))
    model = AutoModel.from_pretrained(folder)
    assert type(model) is FMRIPrefixLM
    assert model.config.encoder == arm
    assert not (folder / "state").exists()


@pytest.mark.parametrize("arm", ARMS)
def test_features_depend_on_the_scan_and_repeat(encoders, run, arm):
    cohort = load_cohort(run / "cohort")
    encoder = frozen_encoders.load_encoder(arm, str(encoders[arm]), cohort, torch.device("cpu"), {})
    subjects = load_split(run / "split.json", cohort)[0]["test"][:2]
    first, second = (
        frozen_encoders.encode_features(encoder, cohort, subjects, 2, "test", True)
        for _ in range(2)
    )
    assert first.values.shape[:2] == (2, 2)
    assert np.array_equal(first.values, second.values)
    assert np.abs(first.values[0] - first.values[1]).max() > 1e-3
    assert np.abs(first.values[:, 0] - first.values[:, 1]).max() > 1e-3


def test_an_interrupted_run_resumes_bit_equal(start, monkeypatch):
    whole = start("avq", name="whole")

    class Stopped(Exception):
        pass

    def save_then_stop(self, model, optimizer, step, seconds):
        original(self, model, optimizer, step, seconds)
        if step == 4:
            raise Stopped

    original = encoder_lm.Run.save_state
    with monkeypatch.context() as patched:
        patched.setattr(encoder_lm.Run, "save_state", save_then_stop)
        with pytest.raises(Stopped):
            start("avq", name="again")
    again = start("avq", "resume=true", name="again")
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (whole / "predictions.csv").read_bytes() == (again / "predictions.csv").read_bytes()


def test_the_question_alone_gives_everybody_one_answer(start):
    folder = start("avq", "control=text_only")
    rows = read_predictions([folder / "predictions_readouts.csv"])
    for _, same in rows[rows["target"] == "age"].groupby(["system", "part"]):
        assert np.ptp(same["y_hat"].astype(float)) < 1e-6


def test_controls_change_the_features_as_they_say():
    values = np.random.default_rng(0).normal(2.0, 3.0, (40, 2, 5, 4)).astype(np.float16)
    features = frozen_encoders.ScanFeatures([f"s{k}" for k in range(40)], values, {})
    other = encoder_lm.controlled(features, "other_subject", 0).values
    own = [np.array_equal(a, b) for a, b in zip(values, other, strict=True)]
    assert not any(own)
    assert {a.tobytes() for a in values} == {a.tobytes() for a in other}
    noise = encoder_lm.controlled(features, "random_features", 0).values.astype(float)
    assert noise.shape == values.shape
    np.testing.assert_allclose(noise.mean(), values.astype(float).mean(), atol=0.3)
    np.testing.assert_allclose(noise.std(), values.astype(float).std(), rtol=0.1)
    assert abs(np.corrcoef(noise.ravel(), values.astype(float).ravel())[0, 1]) < 0.1
    assert encoder_lm.controlled(features, "none", 0).values is values


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["encoder=clip"], "encoder must be one of avq, mae, vision"),
        (["control=blank"], "control must be one of"),
        (["checkpoint=nowhere"], "cortexicon train avq CONFIG"),
        (["targets=[]"], "targets is empty"),
        (["text_model=nowhere"], "no folder of a language model"),
    ],
)
def test_what_cannot_work_is_refused(start, overrides, message):
    with pytest.raises(TrainingError, match=message):
        start("avq", *overrides)


def test_a_frozen_language_model_does_not_move(start, run):
    folder = start("avq", "freeze_language_model=true")
    before = load_file(run / "text" / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    names = [name for name in before if f"language_model.{name}" in after]
    assert len(names) > 5
    assert all(torch.equal(before[name], after[f"language_model.{name}"]) for name in names)


def test_the_prefix_has_the_scale_of_the_embeddings(run):
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(run / "text", dtype=torch.float32)
    model = FMRIPrefixLM.from_language_model(lm, feature_width=7, prefix_tokens=3)
    prefix = model.projector(1000 * torch.randn(5, 11, 7))
    assert prefix.shape == (5, 3, 32)
    assert float(prefix.detach().std()) == pytest.approx(
        float(lm.get_input_embeddings().weight.std()), rel=0.3
    )


def test_a_wrong_configuration_is_named():
    with pytest.raises(ConfigurationError, match="one of avq, mae, vision"):
        FMRIPrefixLMConfig(encoder="clip")
    with pytest.raises(ConfigurationError, match="multiple of projector_heads"):
        FMRIPrefixLM(FMRIPrefixLMConfig(projector_hidden_size=30))
