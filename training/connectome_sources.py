"""Matrices beside those of training scans that say which connections vary together.

There are fewer people than components, so whatever else shows the covariance helps: scans that no
part of the split names, sub-windows of training scans, their mirror images, and the same people in
another parcellation. Nobody of the validation or test part is in any of them.
"""

from typing import NamedTuple

import numpy as np
import torch

from cortexicon.cohorts import Cohort, load_cohort
from cortexicon.inference import cohort_matrices

from .arguments import TrainingError

_WIDTH_MM = 4.0  # of the kernel by which a matrix is read at other positions
_ROWS = 64  # matrices at once


class Matrices(NamedTuple):
    """Scans of one part: `matrices` (scans, regions, regions), `region_mask` (scans, regions)."""

    matrices: torch.Tensor
    region_mask: torch.Tensor

    def rows(self, chosen) -> dict[str, torch.Tensor]:
        """Keyword inputs of the model."""
        return {"matrices": self.matrices[chosen], "region_mask": self.region_mask[chosen]}


def matrices_of(
    cohort: Cohort, subjects: list[str], part: tuple[float, float] = (0.0, 1.0)
) -> Matrices:
    """Fisher-z matrices of the scans of `subjects`, or of a part of each (`cohort_matrices`)."""
    return Matrices(*cohort_matrices(cohort, subjects, part)[1:])


def further_scans(cohort: Cohort, parts: dict[str, list[str]], fitted: list[str]) -> list[str]:
    """Scans of training sites that no part names, of people that no part names either.

    Quality control kept them out of the split; they still say which connections vary together, and
    where variables of people show.
    """
    table = cohort.participants
    named = {subject for subjects in parts.values() for subject in subjects}
    sites = set(table.loc[fitted, "site"])
    free = [s for s in table.index if s not in named and table.loc[s, "site"] in sites]
    if "sub_id" in table:
        people = set(table.loc[sorted(named), "sub_id"].astype(str))
        free = [s for s in free if str(table.loc[s, "sub_id"]) not in people]
    return free


def sub_windows(cohort: Cohort, subjects: list[str], count: int) -> list[Matrices]:
    """Matrices of `count` equal parts of each scan."""
    shares = [(part / count, (part + 1) / count) for part in range(count)]
    return [matrices_of(cohort, subjects, share) for share in shares]


def mirrored(scans: Matrices, coordinates: np.ndarray) -> Matrices:
    """The same brains with left and right exchanged; `coordinates` (regions, 3) in mm."""
    there = np.asarray(coordinates, np.float32) * np.array([-1, 1, 1], np.float32)
    return _around(scans, _read_at(scans, there, coordinates))


def other_atlases(
    folders: list[str], subjects: list[str], scans: Matrices, coordinates: np.ndarray
) -> list[Matrices]:
    """Those of `subjects` that cohorts in other parcellations have, read at our regions.

    Raises
    ------
    TrainingError
        A cohort that has none of them.
    """
    found = []
    for folder in folders:
        other = load_cohort(folder)
        known = set(other.subject_ids)
        common = [subject for subject in subjects if subject in known]
        if not common:
            raise TrainingError(
                f"more_cohorts: {folder}: expected training people in another parcellation, found "
                "none of their subject ids. Leave it out."
            )
        there = matrices_of(other, common)
        found.append(_around(scans, _read_at(there, other.coordinates, coordinates)))
    return found


def _read_at(scans: Matrices, there: np.ndarray, here: np.ndarray) -> Matrices:
    """Matrices of regions at `there` (regions, 3) read at `here` by their nearest regions."""
    squares = ((np.asarray(here)[:, None] - np.asarray(there)[None]) ** 2).sum(-1)
    squares = squares - squares.min(axis=1, keepdims=True)
    weight = torch.from_numpy(np.exp(-squares / (2 * _WIDTH_MM**2))).float()
    weight = weight / weight.sum(1, keepdim=True)
    off_diagonal = 1 - torch.eye(len(there))
    parts, masks = [], []
    for values, mask in zip(*(part.split(_ROWS) for part in scans), strict=True):
        present = mask[:, :, None] * mask[:, None, :] * off_diagonal
        share = weight @ present @ weight.T
        # Two regions whose nearest is the same one: between them there is next to nothing to read.
        parts.append((weight @ (values * present) @ weight.T) / share.clamp(min=0.25))
        masks.append(mask.float() @ weight.T > 0.5)
    return Matrices(torch.cat(parts), torch.cat(masks))


def _around(scans: Matrices, moved: Matrices) -> Matrices:
    """`moved` with the mean of `scans` for its own: positions and mirrors shift the mean too."""

    def mean(part: Matrices) -> torch.Tensor:
        present = part.region_mask[:, :, None] & part.region_mask[:, None, :]
        return (part.matrices * present).sum(0) / present.sum(0).clamp(min=1)

    return moved._replace(matrices=moved.matrices - mean(moved) + mean(scans))
