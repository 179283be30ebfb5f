"""The `Trainer` of transformers alone trains a codec: no code of the training room takes part."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModel, Trainer, TrainingArguments

from cortexicon.cohorts import simulate_cohort
from cortexicon.modeling import AVQConfig, AVQModel
from cortexicon.tokenization import AVQFeatureExtractor

STEPS, START = 30, 12


@pytest.fixture(scope="module")
def cohort():
    return simulate_cohort(num_subjects=20, num_regions=28, seed=1, progress=False)


@pytest.fixture(scope="module")
def config(cohort):
    return AVQConfig(
        atlas=cohort.atlas,
        region_labels=list(cohort.labels),
        region_coordinates=cohort.coordinates.tolist(),
        window_length=40,
        patch_length=10,
        num_latents=4,
        num_codes=48,
        num_connectivity_codes=0,
        code_dim=8,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=2,
        encoder_layers=1,
        decoder_layers=1,
        num_components=6,
        position_features=16,
        projection_hidden_size=16,
        dropout=0.1,
        text_width=24,
        revival_interval=3,
        codebook_start_step=START,
    )


@pytest.fixture(scope="module")
def dataset(cohort, config):
    """A window of each of 20 people, with a column that the model does not know."""
    extractor = AVQFeatureExtractor(
        sampling_interval=config.sampling_interval,
        window_length=config.window_length,
        patch_length=config.patch_length,
        region_labels=config.region_labels,
        region_coordinates=config.region_coordinates,
    )
    rows = []
    for subject in cohort.subject_ids:
        scan = cohort.series(subject)
        inputs = extractor(scan.values, tr=scan.tr, window_starts=[0], return_tensors="np")
        inputs["region_mask"][0, len(rows) % 28] = False
        rows.append(
            {
                "subject_id": subject,
                "input_values": inputs["input_values"][0],
                "region_mask": inputs["region_mask"][0],
            }
        )
    return Dataset.from_list(rows).with_format("torch")


def trainer_of(config, dataset, folder, **arguments):
    """A plain Trainer; nothing here but what a user of transformers writes."""
    torch.manual_seed(5)
    values = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,  # 3 batches an epoch, the last one of 4 windows
        "learning_rate": 3e-3,
        "save_steps": 8,
        "logging_steps": 1,
        "label_names": ["input_values"],
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        **arguments,
    }
    return Trainer(
        model=AVQModel(config),
        args=TrainingArguments(output_dir=str(folder), **values),
        train_dataset=dataset,
        eval_dataset=dataset,
    )


@pytest.fixture(scope="module")
def trained(config, dataset, tmp_path_factory):
    """(trainer, folder) after 30 steps with checkpoints at 8, 16, 24 and 30."""
    folder = tmp_path_factory.mktemp("plain")
    trainer = trainer_of(config, dataset, folder)
    trainer.train()
    return trainer, folder


def test_the_loss_falls_before_and_after_the_codebook_starts(trained):
    losses = [entry["loss"] for entry in trained[0].state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[START - 4 : START]) < 0.95 * np.mean(losses[:2])
    assert np.mean(losses[-4:]) < np.mean(losses[START + 1 : START + 5])


def test_the_codebook_started_and_is_used(trained, dataset):
    model = trained[0].model
    assert model.quantizer.initialized
    assert model.quantizer.updates == STEPS  # counted before the start, and after it
    codes = model.eval().encode(dataset[:]["input_values"]).codes
    assert len(codes.unique()) > model.config.num_codes / 3


def test_evaluation_returns_the_loss(trained, dataset):
    trainer, _ = trained
    found = trainer.evaluate()["eval_loss"]
    model = trainer.model.eval()
    batches = [dataset[first : first + 8] for first in range(0, len(dataset), 8)]
    with torch.no_grad():
        losses = [
            model(b["input_values"], region_mask=b["region_mask"]).loss.repeat(
                len(b["region_mask"])
            )
            for b in batches
        ]
    assert found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("step", [8, 16])  # before the codebook starts, and after; within an epoch
def test_a_resumed_run_ends_on_the_same_bits(trained, config, dataset, tmp_path, step):
    whole, folder = trained
    resumed = trainer_of(config, dataset, tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.state.global_step == STEPS
    expected = whole.model.state_dict()
    assert expected.keys() == resumed.model.state_dict().keys()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_saved_model_gives_the_same_codes(trained, dataset, tmp_path):
    trainer, _ = trained
    trainer.save_model(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, AVQModel)
    values, mask = dataset[:]["input_values"], dataset[:]["region_mask"]
    with torch.no_grad():
        mine = trainer.model.eval().encode(values, region_mask=mask)
        other = loaded.encode(values, region_mask=mask)
    assert torch.equal(mine.codes, other.codes)
    assert torch.equal(mine.text_embeds, other.text_embeds)
    assert loaded.codebook_fingerprint() == trainer.model.codebook_fingerprint()


def test_accumulated_gradients_are_those_of_one_batch(config, dataset, tmp_path):
    # Of equal halves, and before anything is quantised: then the mean of means is the mean. Nothing
    # may start by itself either, as it would from the first batch, whose size differs.
    norms = []
    still = {"dropout": 0.0, "codebook_start_step": None}
    for size, accumulate in ((16, 1), (8, 2)):
        quiet = AVQConfig.from_dict({**config.to_dict(), **still})
        rows = dataset.select(range(16)).remove_columns("region_mask")
        trainer = trainer_of(
            quiet,
            rows,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            save_strategy="no",
        )
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_the_example_runs(repository, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(repository / "examples" / "train_with_trainer.py"),
            *("--output", str(tmp_path / "plain"), "--steps", "24", "--subjects", "48"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "9 held-out windows of 64 codes: loss" in done.stdout
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    assert (tmp_path / "plain" / "preprocessor_config.json").is_file()
