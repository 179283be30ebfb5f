"""`cortexicon evaluate`: a checkpoint, a cohort and a split in; one JSON file of scores out."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cortexicon.cohorts import Cohort
from cortexicon.evaluation import (
    EvaluationError,
    evaluate_reconstruction,
    gaussian_reference,
    region_patch_baseline,
    run_baselines,
    score_clinical,
    tokenizer_baseline,
    write_json,
)
from cortexicon.evaluation.rendering_interpretation import INTERPRETATION
from cortexicon.inference import (
    Checkpoint,
    ScanReconstruction,
    SkippedScan,
    cohort_windows,
    reconstruct_cohort,
)

# Training scans for the mean connectivity matrix; more would not move it.
MAX_TRAINING_SCANS = 300
HELD_OUT = ("test", "test_sites")


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    cohort: Cohort,
    json_path: Path,
    parts: Mapping[str, Sequence[str]] | None,
    fold: int,
    baselines: bool,
    predictions_folder: Path,
    batch_size: int,
) -> dict[str, Any]:
    """Score the codec, and for a language model its clinical answers; write and return the scores.

    Parameters
    ----------
    checkpoint : Checkpoint
    cohort : Cohort
    json_path : pathlib.Path
        Receives the scores. Examples for the report go beside it, and with `baselines`
        ``tokenizer_baseline.json`` does too.
    parts : mapping of str to list of str, or None
        One fold of a split. Without it every recommended scan is scored, and the connectivity
        deviation, which needs training scans, is left out.
    fold : int
        Number of that fold, for the files of predictions.
    baselines : bool
        Also fit the baselines on the same fold.
    predictions_folder : pathlib.Path
        Receives one file per system and target.
    batch_size : int
        Windows per forward pass.

    Raises
    ------
    EvaluationError
        `baselines` without a split, or nothing to score.
    """
    if baselines and parts is None:
        raise EvaluationError(
            "baselines need training subjects: give --split FILE with --baselines."
        )
    fold_parts = {"test": _recommended(cohort)} if parts is None else parts
    scores = _score_codec(checkpoint, cohort, json_path, fold_parts, batch_size)
    if baselines:
        _score_tokenizer(checkpoint, cohort, json_path, fold_parts, scores)
    if checkpoint.model_type == "avq_lm":
        targets = [target["name"] for target in checkpoint.model.config.targets or []]
        files = _predict(checkpoint, cohort, fold_parts, fold, targets, predictions_folder)
        if baselines:
            files += run_baselines(cohort, fold_parts, targets, predictions_folder, fold)
        scores["clinical"] = score_clinical(files)
        if checkpoint.model.config.fmri_input == "codes":
            from cortexicon._interpretation import interpret

            interpret(checkpoint, cohort, fold_parts["test"], json_path.parent / INTERPRETATION)
    write_json(json_path, scores)
    _print_scores(scores)
    return scores


def _recommended(cohort: Cohort) -> list[str]:
    """Subjects whose scan nobody advised against."""
    table = cohort.participants
    if "recommended" in table:
        table = table[table["recommended"].astype(bool)]
    return [str(subject) for subject in table.index]


def _score_codec(
    checkpoint: Checkpoint,
    cohort: Cohort,
    json_path: Path,
    parts: Mapping[str, Sequence[str]],
    batch_size: int,
) -> dict[str, Any]:
    """R2, connectivity kept, usage and spectrum of the codec."""
    config = checkpoint.codec.config
    skipped: list[SkippedScan] = []

    def scans(subjects: Sequence[str]) -> Iterator[ScanReconstruction]:
        if not subjects:
            return iter(())
        return reconstruct_cohort(
            checkpoint.codec,
            checkpoint.processor.feature_extractor,
            cohort,
            list(subjects),
            batch_size,
            skipped,
        )

    training = list(parts.get("train", ()))
    training = training[:: max(1, len(training) // MAX_TRAINING_SCANS)]
    scores = evaluate_reconstruction(
        scans(training),
        scans(parts["test"]),
        num_codes=config.num_codes,
        window_seconds=config.window_length * config.sampling_interval,
        tokens_per_window=checkpoint.tokens_per_window,
        regions=cohort.regions,
        items_test_sites=scans(parts.get("test_sites", ())),
        groups=_native_interval(checkpoint, cohort),
        examples_path=json_path.parent / "reconstruction_examples.npz",
    )
    scores["usage"] = scores["codebook"]["usage"]
    scores["command"] = shlex.join(["cortexicon", *sys.argv[1:]])
    scores["atlas"] = cohort.atlas
    scores["checkpoint"] = checkpoint.folder.name
    scores["codebook_fingerprint"] = checkpoint.codec.codebook_fingerprint()
    scores["cohort_hash"] = cohort.content_hash
    scores["left_out"] = {scan.subject_id: scan.reason for scan in skipped}
    return scores


def _native_interval(checkpoint: Checkpoint, cohort: Cohort) -> dict[str, str]:
    """Scans acquired at the codec's own interval, scored apart too: nothing was resampled."""
    interval = checkpoint.codec.config.sampling_interval
    same = cohort.participants["tr"].sub(interval).abs() < 1e-6
    return {str(subject): f"TR {interval:g} s" for subject in same.index[same]}


