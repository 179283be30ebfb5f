"""Cleaning of region series: confounds of fMRIPrep, scrubbing, a pass band.

The regressors come from nilearn's `load_confounds` and go through nilearn's `signal.clean`; what
is ours is the check of what goes in, and that regions without signal stay without signal.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from .series import MIN_TIMEPOINTS, CohortError, some
from .sources import ScanSource
from .tables import read_table, to_numbers

#: Presets of nilearn that take no volume away; `scrub_mm` does that with every strategy.
PRESETS = {
    "simple": ("high_pass", "motion", "wm_csf"),
    "compcor": ("high_pass", "motion", "compcor"),
    "ica_aroma": ("high_pass", "wm_csf", "ica_aroma"),
}
COMPONENTS = ("motion", "high_pass", "wm_csf", "global_signal", "compcor", "ica_aroma")
#: Kept segments shorter than this many volumes are scrubbed too (Power et al. 2014).
SHORTEST_SEGMENT = 5


class Nuisance(NamedTuple):
    """What to take out of one scan.

    Attributes
    ----------
    regressors : pandas.DataFrame or None
        One row per volume.
    kept : numpy.ndarray of bool, shape (time,), or None
        Volumes that stay; None for all.
    mean_fd, max_fd : float or None
        Framewise displacement in mm over the whole scan, where the pipeline wrote it.
    """

    regressors: pd.DataFrame | None = None
    kept: np.ndarray | None = None
    mean_fd: float | None = None
    max_fd: float | None = None


def parse_strategy(text: str | None) -> tuple[str, ...]:
    """Components of a strategy: a preset, components joined by ``+``, or both.

    ``simple+global_signal`` is motion (24 parameters), cosines, white matter, CSF, and the global
    signal.

    Raises
    ------
    CohortError
        A word that is neither.
    """
    found: list[str] = []
    for word in (text or "").split("+"):
        name = word.strip().lower()
        if name in ("", "none"):
            continue
        if name not in PRESETS and name not in COMPONENTS:
            advice = " For scrubbing give the threshold in mm (scrub)." if "scrub" in name else ""
            raise CohortError(
                f"expected confounds as {', '.join(PRESETS)} or components joined by + "
                f"({', '.join(COMPONENTS)}), found {word!r}.{advice}"
            )
        found += PRESETS.get(name, (name,))
    if "compcor" in found and "high_pass" not in found:
        found.append("high_pass")  # fMRIPrep computes the components after these cosines
    return tuple(dict.fromkeys(found))


def find_nuisance(
    scan: ScanSource, volumes: int, strategy: str | None, scrub_mm: float | None
) -> Nuisance:
    """Read what the pipeline wrote about motion and noise, and choose what to take out.

    Parameters
    ----------
    volumes : int
        Time points of the scan.
    strategy : str or None
        See `parse_strategy`.
    scrub_mm : float or None
        Volumes that moved further than this since the one before (framewise displacement, mm) are
        dropped, and with them the segments between them that are shorter than 5 volumes.

    Raises
    ------
    CohortError
        Confounds asked for where there are none, damaged, of another length, without the columns
        that the strategy needs, or too few volumes left.
    """
    components = parse_strategy(strategy)
    if scrub_mm is not None and not scrub_mm > 0:
        raise CohortError(f"expected a scrubbing threshold above 0 mm, found {scrub_mm:g}.")
    if scan.confounds is None:
        if not components and scrub_mm is None:
            return Nuisance()
        wanted = "confounds" if components else "motion to scrub by"
        raise CohortError(
            f"{scan.path}: expected {wanted} beside the scan (*_desc-confounds_timeseries.tsv of "
            "fMRIPrep, *_motion.tsv of XCP-D), found none. Clean the scan elsewhere and prepare "
            "it without these options."
        )
    moved = _framewise_displacement(scan.confounds, volumes)
    regressors, kept = None, None
    if components:
        if scan.pipeline != "fmriprep":
            raise CohortError(
                f"{scan.path}: expected a scan of fMRIPrep to take confounds from, found one that "
                f"{scan.pipeline or 'another tool'} has cleaned. Prepare it without confounds."
            )
        regressors, kept = _load_components(scan, components, volumes)
    if scrub_mm is not None:
        if moved is None:
            raise CohortError(
                f"{scan.confounds}: expected a column framewise_displacement with one number per "
                f"volume ({volumes}) to scrub by, found none. Was the scan scrubbed already? "
                "Prepare it without scrubbing."
            )
        still = _without_short_segments(~(moved > scrub_mm))
        kept = still if kept is None else kept & still
    if kept is not None and kept.sum() < MIN_TIMEPOINTS:
        raise CohortError(
            f"{scan.path}: expected at least {MIN_TIMEPOINTS} volumes to stay, found "
            f"{int(kept.sum())} of {volumes} after scrubbing at {scrub_mm or 0:g} mm. Leave the "
            "scan out."
        )
    if moved is None or not np.isfinite(moved).any():
        return Nuisance(regressors, kept)
    return Nuisance(regressors, kept, float(np.nanmean(moved)), float(np.nanmax(moved)))


def _framewise_displacement(path: Path, volumes: int) -> np.ndarray | None:
    """Column framewise_displacement in mm, NaN for the first volume; None where there is none."""
    table = read_table(path)
    if "outliers" in path.name or "framewise_displacement" not in table:
        return None  # XCP-D's outliers are 0 and 1, not mm
    found = to_numbers(table["framewise_displacement"], path)
    if len(found) != volumes:
        if path.name.endswith("motion.tsv"):
            return None  # XCP-D can write censored series beside the motion of all volumes
        raise CohortError(_length_message(path, len(found), volumes))
    wrong = found[(found < 0) | np.isinf(found)]
    if len(wrong):
        raise CohortError(
            f"{path}, column framewise_displacement: expected mm of 0 and more, found "
            f"{wrong[0]:g}. Copy the file again."
        )
    return found


def _length_message(path: Path, found: int, volumes: int) -> str:
    return (
        f"{path}: expected one row for each of the {volumes} volumes of the scan, found {found}. "
        "Do scan and table belong together? Was one of them cut?"
    )


def _load_components(
    scan: ScanSource, components: tuple[str, ...], volumes: int
) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Regressors by nilearn's `load_confounds`, and its steady-state volumes as a mask."""
    from nilearn.interfaces.fmriprep import load_confounds

    assert scan.confounds is not None
    where = f"{scan.confounds}, strategy {'+'.join(components)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table, sample = load_confounds(str(scan.path), strategy=components, demean=False)
    # NOTE: nilearn raises ValueError where columns are missing, and lets pass what pandas and json
    # answer to damaged files; each means that this table does not serve.
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise CohortError(
            f"{where}: expected the columns of this strategy, found: {reason}. Choose components "
            "that this version of fMRIPrep wrote."
        ) from error
    if len(table) not in (0, volumes):
        raise CohortError(_length_message(scan.confounds, len(table), volumes))
    try:
        numbers = table.astype(np.float64)
    except (ValueError, TypeError) as error:
        raise CohortError(f"{where}: expected numbers, found: {error}. Copy it again.") from None
    if len(table) and not np.isfinite(numbers.to_numpy()).all():
        bad = numbers.columns[~np.isfinite(numbers.to_numpy()).all(axis=0)]
        raise CohortError(f"{where}: expected finite regressors, found gaps in {some(list(bad))}.")
    kept = None
    if sample is not None:
        kept = np.zeros(volumes, bool)
        kept[np.asarray(sample)[np.asarray(sample) < volumes]] = True
    return numbers, kept


