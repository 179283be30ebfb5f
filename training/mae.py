"""`cortexicon train mae CONFIG`: a masked autoencoder, then linear heads on its features.

The run in one look: every step takes one window from each of `batch_size` training scans, hides
75 % of its region x patch tokens, and scores how they are filled. Then the encoder is frozen,
features of `windows_per_scan` windows are averaged, and one ridge regression per target is fitted
on training and validation subjects (its penalty by inner folds, as the connectivity baselines).
With `encoder`, one trained before is read out and nothing else is trained.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from cortexicon.cohorts import Cohort
from cortexicon.inference.predict import window_starts
from cortexicon.modeling import FMRIMAEConfig, FMRIMAEModel
from cortexicon.tokenization import AVQFeatureExtractor

from .answers import others_of, permuted_labels, write_cost, write_table
from .arguments import TrainingError, load_arguments
from .callbacks import Run, TrainingLog, begin_run, learning_rate_at, remove_state, write_run_facts
from .collators import (
    PreparedScans,
    augment,
    draw_windows,
    load_fold,
    prepare_scans,
    whole_windows,
)
from .faults import StepGuard, written_whole
from .heads import fit_head, head_rows
from .prompts import checked_targets

CONTROLS = ("none", "permuted_labels", "other_subject")


@dataclass
class MAEArguments:
    """Arguments of `cortexicon train mae`; training/configs/abide_mae.yaml says what each does."""

    output: str
    cohort: str
    split: str
    targets: list = field(default_factory=list)
    fold: int = 0
    model: dict = field(default_factory=dict)
    encoder: str = ""
    system: str = "masked autoencoder"
    control: str = "none"
    predictions: str = ""
    cost: str = ""
    windows_per_scan: int = 2
    flip_sign: bool = True
    reverse_time: bool = True
    region_dropout: float = 0.0
    max_steps: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup_steps: int = 30
    mixed_precision: str = "no"
    log_steps: int = 10
    eval_steps: int = 100
    eval_windows: int = 64
    save_steps: int = 100
    seed: int = 0
    cpu: bool = False
    resume: bool = False


def build_model(arguments: MAEArguments, cohort: Cohort, targets) -> FMRIMAEModel:
    """An untrained model for the cohort's parcellation, with a head for each target."""
    return FMRIMAEModel(
        FMRIMAEConfig(
            atlas=cohort.atlas,
            region_labels=list(cohort.labels),
            region_coordinates=cohort.coordinates.tolist(),
            targets=targets,
            **arguments.model,
        )
    )


def load_encoder(folder: str, targets: list) -> FMRIMAEModel:
    """A model of an earlier run, with untrained heads for the targets."""
    if not (Path(folder) / "model.safetensors").is_file():
        raise TrainingError(
            f"{folder} holds no masked autoencoder. Train it first, without encoder."
        )
    model = FMRIMAEModel.from_pretrained(folder)
    model.set_targets(targets)
    return model


