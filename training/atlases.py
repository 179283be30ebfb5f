"""Scans of several parcellations in one training run, and whose turn it is at each step."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cortexicon.cohorts import Cohort, load_cohort
from cortexicon.tokenization import AVQFeatureExtractor

from .arguments import TrainingError
from .collators import PreparedScans, prepare_scans


class AtlasScans(NamedTuple):
    """What training uses of one cohort.

    Attributes
    ----------
    atlas : str
    content_hash : str
        Of the cohort.
    training, validation : PreparedScans
    """

    atlas: str
    content_hash: str
    training: PreparedScans
    validation: PreparedScans


def prepare_atlases(
    cohort: Cohort,
    more_cohorts: list[str],
    parts: dict[str, list[str]],
    extractor: AVQFeatureExtractor,
    quiet: bool = False,
) -> list[AtlasScans]:
    """Training and validation scans of the primary cohort, then of each further one.

    A further cohort holds the same people in another parcellation, all of them or some. A person's
    part is the one that the primary cohort's split names; whoever it does not name is not used, so
    nobody of its test parts is ever trained on, whichever the atlas.

    Parameters
    ----------
    cohort : Cohort
        The primary one, that `parts` is of.
    more_cohorts : list of str
        Folders that `load_cohort` reads, each of another atlas.
    parts : dict of str to list of str
        One fold of the split: subject ids of `train`, `validation` and others.
    extractor : AVQFeatureExtractor
        Of the primary atlas; the others get theirs by `for_atlas`.

    Raises
    ------
    TrainingError
        An atlas that occurs twice, nobody of the training or the validation part, one subject id
        with two sites or two `sub_id`, or no usable scan.
    """
    found: list[AtlasScans] = []
    for path in [None, *more_cohorts]:
        other = cohort if path is None else load_cohort(path)
        if other.atlas in [one.atlas for one in found]:
            raise TrainingError(
                f"{path}: expected another parcellation than {other.atlas!r}, which a cohort "
                "before it has already. Give one cohort per atlas in more_cohorts."
            )
        own = extractor
        people = {name: list(parts[name]) for name in ("train", "validation")}
        if path is not None:
            own = extractor.for_atlas(other.atlas, other.labels, other.coordinates)
            _check_same_people(cohort, other, path)
            people = {name: _usable(other, subjects) for name, subjects in people.items()}
        for name, subjects in people.items():
            if not subjects:
                raise TrainingError(
                    f"{path}: none of its {len(other)} participants is in the {name} part of the "
                    "split. A cohort of more_cohorts has the subject ids of the primary cohort."
                )
        label = "" if path is None else f" {other.atlas}"
        training = prepare_scans(other, own, people["train"], f"training{label}", quiet)
        validation = prepare_scans(other, own, people["validation"], f"validation{label}", quiet)
        assert set(training.subject_ids) <= set(parts["train"]), "a held-out subject would leak"
        found.append(AtlasScans(other.atlas, other.content_hash, training, validation))
    return found


def atlas_at(seed: int, step: int, count: int) -> int:
    """Which of `count` atlases the batch of a step is of, the same on every process.

    Each has one turn in every round of `count` steps. NOTE: the order within a round is drawn, for
    what happens every so many steps (revival, the log) must not meet one and the same atlas always.
    """
    turn, place = divmod(step, count)
    return int(np.random.default_rng([seed, 3, turn]).permutation(count)[place])


def refused_scans(atlases: list[AtlasScans]) -> dict[str, str]:
    """Subjects left out and why; those of the cohorts after the first behind the atlas's name."""
    return {
        f"{one.atlas}: {subject}" if number else subject: reason
        for number, one in enumerate(atlases)
        for part in (one.training, one.validation)
        for subject, reason in part.refused.items()
    }


def hash_of_all(cohort_hashes: list[str]) -> str:
    """One sha256 for several cohorts, in their order; of none: an empty text."""
    return hashlib.sha256(" ".join(cohort_hashes).encode()).hexdigest() if cohort_hashes else ""


def _usable(cohort: Cohort, subjects: list[str]) -> list[str]:
    """Those of `subjects` whose scan is in `cohort` and recommended."""
    table = cohort.participants
    if "recommended" in table:
        table = table[table["recommended"].astype(bool)]
    known = set(table.index)
    return [subject for subject in subjects if subject in known]


def _check_same_people(primary: Cohort, other: Cohort, path: str | Path) -> None:
    """Refuse a cohort whose subject ids name other people than those of the primary one."""
    shared = [subject for subject in other.subject_ids if subject in set(primary.subject_ids)]
    for column in ("site", "sub_id"):
        if column not in primary.participants or column not in other.participants:
            continue
        here = primary.participants.loc[shared, column]
        there = other.participants.loc[shared, column]
        differs = here.astype(str).to_numpy() != there.astype(str).to_numpy()
        if differs.any():
            subject = shared[int(differs.argmax())]
            raise TrainingError(
                f"{path}: expected the people of the primary cohort under its subject ids, found "
                f"{column} {there[subject]!r} for {subject}, which is {here[subject]!r} there "
                f"({int(differs.sum())} such). A held-out person could be trained on: make the ids "
                "agree."
            )