def _without_short_segments(still: np.ndarray) -> np.ndarray:
    """Kept volumes (time,) without the kept segments of fewer than 5 between dropped ones."""
    kept = still.copy()
    if still.all():
        return kept
    edges = np.flatnonzero(np.diff(np.concatenate([[0], still.astype(int), [0]])))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start < SHORTEST_SEGMENT:
            kept[start:stop] = False
    return kept


def check_band(band: tuple[float, float] | None, tr: float, where: str) -> None:
    """Refuse a pass band that the TR cannot have.

    Raises
    ------
    CohortError
        Not 0 <= low < high < Nyquist frequency, in Hz.
    """
    if band is None:
        return
    low, high = band
    nyquist = 0.5 / tr
    if not (0 <= low < high < nyquist):
        raise CohortError(
            f"{where}: expected a pass band with 0 <= low < high < {nyquist:.4g} Hz (half the "
            f"sampling rate at TR {tr:g} s), found {low:g} to {high:g} Hz. Choose another band."
        )


def clean_series(
    values: np.ndarray,
    nuisance: Nuisance,
    band: tuple[float, float] | None,
    tr: float,
    where: str,
) -> np.ndarray:
    """Take confounds out of region series, filter them, and drop scrubbed volumes.

    As `nilearn.signal.clean` does it: scrubbed volumes are bridged by splines for the filter
    (Butterworth, zero phase; regressors are filtered alike), do not enter the regression, and are
    dropped from the result. The mean of a region stays unless a high-pass takes it away.

    Parameters
    ----------
    values : numpy.ndarray of float32, shape (time, regions)
        Regions with NaN, and constant ones, pass through as they are.
    band : (float, float) or None
        Pass band in Hz; a low end of 0 means a low-pass.
    tr : float
        Seconds.

    Returns
    -------
    numpy.ndarray of float32, shape (kept time, regions)

    Raises
    ------
    CohortError
        Too many regressors for the volumes, or too few volumes for the filter.
    """
    kept = np.ones(len(values), bool) if nuisance.kept is None else nuisance.kept
    regressors = nuisance.regressors
    if regressors is not None and regressors.shape[1] == 0:
        regressors = None
    if regressors is None and band is None:
        return np.ascontiguousarray(values[kept])
    check_band(band, tr, where)
    count = 0 if regressors is None else regressors.shape[1]
    if int(kept.sum()) - count - 1 < MIN_TIMEPOINTS:
        raise CohortError(
            f"{where}: expected at least {count + 1 + MIN_TIMEPOINTS} volumes to take out {count} "
            f"regressors, found {int(kept.sum())}. Choose fewer confounds or leave the scan out."
        )
    result = values.copy()
    with np.errstate(invalid="ignore"):
        span = values.max(axis=0) - values.min(axis=0)
        # NOTE: a constant region leaves the regression as rounding noise, which would then pass
        # as a signal; so it does not go in.
        varying = span > 1e-6 * np.abs(values).max(axis=0)
    varying &= np.isfinite(values).all(axis=0)
    if varying.any():
        cleaned = _clean(values[:, varying], regressors, kept, band, tr, where)
        result = result[kept]
        result[:, varying] = cleaned
        return result
    return np.ascontiguousarray(result[kept])


def _clean(
    values: np.ndarray,
    regressors: pd.DataFrame | None,
    kept: np.ndarray,
    band: tuple[float, float] | None,
    tr: float,
    where: str,
) -> np.ndarray:
    from nilearn import signal

    low, high = band if band is not None else (None, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cleaned = signal.clean(
                values.astype(np.float64),
                detrend=False,
                standardize=None,
                confounds=regressors,
                sample_mask=None if kept.all() else np.flatnonzero(kept),
                filter="butterworth" if band is not None else False,
                low_pass=high,
                high_pass=low or None,
                t_r=tr,
                extrapolate=False,  # a spline beyond its ends runs away
            )
    except ValueError as error:
        raise CohortError(
            f"{where}: expected to filter {int(kept.sum())} volumes, found: {error}. Choose a "
            "wider band, or leave the scan out."
        ) from error
    return cleaned.astype(np.float32)
