"""Reading one scan of any kind into checked region series, with the facts of its quality."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from .array_files import (
    RawSeries,
    read_1d,
    read_delimited,
    read_mat,
    read_npy,
    read_npz,
    readable,
)
from .atlases import Atlas
from .bids import entities
from .build import Cohort
from .cifti_files import read_dtseries, read_ptseries
from .confounds import check_band, clean_series, find_nuisance
from .images import load_image, repetition_time
from .readers import load_cohort, read_regions
from .series import MAX_MASKED_SHARE, CohortError, ParcelSeries, check_tr, some
from .shards import read_parquet
from .sources import ScanSource
from .volumes import region_means

#: Spaces of fMRIPrep in which every brain keeps its own shape; no atlas fits there.
NATIVE_SPACES = {"", "T1w", "T2w", "func", "boldref", "orig", "anat", "individual"}
#: NIfTI's code for coordinates of the scanner; images in MNI space say 4 there.
SCANNER_SPACE = 1
#: Two repetition times that differ by more than this share are named in a warning.
TR_TOLERANCE = 0.01
#: Centres of one region in two tables of the same atlas lie nearer than this, in mm.
SAME_PLACE_MM = 5.0

_READERS: dict[str, Callable[[Path], RawSeries]] = {
    "ptseries": read_ptseries,
    "1D": read_1d,
    "npy": read_npy,
    "npz": read_npz,
    "mat": read_mat,
    "table": read_delimited,
}


def read_scan(
    scan: ScanSource,
    atlas: Atlas | None = None,
    confounds: str | None = None,
    scrub_mm: float | None = None,
    band_pass: tuple[float, float] | None = None,
    tr: float | None = None,
    time_axis: int | None = None,
) -> tuple[ParcelSeries, dict[str, Any]]:
    """Read a scan that `find_scans` found, clean it if asked to, and check it.

    Columns are put into the order of the atlas by their labels: its region names (with or without
    case, punctuation, and the 7Networks\\_ of Schaefer's), the values of its label volume (``#12``,
    ``12``), or the columns of regions.tsv. Up to 10 % of the regions may be missing; they become
    NaN. Series without labels are taken in the order of the atlas when their number is right.

    Parameters
    ----------
    atlas : Atlas, optional
        Needed for volumes. Without it labels and coordinates come from regions.tsv beside the
        scans, or from a CIFTI file whose parcels lie in the volume.
    confounds : str, optional
        See `parse_strategy`; fMRIPrep's scans only.
    scrub_mm : float, optional
        Framewise displacement in mm above which volumes are dropped.
    band_pass : (float, float), optional
        Hz.
    tr : float, optional
        Seconds; decides against sidecar and header.
    time_axis : int, optional
        0 or 1 for arrays without labels whose shape leaves it open.

    Returns
    -------
    ParcelSeries
        Checked; values (time, regions) float32 in the order of the atlas.
    dict
        path, kind, space, regions_by (how series were matched to regions: names, columns, values,
        similar names, order, label volume), tr (s), tr_source, volumes_read, n_scrubbed,
        n_regressors, mean_fd and max_fd (mm, None where unknown), mask, warnings (text); plain
        values for JSON.

    Raises
    ------
    CohortError
        Whatever is wrong with file, labels, TR, confounds or numbers, with the path.
    """
    raw, regions, name, matched_by = _read(scan, atlas, time_axis)
    tr, tr_source, notes = _choose_tr(scan, raw, tr)
    check_band(band_pass, tr, str(scan.path))
    values = raw.values
    nuisance = find_nuisance(scan, len(values), confounds, scrub_mm)
    cleaned = clean_series(values, nuisance, band_pass, tr, str(scan.path))
    series = ParcelSeries(
        np.ascontiguousarray(cleaned, np.float32),
        [str(label) for label in regions["label"]],
        regions[["x", "y", "z"]].to_numpy(np.float32),
        name,
        tr,
        scan.subject_id,
        scan.session,
    )
    try:
        series.validate()
    except CohortError as error:
        raise CohortError(f"{scan.path}: {error}") from error
    facts = {
        "path": str(scan.path),
        "kind": scan.kind,
        "space": scan.space,
        "regions_by": matched_by,
        "tr": float(tr),
        "tr_source": tr_source,
        "volumes_read": len(values),
        "n_scrubbed": len(values) - len(cleaned),
        "n_regressors": 0 if nuisance.regressors is None else nuisance.regressors.shape[1],
        "mean_fd": nuisance.mean_fd,
        "max_fd": nuisance.max_fd,
        "mask": "" if scan.mask is None else scan.mask.name,
        "warnings": " ".join((*raw.warnings, *notes)),
    }
    return series, facts


def _read(
    scan: ScanSource, atlas: Atlas | None, time_axis: int | None
) -> tuple[RawSeries, pd.DataFrame, str, str]:
    """Series (time, regions) in the order of a region table, that table, the atlas' name, and by
    what the two were matched.
    """
    if scan.kind == "volume":
        atlas = _volume_atlas(scan, atlas)
        return _read_volume(scan, atlas), atlas.regions_table(), atlas.name, "label volume"
    if scan.kind == "dtseries":
        raw = read_dtseries(scan.path, scan.extra, atlas.name if atlas else scan.atlas)
    elif scan.kind == "parquet":
        raw = _read_member(scan)
    elif scan.kind in _READERS:
        raw = _READERS[scan.kind](scan.path)
    else:
        raise CohortError(f"{scan.path}: expected a known kind of scan, found {scan.kind!r}.")
    if atlas is not None:
        regions, name = atlas.regions_table(), atlas.name
    elif raw.regions is not None:
        desc = entities(scan.path.name).get("desc", "")
        regions, name = raw.regions, scan.atlas or desc or "unnamed"
        if scan.kind == "parquet":
            name = str(raw.regions.attrs["atlas"])
    elif scan.regions is not None:
        regions = read_regions(scan.regions)
        # The rule of `load_cohort`: abide1_cc200 is atlas cc200.
        parts = scan.regions.resolve().parent.name.split("_")
        name = scan.atlas or (parts[1] if len(parts) > 1 else parts[0])
    else:
        known = f"{len(raw.labels)} labels ({some(raw.labels, 3)})" if raw.labels else "no labels"
        raise CohortError(
            f"{scan.path}: expected regions with MNI coordinates, found {known} and no "
            "coordinates. Name an atlas, or put regions.tsv (label, x, y, z) into the folder."
        )
    beside = None if atlas is None or scan.regions is None else read_regions(scan.regions)
    values, labels_by, notes = _in_order(raw, regions, name, str(scan.path), time_axis, beside)
    raw = raw._replace(values=values, warnings=(*raw.warnings, *notes))
    return raw, regions, name, labels_by


# --- volumes ------------------------------------------------------------------------------------


def _volume_atlas(scan: ScanSource, atlas: Atlas | None) -> Atlas:
    """The atlas of a volume; refuses none, and brains that are not in its space."""
    if atlas is None:
        raise CohortError(
            f"{scan.path}: expected an atlas to average the volume over, found none. Name one, or "
            "give the path of a label volume."
        )
    # NOTE: an image in native space lies so near to MNI that every region would still find voxels.
    if scan.pipeline == "fmriprep" and scan.space in NATIVE_SPACES and scan.space != atlas.space:
        raise CohortError(
            f"{scan.path}: expected an image in the space of atlas {atlas.name} ({atlas.space}), "
            f"found {scan.space or 'native'} space. Run fMRIPrep with --output-spaces "
            "MNI152NLin2009cAsym, or resample the image."
        )
    return atlas


def _read_volume(scan: ScanSource, atlas: Atlas) -> RawSeries:
    with readable(scan.path, "a NIfTI file"):
        image = load_image(scan.path)
        seconds = repetition_time(image)
        unit = image.header.get_xyzt_units()[1] if seconds is not None else "unknown"
        source = "NIfTI header"
        if seconds == 1 and unit == "unknown":
            # NOTE: 1 without a unit is what software writes that does not know the TR.
            seconds, source = None, "the NIfTI header says 1 without a unit, its default"
        found = region_means(scan.path, atlas, scan.mask)
        notes: tuple[str, ...] = ()
        if int(image.header["sform_code"] or image.header["qform_code"]) == SCANNER_SPACE and (
            "MNI" in atlas.space and "MNI" not in scan.space
        ):
            notes = ("The header says scanner coordinates; is the image in MNI space?",)
        thin = np.flatnonzero((found.covered < 0.5) & (found.voxels > 0))
        if len(thin):
            names = [atlas.labels[column] for column in thin]
            notes += (f"{len(thin)} regions with signal in less than half: {some(names)}.",)
    return RawSeries(found.values, list(atlas.labels), 1, seconds, source, None, notes)


# --- our own Parquet ----------------------------------------------------------------------------


def _read_member(scan: ScanSource) -> RawSeries:
    """One participant of a prepared cohort or of a folder of tables."""
    changed = scan.path.stat().st_mtime_ns if scan.path.is_file() else 0
    if scan.path.name == "bold.parquet":
        with readable(scan.path, "a Parquet file of region series"):
            return _read_stacked(scan, changed)
    with readable(scan.path, "a Parquet file of a prepared cohort"):
        cohort = _prepared(scan.path.parent.parent, changed)
        series = cohort.series(scan.subject_id)
        regions = cohort.regions.copy()
        regions.attrs["atlas"] = cohort.atlas
    return RawSeries(series.values, series.labels, 1, series.tr, "prepared cohort", regions)


@lru_cache(maxsize=1)
def _prepared(folder: Path, changed: int) -> Cohort:
    """A prepared cohort, read once per process and file date."""
    return load_cohort(folder)


@lru_cache(maxsize=1)
def _stacked(path: Path, changed: int) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """Table of all scans, and the rows of each participant; read once per process."""
    table = read_parquet(path)
    for name in ("participant_id", "t"):
        if name not in table.column_names:
            raise CohortError(
                f"{path}: expected a column {name}, found {some(table.column_names)}."
            )
    codes, present = pd.factorize(table.column("participant_id").to_pandas())
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(codes[order])) + 1)
    return table, {str(present[codes[rows[0]]]): rows for rows in parts if len(rows)}


def _read_stacked(scan: ScanSource, changed: int) -> RawSeries:
    table, rows = _stacked(scan.path, changed)
    if scan.subject_id not in rows:
        raise CohortError(
            f"{scan.path}: expected a scan of participant {scan.subject_id}, found none among "
            f"{len(rows)}. Add it, or remove the row of participants.tsv."
        )
    own = table.take(rows[scan.subject_id])
    times = own.column("t").to_numpy()
    order = np.argsort(times, kind="stable")
    if not np.array_equal(times[order], np.arange(len(times))):
        raise CohortError(
            f"{scan.path}, participant {scan.subject_id}: expected time points 0 to "
            f"{len(times) - 1} once each, found repeated or missing ones. Repair the table."
        )
    names = [name for name in own.column_names if name not in ("participant_id", "t")]
    for name in names:
        if not pa.types.is_floating(kind := own.schema.field(name).type):
            raise CohortError(f"{scan.path}, column {name}: expected float32, found {kind}.")
    if not names:
        raise CohortError(f"{scan.path}: expected columns of regions, found none.")
    values = np.stack([own.column(name).to_numpy() for name in names], axis=1)[order]
    return RawSeries(values, names, 1)


# --- regions, TR --------------------------------------------------------------------------------


def _in_order(
    raw: RawSeries,
    regions: pd.DataFrame,
    atlas: str,
    where: str,
    time_axis: int | None,
    beside: pd.DataFrame | None = None,
) -> tuple[np.ndarray, str, list[str]]:
    """Values (time, regions) float32 in the order of `regions`; NaN for regions without series.

    With them, by what the labels were matched, and warnings. `beside` is the region table of the
    folder, which says what the file's labels mean.
    """
    values, count, notes = raw.values, len(regions), []
    if raw.labels is not None and raw.label_axis is not None:
        values = values if raw.label_axis == 1 else values.T
    elif time_axis in (0, 1):
        values = values if time_axis == 0 else values.T
    elif values.shape[0] in (count, len(raw.labels or ())):
        guess = (
            "it could be either way round" if values.shape[0] == values.shape[1] else "transposed"
        )
        raise CohortError(
            f"{where}: expected (time, regions) with {count} regions of atlas {atlas}, found shape "
            f"{values.shape}: {guess}. Save it as (time, regions) with labels, or say which axis "
            "is time."
        )
    labels = raw.labels
    found = None if labels is None else _match_through(labels, regions, beside)
    places, extra, how = found or (None, [], "order")
    if labels is not None and extra and _counts(labels) and len(labels) == count:
        places, labels, how = None, None, "order"
        notes.append("Column names only count; regions are taken in the order of the atlas.")
    if labels is None or places is None:
        if values.shape[1] != count:
            raise CohortError(
                f"{where}: expected the {count} regions of atlas {atlas}, found {values.shape[1]} "
                f"series without labels (shape {values.shape}). Use the atlas that they were "
                "extracted with, without a background column."
            )
        places = np.arange(count)
    absent = [str(label) for label in regions["label"][places < 0]]
    if extra or len(absent) > MAX_MASKED_SHARE * count:
        raise CohortError(
            f"{where}: expected the {count} regions of atlas {atlas}, found {values.shape[1]} "
            f"series. Extra: {some(extra) or 'none'}; missing: {some(absent) or 'none'}. Use the "
            "atlas that they were extracted with, without a background column."
        )
    if absent:
        notes.append(f"No series for {len(absent)} regions: {some(absent)}.")
    with np.errstate(over="ignore", invalid="ignore"):
        ordered = values[:, np.maximum(places, 0)].astype(np.float32)
    ordered[:, places < 0] = np.nan
    return ordered, how, notes


def _counts(labels: list[str]) -> bool:
    """Whether labels are 0, 1, 2, ... or 1, 2, 3, ..."""
    plain = [label.lstrip("#") for label in labels]
    return plain in ([str(i + start) for i in range(len(plain))] for start in (0, 1))


def _plain(label: str) -> str:
    """A label without case, punctuation, and the prefix of Schaefer's networks."""
    text = re.sub(r"[^a-z0-9]+", "_", str(label).lower()).strip("_")
    return re.sub(r"^(7|17)networks_", "", text)


