"""A scan as an image, for models that read pictures: NumPy alone, the same bytes in every run.

`carpet` shows regions (down, ordered by network) against time (across), `connectivity` the
correlation matrix in the same order, `both` the two side by side, and `blank` nothing: the control
of a model that reads the image. Colours come from a table of 256; sizes are reached by averaging
areas, so a picture is neither cropped nor interpolated past what was measured.

A carpet of a whole scan would show its length in its texture, and length names the site: give
every scan the same `num_samples` at one sampling interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import EvaluationError

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("carpet", "connectivity", "both", "blank")
# Anchors of each palette in equal steps from the lowest to the highest value, red green blue.
PALETTES = {
    "gray": ((0, 0, 0), (255, 255, 255)),
    "diverging": ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31)),
    "viridis": ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)),
}
#: A carpet's colours end this many SD from a region's mean.
CARPET_SD = 2.5
#: Columns of the middle colour between the halves of `both`.
GAP = 4
#: Columns of a regions table that may name networks, in order of preference.
NETWORK_COLUMNS = ("network", "yeo7")


def render_scan(
    values: np.ndarray,
    coordinates: np.ndarray,
    networks: Sequence[object] | None = None,
    kind: str = "both",
    size: tuple[int, int] = (448, 448),
    palette: str = "gray",
    num_samples: int | None = None,
) -> np.ndarray:
    """Draw one scan.

    Parameters
    ----------
    values : float array, (time, regions)
        Any unit: every region is z-scored over the drawn samples. A region that holds a value
        that is not finite, or does not vary, is drawn as zero.
    coordinates : float array, (regions, 3)
        MNI, mm. Orders the regions of a network: left before right, then back to front, then
        bottom to top.
    networks : sequence, (regions,), optional
        Name of each region's network; networks stand in alphabetical order, regions without one
        (None, NaN, "" or "None") last. Default: one network.
    kind : str
        carpet, connectivity, both, or blank.
    size : (int, int)
        Height and width in pixels.
    palette : str
        gray, diverging, or viridis.
    num_samples : int, optional
        Time points to draw, from the first; default all.

    Returns
    -------
    uint8 array, (height, width, 3)
        Red, green, blue.

    Raises
    ------
    EvaluationError
        Unknown kind or palette, a size too small, shapes that do not fit, or a scan shorter than
        `num_samples`.
    """
    height, width = (int(side) for side in size)
    smallest = 2 * GAP + 2 if kind == "both" else 1
    if kind not in KINDS or palette not in PALETTES or height < 1 or width < smallest:
        raise EvaluationError(
            f"expected a kind of {', '.join(KINDS)}, a palette of {', '.join(PALETTES)} and a size "
            f"of at least (1, {smallest}); found {kind!r}, {palette!r}, {tuple(size)}."
        )
    if kind == "blank":
        return _coloured(np.zeros((height, width)), palette)
    scan = np.asarray(values, np.float64)
    places = np.asarray(coordinates, np.float64)
    if scan.ndim != 2 or min(scan.shape) < 2 or places.shape != (scan.shape[1], 3):
        raise EvaluationError(
            "expected values (time, regions) with at least two of each and coordinates "
            f"(regions, 3); found {scan.shape} and {places.shape}."
        )
    if num_samples is not None:
        if not 2 <= num_samples <= len(scan):
            raise EvaluationError(
                f"expected at least num_samples = {num_samples} (and two) time points, found "
                f"{len(scan)}. Draw fewer of every scan, or leave this one out."
            )
        scan = scan[:num_samples]
    scan = _standardised(scan)[:, region_order(places, networks)]
    if kind == "carpet":
        return _coloured(_resized(_carpet(scan), height, width), palette)
    if kind == "connectivity":
        return _coloured(_resized(_correlation(scan), height, width), palette)
    left = (width - GAP) // 2
    halves = (
        _resized(_carpet(scan), height, left),
        np.zeros((height, GAP)),
        _resized(_correlation(scan), height, width - GAP - left),
    )
    return _coloured(np.concatenate(halves, axis=1), palette)


def region_order(coordinates: np.ndarray, networks: Sequence[object] | None = None) -> np.ndarray:
    """Order of the regions in a picture: by network, hemisphere, then back to front.

    Parameters
    ----------
    coordinates : float array, (regions, 3)
        MNI, mm.
    networks : sequence, (regions,), optional

    Returns
    -------
    int64 array, (regions,)

    Raises
    ------
    EvaluationError
        If the number of networks is not that of regions.
    """
    count = len(coordinates)
    names = [""] * count if networks is None else [_network_name(name) for name in networks]
    if len(names) != count:
        raise EvaluationError(f"expected a network for each of {count} regions, found {len(names)}")
    x, y, z = np.asarray(coordinates, np.float64).T
    # The last key decides first; a region without a network goes behind all that have one.
    return np.lexsort((z, y, x > 0, np.array(names), np.array([name == "" for name in names])))


def networks_of(regions: pd.DataFrame) -> list[object] | None:
    """The networks that a cohort's `regions` table names, or None where it names none."""
    for column in NETWORK_COLUMNS:
        if column in regions:
            return list(regions[column])
    return None


