"""What the Space shows of connectivity: a scan's matrix, its codes, and what they give back."""

from typing import Any, NamedTuple

import numpy as np

from cortexicon.inference import Checkpoint, cohort_matrices, decode_matrices, encode_matrices
from cortexicon.inference.connectome import is_connectome, load_connectome
from cortexicon.modeling import AVQConnectomeModel

from .space import ScanReading
from .space_pictures import name_groups, picture, region_order
from .stage import CONNECTOME

_RANGE = 1.0  # Fisher z; few connections are stronger


class ConnectivityReading(NamedTuple):
    """Connectivity of one scan, and what its codes keep of it.

    Attributes
    ----------
    raw, decoded : float32 array, (regions, regions)
        Fisher z; the diagonal and regions without signal are 0.
    codes : int64 array, (tokens,)
    kept : float
        Correlation of both over pairs of usable regions.
    """

    raw: np.ndarray
    decoded: np.ndarray
    codes: np.ndarray
    kept: float


def connectome_of(checkpoint: Checkpoint) -> AVQConnectomeModel | None:
    """The connectivity stream of a checkpoint: inside a language model, or in the subfolder."""
    inside = getattr(checkpoint.model, "connectome", None)
    folder = checkpoint.folder / CONNECTOME
    if inside is None and is_connectome(folder):
        return load_connectome(folder)
    return inside


def read_connectivity(reading: ScanReading, model: AVQConnectomeModel) -> ConnectivityReading:
    """Encode and decode the connectivity of a scan that was read, in the scan's own regions."""
    scans, places = cohort_matrices(reading.cohort), reading.cohort.coordinates
    codes = encode_matrices(model, scans, places)
    usable = np.outer(reading.region_mask, reading.region_mask)
    raw = np.where(usable, scans.matrices[0].numpy(), 0)
    decoded = np.where(usable, decode_matrices(model, codes, places)[0], 0)
    np.fill_diagonal(decoded, 0)
    pairs = np.triu(usable, 1)
    kept = float(np.corrcoef(raw[pairs], decoded[pairs])[0, 1])
    return ConnectivityReading(raw, decoded, codes[0], kept)


def draw_connectivity(reading: ScanReading, found: ConnectivityReading) -> np.ndarray:
    """Both matrices side by side, regions in the order of the carpets.

    Returns
    -------
    uint8 array, (height, width, 3)
    """
    order, groups = region_order(reading)

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        back = f"given back by {len(found.codes)} codes: correlation {found.kept:.2f}"
        for axes, values, title in zip(
            panels, (found.raw, found.decoded), ("connectivity of the scan", back), strict=True
        ):
            image = axes.imshow(
                values[np.ix_(order, order)],
                cmap="RdBu_r",
                vmin=-_RANGE,
                vmax=_RANGE,
                interpolation="none",
            )
            axes.set_title(title)
            axes.spines[:].set_visible(False)
            axes.set_xticks([])
            axes.set_yticks([])
        name_groups(panels[0], groups)
        bar = figure.colorbar(image, ax=panels, shrink=0.6, pad=0.015, aspect=24)
        bar.set_label("Fisher z between two regions")
        bar.outline.set_visible(False)

    return picture(4.4, draw)
