"""Scans of several parcellations in one training run, and whose turn it is at each step."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cortexicon.cohorts import Cohort, load_cohort
from cortexicon.modeling import AVQModel
from cortexicon.modeling.losses_avq import reconstruction_loss
from cortexicon.modeling.outputs_avq import AVQOutput
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


class Turns:
    """What training draws from at each step: one atlas at a time, or all of one scan at once.

    Parameters
    ----------
    atlases : list of AtlasScans
    seed : int
    paired : bool
        Windows are drawn with the regions of all atlases side by side, of scans that are in all of
        them; `own` takes them apart again, into what is encoded and what is decoded besides.

    Raises
    ------
    TrainingError
        `paired` with one atlas, without a common scan, or with scans of different lengths.
    """

    def __init__(self, atlases: list[AtlasScans], seed: int, paired: bool) -> None:
        self.scans = [one.training for one in atlases]
        self.seed = seed
        self.joint = join_scans(self.scans) if paired else None

    def at(self, step: int) -> int:
        """Position of the step's atlas."""
        return atlas_at(self.seed, step, len(self.scans))

    def scans_at(self, step: int) -> PreparedScans:
        """What the windows of a step are drawn from."""
        return self.scans[self.at(step)] if self.joint is None else self.joint

    def own(
        self, batch: dict[str, torch.Tensor], step: int
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A batch's regions of the step's atlas, and those of all others; none unless paired."""
        if self.joint is None:
            return batch, {}
        counts = [scans.series[0].shape[1] for scans in self.scans]
        owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        mine = (owner == self.at(step)).to(batch["region_mask"].device)
        last = {"input_values": 2, "region_mask": 1, "region_coordinates": 1}  # axis of the regions
        parts = [
            {key: batch[key].index_select(axis, chosen) for key, axis in last.items()}
            for chosen in (mine.nonzero()[:, 0], (~mine).nonzero()[:, 0])
        ]
        return parts[0], parts[1]


def join_scans(parts: list[PreparedScans]) -> PreparedScans:
    """Scans that are in all of `parts`, their regions side by side.

    Raises
    ------
    TrainingError
        One part only, no common scan, or a scan that is longer in one than in another.
    """
    first, *others = parts
    places = [{name: row for row, name in enumerate(one.subject_ids)} for one in parts]
    shared = [name for name in first.subject_ids if all(name in place for place in places)]
    if not others or not shared:
        raise TrainingError(
            "paired_decoding needs the same scans in two atlases or more: expected more_cohorts "
            f"with scans of the primary cohort, found {len(parts) - 1} of them and {len(shared)} "
            "common training scans."
        )
    joined = PreparedScans(
        [], [], [], {}, np.concatenate([one.region_coordinates for one in parts])
    )
    for name in shared:
        series = [one.series[place[name]] for one, place in zip(parts, places, strict=True)]
        if len({len(values) for values in series}) > 1:
            raise TrainingError(
                f"{name}: expected one scan in all cohorts, found {[len(v) for v in series]} "
                "samples. paired_decoding is for cohorts of the same scans."
            )
        masks = [one.region_masks[place[name]] for one, place in zip(parts, places, strict=True)]
        joined.subject_ids.append(name)
        joined.series.append(np.concatenate(series, axis=1))
        joined.region_masks.append(np.concatenate(masks))
    return joined


def paired_loss(
    model: AVQModel,
    out: AVQOutput,
    batch: dict[str, torch.Tensor],
    others: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Error, scalar, of decoding `batch` at the regions of the other atlases.

    Parameters
    ----------
    model : AVQModel
    out : AVQOutput
        Of `batch`; its text_embeds carry the gradient, which codes do not.
    batch, others : dict
        From `Turns.own`.
    """
    decoded = model._decode(
        out.text_embeds, others["region_coordinates"], batch["region_coordinates"]
    )
    mask = others["region_mask"][:, None].expand(-1, decoded.shape[1], -1)
    return reconstruction_loss(decoded, others["input_values"], mask)


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