def _network_name(name: object) -> str:
    text = "" if name is None else str(name).strip()
    return "" if text.lower() in ("none", "nan", "n/a") else text


def _standardised(scan: np.ndarray) -> np.ndarray:
    """Z-scores over time; zero for a region without a signal; (time, regions)."""
    known = np.isfinite(scan).all(axis=0)
    centred = np.where(known, scan, 0.0)
    centred = centred - centred.mean(axis=0)
    spread = np.sqrt((centred**2).mean(axis=0))
    varies = spread > 1e-9 * (1.0 + np.abs(np.where(known, scan, 0.0)).max(axis=0))
    return np.divide(centred, spread, out=np.zeros_like(centred), where=varies)


def _carpet(scan: np.ndarray) -> np.ndarray:
    """Regions down, time across, in -1..1."""
    return np.clip(scan.T / CARPET_SD, -1.0, 1.0)


def _correlation(scan: np.ndarray) -> np.ndarray:
    """Correlation matrix, (regions, regions), in -1..1.

    NOTE: einsum's plain loop, not BLAS: its sums do not depend on the number of threads.
    """
    return np.clip(np.einsum("tr,ts->rs", scan, scan) / len(scan), -1.0, 1.0)


def _resized(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Area averages of a picture on a grid of another size."""
    return _averaged(_averaged(picture, height).T, width).T


def _averaged(rows: np.ndarray, count: int) -> np.ndarray:
    """Average `rows` down to, or spread them over, `count` rows of equal extent."""
    total = np.zeros((len(rows) + 1, rows.shape[1]))
    np.cumsum(rows, axis=0, out=total[1:])
    edges = np.arange(count + 1) * (len(rows) / count)
    whole = np.minimum(edges.astype(np.int64), len(rows) - 1)
    # The integral up to an edge grows linearly inside a row.
    integral = total[whole] + (edges - whole)[:, None] * rows[whole]
    return np.diff(integral, axis=0) / (len(rows) / count)


def _coloured(picture: np.ndarray, palette: str) -> np.ndarray:
    """Colours of values in -1..1; uint8 (height, width, 3)."""
    anchors = np.array(PALETTES[palette], np.float64)
    steps = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(steps, np.arange(len(anchors)), channel) for channel in anchors.T]
    table = np.stack(channels, axis=1).round().astype(np.uint8)  # (256, 3)
    # Rounded first: the last bits of a sum must not decide between two colours.
    level = np.floor((np.round(picture, 9) + 1.0) * 128.0).clip(0, 255).astype(np.int64)
    return table[level]