def _score_tokenizer(
    checkpoint: Checkpoint,
    cohort: Cohort,
    json_path: Path,
    parts: Mapping[str, Sequence[str]],
    scores: dict[str, Any],
) -> None:
    """The non-learned tokenizer and the Gaussian reference: same bits, same windows."""
    config = checkpoint.codec.config
    extractor = checkpoint.processor.feature_extractor
    training = list(cohort_windows(extractor, cohort, list(parts["train"])))
    scores["gaussian_reference_r2"] = gaussian_reference(
        (windows for _, windows in training),
        scores["tokens_per_window"] * scores["bits_per_token"],
    )
    common: dict[str, Any] = {
        "num_codes": config.num_codes,
        "window_seconds": config.window_length * config.sampling_interval,
        "groups": _native_interval(checkpoint, cohort),
    }
    held_out = cohort_windows(extractor, cohort, list(parts["test"]))
    if config.token_layout == "grid":
        # Spatial PCA cannot spend a number of tokens that grows with the regions.
        result = region_patch_baseline(
            training, held_out, patch_length=config.patch_length, **common
        )
    else:
        result = tokenizer_baseline(
            training,
            held_out,
            # Four patches a window, whatever the codec's: with 128 tokens the published row.
            patch_length=config.window_length // 4,
            tokens_per_window=config.tokens_per_window,
            **common,
        )
    write_json(json_path.parent / "tokenizer_baseline.json", result)


def _predict(
    checkpoint: Checkpoint,
    cohort: Cohort,
    parts: Mapping[str, Sequence[str]],
    fold: int,
    targets: list[str],
    folder: Path,
) -> list[Path]:
    """Files of predictions of the language model, one per target."""
    from cortexicon.inference.predict import predict_cohort

    held_out = {
        str(subject): part for part in HELD_OUT for subject in parts.get(part, ())
    }  # subject to part
    table = predict_cohort(
        checkpoint.folder, cohort, subject_ids=list(held_out), targets=targets
    ).dropna(subset=["y"])
    table = table.assign(fold=fold, part=table["subject_id"].astype(str).map(held_out))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for target, rows in table.groupby("target"):
        files.append(folder / f"language-model_{target}_fold{fold}.csv")
        rows.to_csv(files[-1], index=False)
    return files


def _print_scores(scores: dict[str, Any]) -> None:
    """The numbers a person wants to see first."""
    print(f"r2 {scores['r2']:.3f} on {scores['num_subjects']} scans")
    kept = scores["connectivity"]
    line = f"connectivity kept {kept['full']:.3f}"
    if "deviation" in kept:
        line += f", deviation {kept['deviation']:.3f}, training mean alone "
        line += f"{kept['training_mean_alone']:.3f}"
    print(line)
    print(f"usage {scores['usage']:.1%} of {scores['codebook']['num_codes']} codes")
    if scores["left_out"]:
        print(f"left out {len(scores['left_out'])} scans: {', '.join(scores['left_out'])}")
    for target, result in scores.get("clinical", {}).items():
        keys = ("mae", "r") if result["kind"] == "number" else ("balanced_accuracy", "auc")
        for part, scored in result["parts"].items():
            print(f"{target}, {part} ({scored['num_subjects']} subjects)")
            for system, values in scored["systems"].items():
                numbers = "  ".join(
                    f"{key} {values[key]:.3f}" for key in keys if values.get(key) is not None
                )
                print(f"  {system:<40}{numbers}")
