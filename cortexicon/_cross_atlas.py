"""`cortexicon cross-atlas`: encode one parcellation, decode another, against plain ways there."""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cortexicon.cohorts import Cohort
from cortexicon.evaluation import CrossAtlas, EvaluationError, ScanPair, write_json
from cortexicon.inference import (
    Checkpoint,
    ScanReconstruction,
    SkippedScan,
    cohort_windows,
    decode_windows,
    fit_to_atlas,
    reconstruct_cohort,
)


def evaluate_cross_atlas(
    checkpoint: Checkpoint,
    source: Cohort,
    target: Cohort,
    parts: Mapping[str, Sequence[str]],
    json_path: Path,
    batch_size: int,
) -> dict[str, Any]:
    """Score all ways from the source's regions to the target's; write and return the scores.

    Only scans acquired at the codec's own interval serve: nothing is resampled.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its codec reads both parcellations by their coordinates.
    source, target : Cohort
        The same scans in two atlases.
    parts : mapping of str to list of str
        A fold of a split of the source: `train` and `validation` are fitted on, `test` is scored.
    json_path : pathlib.Path
        Receives the scores.
    batch_size : int
        Windows per forward pass.

    Raises
    ------
    EvaluationError
        Scans that are not the same in both cohorts, or a part without a scan.
    """
    codec, skipped = checkpoint.codec, dict[str, str]()
    of_source = fit_to_atlas(checkpoint, source, any_atlas=True)
    of_target = fit_to_atlas(checkpoint, target, any_atlas=True)
    subjects = {
        part: _same_scans(source, target, parts[part], codec.config.sampling_interval, skipped)
        for part in ("train", "validation", "test")
    }
    if not all(subjects.values()):
        counts = ", ".join(f"{part} {len(found)}" for part, found in subjects.items())
        raise EvaluationError(
            f"{target.path or target}: expected scans of every part in both cohorts at TR "
            f"{codec.config.sampling_interval:g} s, found {counts}. Use a split of the source "
            "cohort, and a target cohort of the same scans."
        )

    def reconstructed(one: Checkpoint, cohort: Cohort, chosen: list[str]):
        left_out: list[SkippedScan] = []
        extractor = one.processor.feature_extractor
        yield from reconstruct_cohort(codec, extractor, cohort, chosen, batch_size, left_out)
        skipped.update({scan.subject_id: scan.reason for scan in left_out})

    def pairs(part: str) -> Iterator[ScanPair]:
        chosen, extractor = subjects[part], of_target.processor.feature_extractor
        windows = dict(cohort_windows(extractor, target, chosen))
        for scan in reconstructed(of_source, source, [name for name in chosen if name in windows]):
            values = windows[scan.subject_id].reshape(-1, len(target.labels))
            seen = np.asarray(values.any(axis=0))  # masked regions are 0 throughout
            yield _pair(scan, values, seen)

    ways = CrossAtlas(source.coordinates, target.coordinates)
    ways.fit(pairs("train"), pairs("validation"))
    direct = {scan.subject_id: scan for scan in reconstructed(of_target, target, subjects["test"])}
    places = [torch.tensor(cohort.coordinates)[None] for cohort in (source, target)]
    chosen = [name for name in subjects["test"] if name in direct]
    for scan in reconstructed(of_source, source, chosen):
        own = direct[scan.subject_id]
        crossed = decode_windows(codec, scan.codes, places[1], batch_size, places[0])
        ways.add(
            _pair(scan, own.raw, own.region_mask),
            crossed.reshape(own.raw.shape),
            own.reconstruction,
        )
    scores = {
        **ways.results(),
        "source_atlas": source.atlas,
        "target_atlas": target.atlas,
        "trained_atlas": codec.config.atlas,
        "tokens_per_window": of_source.tokens_per_window,
        "num_fitted": {part: len(subjects[part]) for part in ("train", "validation")},
        "command": shlex.join(["cortexicon", *sys.argv[1:]]),
        "checkpoint": checkpoint.folder.name,
        "codebook_fingerprint": codec.codebook_fingerprint(),
        "cohort_hash": source.content_hash,
        "target_cohort_hash": target.content_hash,
        "left_out": skipped,
    }
    write_json(json_path, scores)
    _print(scores)
    return scores


def _same_scans(
    source: Cohort,
    target: Cohort,
    subjects: Sequence[str],
    interval: float,
    skipped: dict[str, str],
) -> list[str]:
    """Subjects whose scan, at the codec's interval, is in both cohorts: the same scan, provably.

    Raises
    ------
    EvaluationError
        A subject's scan differs in length, TR, site or session.
    """
    here, there = source.participants, target.participants
    found = []
    for subject in subjects:
        if abs(float(here.loc[subject, "tr"]) - interval) > 1e-6:
            continue
        if subject not in there.index:
            skipped[subject] = "not in the target cohort"
            continue
        if "recommended" in there and not bool(there.loc[subject, "recommended"]):
            skipped[subject] = "not recommended in the target cohort"
            continue
        for column in ("n_timepoints", "tr", "site", "session"):
            one, other = here.loc[subject, column], there.loc[subject, column]
            if one != other:
                raise EvaluationError(
                    f"Subject {subject}: expected the same scan in both cohorts, found {column} "
                    f"{one} in {source.path or source.atlas} and {other} in "
                    f"{target.path or target.atlas}. Compare cohorts of the same scans."
                )
        found.append(subject)
    return found


def _pair(scan: ScanReconstruction, target: np.ndarray, target_mask: np.ndarray) -> ScanPair:
    return ScanPair(
        scan.subject_id, scan.raw, target, scan.reconstruction, scan.region_mask, target_mask
    )


def _print(scores: dict[str, Any]) -> None:
    """The table a person wants to see."""
    print(
        f"{scores['source_atlas']} -> {scores['target_atlas']}, {scores['num_subjects']} test "
        f"scans, {scores['tokens_per_window']} tokens a window; the source itself: R2 "
        f"{scores['source_r2']:.3f}"
    )
    gaps = {row["other"]: row for row in scores["differences"]}
    for row in scores["systems"]:
        low, high = row["r2_interval"]
        line = f"  {row['system']:<50}{row['r2']:.3f} [{low:.3f}, {high:.3f}]"
        if row["system"] in gaps:
            gap = gaps[row["system"]]
            low, high = gap["interval"]
            line += f"   first row {gap['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        print(line)
    if scores["left_out"]:
        print(f"left out {len(scores['left_out'])} scans: {', '.join(scores['left_out'])}")
