"""`cortexicon left-out-sites`: what a codec loses on scanners that it never saw in training.

One codec was trained with every site in its training part; others, with the same recipe, each
without some sites as a whole. A held-out scan is scored by the first, which knows its scanner, and
by the one that does not: the same windows of the same person, so that a noisier scanner cannot
pass for a loss. Sites whose scans differ in how well they can be coded make any other comparison
of two R2 meaningless.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cortexicon.cohorts import Cohort, load_split
from cortexicon.evaluation import EvaluationError, PairedR2, write_json
from cortexicon.inference import Checkpoint, SkippedScan, load_checkpoint, reconstruct_cohort

SEEN, UNSEEN = "site in training", "site left out of training"


class TrainedFold(NamedTuple):
    """A checkpoint, and whom it was fitted on.

    Attributes
    ----------
    checkpoint : Checkpoint
    fitted : set of str
        Subjects of its training and validation parts.
    held_out : list of str
        Subjects of all its other parts.
    """

    checkpoint: Checkpoint
    fitted: set[str]
    held_out: list[str]


def evaluate_left_out_sites(
    within: Path, left_out: Sequence[Path], cohort: Cohort, json_path: Path, batch_size: int
) -> dict[str, Any]:
    """Score held-out scans with and without their site in training; write and return the scores.

    Which split and fold a checkpoint was trained on is read from its run.json. Scored are scans at
    the codec's own sampling interval that neither checkpoint was fitted on.

    Parameters
    ----------
    within : pathlib.Path
        Checkpoint folder of the codec that was trained on scans of all sites.
    left_out : sequence of pathlib.Path
        Checkpoint folders of codecs whose held-out subjects are whole sites, each with other ones
        (folds of ``cortexicon split --scheme leave_sites_out``).
    cohort : Cohort
    json_path : pathlib.Path
        Receives the scores.
    batch_size : int
        Windows per forward pass.

    Raises
    ------
    EvaluationError
        A checkpoint without facts of its training, of another cohort or split; held-out sites that
        were trained on after all; or no scan that all can be judged by.
    """
    reference = _trained_fold(within, cohort)
    table, interval = cohort.participants, reference.checkpoint.codec.config.sampling_interval
    known_sites = set(table.loc[sorted(reference.fitted), "site"])
    scores, owner = PairedR2(), dict[str, str]()
    folds, skipped = [], dict[str, str]()
    for folder in left_out:
        fold = _trained_fold(folder, cohort)
        unseen = _unseen_sites(fold, cohort, folder)
        chosen = [
            subject
            for subject in reference.held_out
            if subject in set(fold.held_out)
            and table.loc[subject, "site"] in unseen & known_sites
            and abs(float(table.loc[subject, "tr"]) - interval) < 1e-6
        ]
        for subject in chosen:
            if subject in owner:
                raise EvaluationError(
                    f"{folder}: expected other sites than {owner[subject]} leaves out, found "
                    f"{table.loc[subject, 'site']} in both. Give each fold once."
                )
            owner[subject] = str(folder)
        if not chosen:
            raise EvaluationError(
                f"{folder}: expected scans at TR {interval:g} s of sites that it never saw and "
                f"{within} did, held out by both; found none. Its left-out sites: "
                f"{', '.join(sorted(unseen))}."
            )
        for system, one in ((SEEN, reference), (UNSEEN, fold)):
            _score(scores, system, one.checkpoint, cohort, chosen, batch_size, skipped)
        folds.append(
            {
                "checkpoint": str(folder),
                "sites": sorted(set(table.loc[chosen, "site"])),
                "num_fitted": len(fold.fitted),
                "num_scored": len(chosen),
            }
        )
    by_site: dict[str, dict[str, Any]] = {}
    sites = table.loc[scores.subject_ids, "site"]
    for site in sorted(set(sites)):
        subjects = [subject for subject in scores.subject_ids if sites[subject] == site]
        by_site[site] = {
            "num_subjects": len(subjects),
            **{system: scores.r2(system, subjects) for system in (SEEN, UNSEEN)},
        }
    result = {
        "systems": scores.results(),
        "difference": scores.difference(UNSEEN, SEEN),
        "by_site": by_site,
        "num_subjects": len(scores.subject_ids),
        "within": {"checkpoint": str(within), "num_fitted": len(reference.fitted)},
        "left_out_folds": folds,
        "command": shlex.join(["cortexicon", *sys.argv[1:]]),
        "cohort_hash": cohort.content_hash,
        "left_out_scans": skipped,
    }
    write_json(json_path, result)
    _print(result)
    return result


def _trained_fold(folder: Path, cohort: Cohort) -> TrainedFold:
    """The checkpoint of a folder with the parts of the fold that its run.json names."""
    checkpoint, path = load_checkpoint(folder), folder / "run.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        name, fold = facts["arguments"]["split"], facts["arguments"]["fold"]
        expected = facts["cohort_hash"], facts["split_hash"]
    except (FileNotFoundError, json.JSONDecodeError, KeyError) as error:
        raise EvaluationError(
            f"{path}: expected the facts of the training run, found {error!r}. Whom a checkpoint "
            "was trained on must be known here; copy the whole folder that training wrote."
        ) from error
    split = load_split(name, cohort)
    if (cohort.content_hash, split.hash) != expected:
        raise EvaluationError(
            f"{folder}: expected cohort {expected[0][:12]} and split {expected[1][:12]}, on which "
            f"it was trained, found {cohort.content_hash[:12]} and {split.hash[:12]} ({name}). "
            "Give the cohort of its training, and leave its split as it was."
        )
    parts = split[fold]
    fitted = {subject for part in ("train", "validation") for subject in parts[part]}
    held_out = [subject for subjects in parts.values() for subject in subjects]
    return TrainedFold(checkpoint, fitted, [one for one in held_out if one not in fitted])


def _unseen_sites(fold: TrainedFold, cohort: Cohort, folder: Path) -> set[str]:
    """Sites of which the fold was fitted on nobody."""
    sites = cohort.participants["site"]
    unseen = set(sites.loc[fold.held_out]) - set(sites.loc[sorted(fold.fitted)])
    if not unseen:
        raise EvaluationError(
            f"{folder}: expected a codec whose split leaves whole sites out, found one that was "
            "trained on scans of every site. Make the split with --scheme leave_sites_out."
        )
    return unseen


def _score(
    scores: PairedR2,
    system: str,
    checkpoint: Checkpoint,
    cohort: Cohort,
    subjects: list[str],
    batch_size: int,
    skipped: dict[str, str],
) -> None:
    """Add the scans of `subjects` under the name of a system."""
    left_out: list[SkippedScan] = []
    extractor = checkpoint.processor.feature_extractor
    for scan in reconstruct_cohort(
        checkpoint.codec, extractor, cohort, subjects, batch_size, left_out
    ):
        scores.add(system, scan.subject_id, scan.raw, scan.reconstruction, scan.region_mask)
    skipped.update({scan.subject_id: scan.reason for scan in left_out})


def _print(result: dict[str, Any]) -> None:
    """The two numbers, their difference, and the sites."""
    for row in result["systems"]:
        low, high = row["r2_interval"]
        print(f"{row['system']:<28}r2 {row['r2']:.3f} [{low:.3f}, {high:.3f}]")
    gap = result["difference"]
    low, high = gap["interval"]
    print(
        f"left out minus in training  {gap['difference']:+.3f} [{low:+.3f}, {high:+.3f}] on "
        f"{result['num_subjects']} scans of {len(result['by_site'])} sites"
    )
    for site, row in result["by_site"].items():
        print(f"  {site:<14}{row['num_subjects']:>4} {row[SEEN]:.3f} -> {row[UNSEEN]:.3f}")
    if result["left_out_scans"]:
        print(f"left out {len(result['left_out_scans'])}: {', '.join(result['left_out_scans'])}")