def _value(label: str) -> str:
    """A label as a value of the label volume: ``#12``, ``12.0`` and ``012`` are 12."""
    text = str(label).lstrip("#")
    match = re.fullmatch(r"0*(\d+)(\.0*)?", text)
    return match[1] if match else text


class _Matched(NamedTuple):
    """Column of each region in a file (-1: none), labels of no region, and by what it was found."""

    places: np.ndarray
    extra: list[str]
    by: str


def _match_through(
    labels: list[str], regions: pd.DataFrame, beside: pd.DataFrame | None
) -> _Matched:
    """As `_match`, over the region table beside the scans where that one knows the labels.

    NOTE: values alone would fit two atlases with as many regions, so a table with other names
    serves by its values only where its regions lie at the same places.
    """
    if beside is None:
        return _match(labels, regions)
    columns, unknown, _ = _match(labels, beside)  # (regions of the table,)
    if unknown:
        return _match(labels, regions)
    there = beside[columns >= 0]
    found = _match(list(there["label"]), regions.drop(columns="atlas_value", errors="ignore"))
    if found.extra and "atlas_value" in there:
        by_value = _match(list(there["atlas_value"]), regions)
        axes, used = ["x", "y", "z"], by_value.places >= 0
        apart = there[axes].to_numpy()[by_value.places[used]] - regions[axes].to_numpy()[used]
        if not by_value.extra and (np.linalg.norm(apart, axis=1) <= SAME_PLACE_MM).all():
            found = by_value
    known = columns[columns >= 0]
    places = np.where(found.places >= 0, known[np.maximum(found.places, 0)], -1)
    return _Matched(places, found.extra, f"regions.tsv and {found.by}")


