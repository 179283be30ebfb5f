"""Train a codec with the plain `Trainer` of transformers; no training script of ours takes part.

    python examples/train_with_trainer.py --output runs/plain      # a minute on one core

A simulated cohort becomes a `datasets.Dataset` of windows, `Trainer` trains an `AVQModel` on it,
and the saved checkpoint turns a held-out scan into codes and back.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, List, Value
from transformers import AutoModel, Trainer, TrainingArguments

import cortexicon  # noqa: F401  (AutoModel learns of the codec)
from cortexicon.cohorts import Cohort, simulate_cohort
from cortexicon.modeling import AVQConfig, AVQModel
from cortexicon.tokenization import AVQFeatureExtractor


def windows_of(cohort: Cohort, subject_ids: list[str], extractor: AVQFeatureExtractor) -> Dataset:
    """One window of each person: then no batch holds a person twice, nor is a code one's own."""
    rows = {"subject_id": [], "input_values": [], "region_mask": []}
    for subject in subject_ids:
        scan = cohort.series(subject)
        inputs = extractor(scan.values, tr=scan.tr, window_starts=[0], return_tensors="np")
        rows["subject_id"].append(subject)
        rows["input_values"].append(inputs["input_values"][0])
        rows["region_mask"].append(inputs["region_mask"][0])
    shape = rows["input_values"][0].shape
    features = Features(
        {
            "subject_id": Value("string"),  # no argument of the model: Trainer leaves it out
            "input_values": Array2D(shape, "float32"),  # (time, regions)
            "region_mask": List(Value("bool"), length=shape[1]),
        }
    )
    return Dataset.from_dict(rows, features=features).with_format("torch")


def main(argv: list[str] | None = None) -> None:
    """Simulate, train, save, load, encode, decode."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--subjects", type=int, default=200)
    arguments = parser.parse_args(argv)

    cohort = simulate_cohort(num_subjects=arguments.subjects, num_regions=48, seed=0)
    subjects = np.random.default_rng(0).permutation(cohort.subject_ids).tolist()
    held_out, training = subjects[: len(subjects) // 5], subjects[len(subjects) // 5 :]
    config = AVQConfig(
        atlas=cohort.atlas,
        region_labels=list(cohort.labels),
        region_coordinates=cohort.coordinates.tolist(),
        window_length=80,
        patch_length=10,
        num_latents=8,
        num_codes=256,
        num_connectivity_codes=0,
        code_dim=16,
        hidden_size=64,
        intermediate_size=128,
        encoder_layers=2,
        decoder_layers=2,
        # Nothing is quantised for a third of the steps; then the codebook starts by itself.
        codebook_start_step=arguments.steps // 3,
    )
    extractor = AVQFeatureExtractor(
        sampling_interval=config.sampling_interval,
        window_length=config.window_length,
        patch_length=config.patch_length,
        atlas=config.atlas,
        region_labels=config.region_labels,
        region_coordinates=config.region_coordinates,
    )
    evaluation = windows_of(cohort, held_out, extractor)
    torch.manual_seed(0)
    trainer = Trainer(
        model=AVQModel(config),
        args=TrainingArguments(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            learning_rate=2e-3,
            warmup_steps=20,
            weight_decay=0.01,
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to="none",
            label_names=["input_values"],  # the target is the input: evaluation returns a loss
        ),
        train_dataset=windows_of(cohort, training, extractor),
        eval_dataset=evaluation,
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    extractor.save_pretrained(arguments.output)

    codec = AutoModel.from_pretrained(arguments.output)
    values, mask = evaluation[:]["input_values"], evaluation[:]["region_mask"]
    with torch.no_grad():
        codes = codec.encode(values, region_mask=mask).codes
        decoded = codec.decode(codes).reconstruction
    error = ((decoded - values).square() * mask[:, None]).sum()
    r2 = 1 - float(error / (values.square() * mask[:, None]).sum())
    print(
        f"{len(values)} held-out windows of {codes.shape[1]} codes: loss {loss:.3f}, R2 {r2:.3f}, "
        f"{len(codes.unique())} of {config.num_codes} codes used -> {arguments.output}"
    )


if __name__ == "__main__":
    main()
