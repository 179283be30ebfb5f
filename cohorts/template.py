"""The brain of the simulated cohort: real region centres, networks and what couples them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .series import CohortError

#: Networks of the model, in the names of the Seitzman-300 table that nilearn ships.
NETWORKS = {
    "DefaultMode": "Default",
    "FrontoParietal": "Frontoparietal",
    "CinguloOpercular": "Cinguloopercular",
    "DorsalAttention": "DorsalAttention",
    "Visual": "Visual",
    "SomatomotorDorsal": "Somatomotor",
    "Auditory": "Auditory",
}

#: Largest eigenvalues of the three parts of the coupling that all people share.
NETWORK_COUPLING, DISTANCE_COUPLING, HOMOTOPIC_COUPLING = 0.65, 0.15, 0.05


def template_regions(num_regions: int) -> pd.DataFrame:
    """Regions of seven cortical networks, spread over each network, with MNI coordinates in mm.

    Source: the 300 regions of Seitzman et al. 2020 (NeuroImage 206:116290), read from the file
    inside the installed nilearn; a subset of like size per network is kept.

    Raises
    ------
    CohortError
        nilearn is not installed, or the number of regions is out of range.
    """
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise CohortError(
            "the simulated cohort takes its coordinates from nilearn, which is not installed. "
            'Install it with: pip install "cortexicon[io]"'
        )
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    table = pd.read_csv(folder / "seitzman_2018_ROIs_300inVol_MNI_allInfo.txt", sep=r"\s+")
    tissue = pd.read_csv(folder / "seitzman_2018_ROIs_anatomicalLabels.txt")
    table = table.set_axis(["x", "y", "z", "radius", "number", "name"], axis=1)
    table = table[(tissue.iloc[:, 0] <= 2).to_numpy() & table["name"].isin(list(NETWORKS))]
    available = table["name"].value_counts()
    if not 4 * len(NETWORKS) <= num_regions <= len(table):
        raise CohortError(
            f"expected {4 * len(NETWORKS)} to {len(table)} regions, found {num_regions}."
        )
    counts = dict.fromkeys(NETWORKS, 0)
    while sum(counts.values()) < num_regions:  # one region per network in turn
        for name in NETWORKS:
            if counts[name] < available[name] and sum(counts.values()) < num_regions:
                counts[name] += 1
    rows = []
    for name, label in NETWORKS.items():
        points = table[table["name"] == name]
        chosen = points.iloc[_spread(points[["x", "y", "z"]].to_numpy(float), counts[name])]
        for side in "LR":
            half = chosen[(chosen["x"] < 0) == (side == "L")].sort_values(["y", "z"])
            for number, (_, point) in enumerate(half.iterrows(), start=1):
                volume = 4 / 3 * np.pi * point["radius"] ** 3
                rows.append(
                    {
                        "label": f"{label}_{side}_{number:02d}",
                        "x": point["x"],
                        "y": point["y"],
                        "z": point["z"],
                        "size": round(volume),
                        "hemisphere": side,
                        "network": label,
                    }
                )
    return pd.DataFrame(rows)


def _spread(points: np.ndarray, count: int) -> list[int]:
    """Indices of `count` points that cover a cloud (points, 3): always the farthest one next."""
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
    while len(chosen) < count:
        gaps = np.linalg.norm(points[:, None] - points[chosen], axis=-1).min(axis=1)
        chosen.append(int(gaps.argmax()))
    return sorted(chosen)


def structural_coupling(regions: pd.DataFrame) -> np.ndarray:
    """Coupling that all people share, (regions, regions), symmetric, largest eigenvalue below 0.8.

    The sum of a network part, a part that decays with distance (20 mm), and homotopic partners.
    """
    points = regions[["x", "y", "z"]].to_numpy(float)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    mirrored = np.linalg.norm(points[:, None] - points[None] * [-1, 1, 1], axis=-1)
    other_side = np.sign(points[:, None, 0]) != np.sign(points[None, :, 0])
    near = np.exp(-distance / 20.0)
    homotopic = np.exp(-((mirrored / 12.0) ** 2)) * other_side
    total = np.zeros_like(near)
    for part, weight in ((near, DISTANCE_COUPLING), (homotopic + homotopic.T, HOMOTOPIC_COUPLING)):
        np.fill_diagonal(part, 0.0)
        total += weight * part / np.linalg.eigvalsh(part)[-1]
    modes = network_modes(regions["network"])
    # What is left of the two local parts couples no network's mean with anything. So the effects,
    # which couple means of different networks, change no region's own variance or spectrum to
    # first order, and age cannot be read from those.
    outside = np.eye(len(regions)) - modes @ modes.T
    return outside @ total @ outside + NETWORK_COUPLING * modes @ modes.T


def network_modes(names: Sequence[str]) -> np.ndarray:
    """Unit vectors, (regions, groups), constant on each group of regions, in order of the names."""
    groups = list(dict.fromkeys(names))
    member = np.array([[name == group for group in groups] for name in names], float)
    return member / np.sqrt(member.sum(axis=0))