@torch.inference_mode()
def explained(model: FMRIMAEModel, scans: PreparedScans, limit: int, batch_size: int) -> float:
    """Share of the hidden tokens' variance that is filled right, on whole windows; same masks."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    error = total = 0.0
    for batch in whole_windows(scans, model.config.window_length, batch_size, limit):
        tokens = batch["region_mask"].shape[1] * model.config.num_patches
        noise = torch.rand(len(batch["region_mask"]), tokens, generator=generator)
        batch = {key: value.to(model.device) for key, value in batch.items()}
        out = model(**batch, noise=noise.to(model.device))
        count = out.mask.sum()
        error += float(out.loss * count)
        patches = batch["input_values"].transpose(1, 2)
        patches = patches.unflatten(2, (-1, model.config.patch_length))
        total += float(patches.square().mean(-1)[out.mask].sum())
    model.train()
    return 1.0 - error / total


@torch.inference_mode()
def pooled_features(
    model: FMRIMAEModel,
    extractor: AVQFeatureExtractor,
    cohort: Cohort,
    subjects: list[str],
    windows: int,
    name: str,
    precision: str = "no",
) -> tuple[list[str], np.ndarray]:
    """Subjects with a scan long enough, and their features, float32 (subjects, feature_width)."""
    scans = prepare_scans(cohort, extractor, subjects, name)
    places = torch.from_numpy(scans.region_coordinates)[None].to(model.device)
    length = model.config.window_length
    rows = []
    for series, mask in zip(scans.series, scans.region_masks, strict=True):
        starts = window_starts(len(series), length, 1, windows).ravel()
        batch = torch.from_numpy(np.stack([series[s : s + length] for s in starts]))
        present = torch.from_numpy(mask).expand(len(batch), -1).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            found = model.encode(batch.to(model.device), places, region_mask=present)
        rows.append(found.pooled.float().mean(0).cpu().numpy())
    return scans.subject_ids, np.stack(rows)


def main(argv: list[str]) -> int:
    """Train the masked autoencoder; `argv` is CONFIG followed by key=value overrides."""
    arguments = load_arguments(MAEArguments, argv)
    if arguments.control not in CONTROLS:
        raise TrainingError(
            f"control must be one of {', '.join(CONTROLS)}, found {arguments.control!r}."
        )
    with begin_run(arguments, arguments.mixed_precision) as run:
        return train(arguments, run)


def train(arguments: MAEArguments, run: Run) -> int:
    """The run in `arguments.output`, which is claimed; the exit code."""
    accelerator, output = run.accelerator, run.output
    main_process = accelerator.is_main_process
    cohort, split, parts = load_fold(arguments)
    fitted = parts["train"] + parts["validation"]
    targets = checked_targets(arguments.targets, cohort.participants.loc[fitted])
    if arguments.encoder:
        model = load_encoder(arguments.encoder, targets)
        arguments.max_steps = 0
    else:
        model = build_model(arguments, cohort, targets)
    if accelerator.device.type == "cpu":  # see modeling/layers_avq.py, eager_attention
        model.set_attn_implementation("eager")
    config = model.config
    extractor = AVQFeatureExtractor(
        sampling_interval=config.sampling_interval,
        window_length=config.window_length,
        patch_length=config.patch_length,
        atlas=cohort.atlas,
        region_labels=config.region_labels,
        region_coordinates=config.region_coordinates,
    )
    quiet = not main_process
    scans = prepare_scans(cohort, extractor, parts["train"], "training", quiet)
    validation = prepare_scans(cohort, extractor, parts["validation"], "validation", quiet)
    heads = {id(parameter) for parameter in model.heads.parameters()}
    trained = [p for p in model.parameters() if id(p) not in heads]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": arguments.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
    )
    facts = {
        "cohort_hash": cohort.content_hash,
        "split_hash": split.hash,
        "parameters": sum(p.numel() for p in trained),
        "training_scans": len(scans),
        "refused_scans": {**scans.refused, **validation.refused},
        "targets": targets,
        "processes": accelerator.num_processes,
    }
    resumed = run.begin("mae", arguments, facts, model, optimizer)
    log = TrainingLog(output, main_process, resumed)
    model, optimizer = accelerator.prepare(model, optimizer)
    raw_model: FMRIMAEModel = accelerator.unwrap_model(model)
    model.train()

    for step in (bar := run.steps(resumed.step, arguments.max_steps, "train mae")):
        torch.manual_seed(
            (arguments.seed * 1_000_003 + step) * 64 + accelerator.process_index  # the masks
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(
                step, arguments.learning_rate, arguments.warmup_steps, arguments.max_steps
            )
        guard = StepGuard(accelerator, step, scans.subject_ids, warned=run.warned)
        while not guard.accepted:
            batch = draw_windows(
                scans,
                config.window_length,
                arguments.batch_size,
                [arguments.seed, 0, step, guard.attempt],
                accelerator.process_index,
                accelerator.num_processes,
                guard.excluded,
            )
            if guard.refuses([batch]):
                continue
            whose = batch.pop("scan")
            seed = [arguments.seed, 3, step, accelerator.process_index]
            batch = augment(
                batch, seed, arguments.flip_sign, arguments.reverse_time, arguments.region_dropout
            )
            out = model(**{key: value.to(accelerator.device) for key, value in batch.items()})
            guard.watch(out.reconstruction, whose)
            accelerator.backward(out.loss)
            gradient = accelerator.clip_grad_norm_(trained, 1.0)
            guard.judge(out.loss, gradient, optimizer)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % arguments.log_steps == 0 or done == arguments.max_steps:
            log.write(done, loss=out.loss, grad_norm=gradient, lr=optimizer.param_groups[0]["lr"])
            bar.set_postfix(loss=f"{out.loss.item():.3f}", refresh=False)
        if (done % arguments.eval_steps == 0 or done == arguments.max_steps) and main_process:
            score = explained(raw_model, validation, arguments.eval_windows, arguments.batch_size)
            log.write(done, eval_explained=score)
        # The last state too: the heads take minutes, and a kill there must not cost the steps.
        due = done % arguments.save_steps == 0 or done == arguments.max_steps
        if stop := run.end_step(done, due, raw_model, optimizer.optimizer, log.seconds):
            return stop

    accelerator.wait_for_everyone()
    if main_process:
        raw_model.eval()
        path = Path(arguments.predictions or output / "predictions.csv")
        if targets:
            read_out(arguments, raw_model, extractor, cohort, parts, path)
        with written_whole(output) as folder:
            raw_model.save_pretrained(folder)
            extractor.save_pretrained(folder)
        score = explained(raw_model, validation, arguments.eval_windows, arguments.batch_size)
        tokens = config.num_patches * len(cohort.labels) * arguments.windows_per_scan
        write_cost(arguments.cost, facts["parameters"], tokens)
        write_run_facts(
            output, "mae", arguments, seconds=log.seconds, eval_explained=score, **facts
        )
        remove_state(output)
        print(
            f"Masked autoencoder in {output}: {score:.3f} of the hidden tokens' variance explained "
            "on validation" + (f"; predictions in {path}" if targets else "")
        )
    return 0


def read_out(
    arguments: MAEArguments,
    model: FMRIMAEModel,
    extractor: AVQFeatureExtractor,
    cohort: Cohort,
    parts: dict[str, list[str]],
    path: Path,
) -> None:
    """Fit the heads into the model, and write what they say of the held-out subjects."""

    def features(subjects: list[str], name: str) -> tuple[list[str], np.ndarray]:
        subjects, rows = pooled_features(
            model,
            extractor,
            cohort,
            subjects,
            arguments.windows_per_scan,
            name,
            arguments.mixed_precision,
        )
        if arguments.control == "other_subject":
            others = others_of(subjects, arguments.seed)
            rows = rows[[subjects.index(others[subject]) for subject in subjects]]
        return subjects, rows

    people = cohort.participants
    subjects, rows = features(parts["train"] + parts["validation"], "training")
    truth = people
    if arguments.control == "permuted_labels":
        truth = permuted_labels(people, subjects, arguments.seed)
    for head, target in zip(model.heads, model.config.targets or [], strict=True):
        weight, bias = fit_head(rows, truth.loc[subjects, target["name"]], target, arguments.seed)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
    tables = []
    for part in ("test", "test_sites"):
        if not parts.get(part):
            continue
        subjects, rows = features(parts[part], part)
        with torch.no_grad():
            found = model.read_out(torch.from_numpy(rows).to(model.device))
        tables += [
            head_rows(
                found[target["name"]],
                target,
                subjects,
                people,
                system=arguments.system,
                fold=arguments.fold,
                part=part,
            )
            for target in model.config.targets
        ]
    write_table(path, pd.concat(tables, ignore_index=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