def _match(labels: list[str], regions: pd.DataFrame) -> _Matched:
    """Match labels to regions in the spelling that leaves the fewest labels over."""
    spellings: list[tuple[str, str, Callable[[str], str]]] = [
        ("names", "label", str),
        ("columns", "column", str),
        ("values", "atlas_value", _value),
        ("similar names", "label", _plain),
    ]
    best: _Matched | None = None
    for by, column, spell in spellings:
        if column not in regions:
            continue
        keys = [spell(text) for text in regions[column]]
        found = [spell(label) for label in labels]
        if len(set(keys)) < len(keys) or len(set(found)) < len(found):
            continue  # this spelling cannot tell all regions apart
        place = {key: position for position, key in enumerate(found)}
        places = np.array([place.get(key, -1) for key in keys])
        known = set(keys)
        extra = [label for label, key in zip(labels, found, strict=True) if key not in known]
        if best is None or len(extra) < len(best.extra):
            best = _Matched(places, extra, by)
        if not extra and (places >= 0).all():
            break
    return best or _Matched(np.full(len(regions), -1), list(labels), "names")


def _choose_tr(
    scan: ScanSource, raw: RawSeries, given: float | None
) -> tuple[float, str, list[str]]:
    """TR in s, where it comes from, and warnings about others that differ."""
    offers = [(given, "given"), (scan.tr, scan.tr_source), (raw.tr, raw.tr_source)]
    known = [(value, source) for value, source in offers if value is not None]
    if not known:
        reasons = [text for text in (scan.tr_source, raw.tr_source) if text]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise CohortError(
            f"{scan.path}: expected a TR in seconds, found none (TR missing){why}. Put "
            "RepetitionTime into a sidecar, a column tr into the participants table, or give it."
        )
    value, source = known[0]
    seconds = check_tr(value, f"{scan.path} ({source})")
    notes = [
        f"TR {seconds:g} s ({source}) is used; {other:g} s is what the {name} says."
        for other, name in known[1:]
        if not abs(other - seconds) <= TR_TOLERANCE * seconds
    ]
    return seconds, source, notes
