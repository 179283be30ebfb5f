"""`train mae`: pre-training, heads, predictions, and a resumed run that ends bit-equal."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from transformers import AutoFeatureExtractor, AutoModel

from cortexicon.cohorts import load_cohort, load_split
from cortexicon.evaluation.predictions import read_predictions
from cortexicon.training import TrainingError, heads, mae

TARGETS = [
    {"name": "age", "kind": "number", "minimum": 15, "maximum": 85},
    {"name": "sex", "kind": "class"},
]


@pytest.fixture
def values(run, tmp_path):
    return {
        "output": str(tmp_path / "mae"),
        "cohort": str(run / "cohort"),
        "split": str(run / "split.json"),
        "targets": TARGETS,
        "model": {
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
            "pooling": "regions",
        },
        "max_steps": 6,
        "batch_size": 4,
        "warmup_steps": 2,
        "log_steps": 2,
        "eval_steps": 3,
        "save_steps": 2,
        "cpu": True,
    }


def start(tmp_path, values, *overrides):
    import yaml

    path = tmp_path / "mae.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return mae.main([str(path), *overrides])


def test_a_run_leaves_a_model_and_predictions_of_held_out_subjects(run, values, tmp_path):
    assert start(tmp_path, values) == 0
    folder = tmp_path / "mae"
    rows = read_predictions([folder / "predictions.csv"])
    split = load_split(run / "split.json", load_cohort(run / "cohort"))[0]
    for part in ("test", "test_sites"):
        for target in ("age", "sex"):
            mine = rows[(rows["part"] == part) & (rows["target"] == target)]
            assert sorted(mine["subject_id"]) == sorted(split.get(part, []))
    ages = rows[rows["target"] == "age"]["y_hat"].astype(float)
    assert ages.between(15, 85).all()
    assert set(rows[rows["target"] == "sex"]["y_hat"]) <= {"F", "M"}

    model = AutoModel.from_pretrained(folder)
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    cohort = load_cohort(run / "cohort")
    names, features = mae.pooled_features(model, extractor, cohort, split["test"], 2, "test")
    again = model.read_out(torch.from_numpy(features))["age"].detach().numpy()
    mine = rows[(rows["part"] == "test") & (rows["target"] == "age")].set_index("subject_id")
    np.testing.assert_allclose(again, mine.loc[names, "y_hat"].astype(float), rtol=1e-5)
    assert not (folder / "state").exists()


def test_an_interrupted_run_resumes_bit_equal(values, tmp_path, monkeypatch):
    assert start(tmp_path, values) == 0
    whole = load_file(tmp_path / "mae" / "model.safetensors")
    values["output"] = str(tmp_path / "again")
    saved = []

    class Stopped(Exception):
        pass

    def save_then_stop(self, model, optimizer, step, seconds):
        saved.append(step)
        original(self, model, optimizer, step, seconds)
        if step == 4:
            raise Stopped

    original = mae.Run.save_state
    with monkeypatch.context() as patched:
        patched.setattr(mae.Run, "save_state", save_then_stop)
        with pytest.raises(Stopped):
            start(tmp_path, values)
    assert start(tmp_path, values, "resume=true") == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert saved == [2, 4]
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    first, second = (
        (tmp_path / name / "predictions.csv").read_bytes() for name in ("mae", "again")
    )
    assert first == second


def test_permuted_labels_change_the_heads_only(values, tmp_path):
    start(tmp_path, values)
    values["output"] = str(tmp_path / "control")
    start(tmp_path, values, "control=permuted_labels")
    real, control = (
        load_file(tmp_path / name / "model.safetensors") for name in ("mae", "control")
    )
    different = {name for name in real if not torch.equal(real[name], control[name])}
    assert different
    assert all(name.startswith("heads.") for name in different)


def test_an_unknown_control_is_refused(values, tmp_path):
    with pytest.raises(TrainingError, match="control must be one of none, permuted_labels"):
        start(tmp_path, values, "control=blank")


def test_heads_are_ridge_regression():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 8)) * rng.uniform(0.5, 3, 8) + 2
    ages = pd.Series(np.exp(3 + 0.1 * rows[:, 0] + 0.05 * rng.normal(size=60)))
    ages[5] = np.nan
    target = {"name": "age", "kind": "number", "minimum": 5, "maximum": 90}
    weight, bias = heads.fit_head(rows, ages, target, seed=0)
    known = ages.notna().to_numpy()
    found = (rows @ weight.numpy()[0] + bias.numpy())[known]
    scaled = (rows - rows[known].mean(0)) / rows[known].std(0)
    wanted = np.log(ages[known])
    # Of the penalties offered, one must give just this.
    errors = [
        np.abs(
            Ridge(alpha=penalty * 8).fit(scaled[known], wanted).predict(scaled[known]) - found
        ).max()
        for penalty in heads.PENALTIES
    ]
    assert min(errors) < 1e-4
    assert np.corrcoef(found, wanted)[0, 1] > 0.9


def test_classes_weigh_the_same():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(100, 5))
    sex = pd.Series(np.where(np.arange(100) < 90, "M", "F"))
    rows[90:, 0] += 3
    target = {"name": "sex", "kind": "class", "classes": ["F", "M"]}
    weight, bias = heads.fit_head(rows, sex, target, seed=0)
    scores = rows @ weight.numpy().T + bias.numpy()
    found = np.array(["F", "M"])[scores.argmax(1)]
    assert (found[90:] == "F").mean() > 0.7
    assert (found[:90] == "M").mean() > 0.7


def test_an_encoder_of_an_earlier_run_is_read_out_as_it_was(values, tmp_path):
    start(tmp_path, values)
    later = {**values, "encoder": str(tmp_path / "mae"), "model": {}, "resume": True}
    tables = {}
    for control in ("none", "other_subject"):
        folder = tmp_path / f"read_{control}"
        start(tmp_path, {**later, "output": str(folder), "control": control})
        tables[control] = pd.read_csv(folder / "predictions.csv")
        again = load_file(folder / "model.safetensors")
        whole = load_file(tmp_path / "mae" / "model.safetensors")
        assert all(torch.equal(whole[n], again[n]) for n in whole if not n.startswith("heads."))
    whole = pd.read_csv(tmp_path / "mae" / "predictions.csv")
    pd.testing.assert_frame_equal(tables["none"], whole)
    # Everybody answers for somebody else.
    ages = [table[table["target"] == "age"]["y_hat"].astype(float) for table in tables.values()]
    assert not np.allclose(*ages)
    with pytest.raises(TrainingError, match="holds no masked autoencoder"):
        start(tmp_path, {**later, "output": str(tmp_path / "x"), "encoder": str(tmp_path / "no")})
