"""What `doctor` looks at: a sample of the scans of whatever stands at a path."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cortexicon.cohorts import Cohort, CohortError, ParcelSeries, load_cohort
from cortexicon.cohorts.atlases import Atlas
from cortexicon.cohorts.scan_files import read_scan
from cortexicon.cohorts.sources import ScanSource, find_scans
from cortexicon.tokenization import AVQFeatureExtractor

from .errors import InferenceError

#: Scans that are read; a volume takes seconds, a series milliseconds.
MOST_SERIES, MOST_VOLUMES = 64, 4


class Examined(NamedTuple):
    """Scans of one input, and what could not be read.

    Attributes
    ----------
    kind : str
        In words: a prepared cohort, a folder of tables, or files of which kind.
    total : int
        Scans there.
    scans : list of ParcelSeries
        Those that were read, spread evenly over all.
    unreadable : dict of str to str
        Names of scans that were looked at and cannot be used, and why.
    notes : list of str
        What the readers warn of, once each.
    needs_atlas : bool
        They are volumes, and no atlas was given.
    """

    kind: str
    total: int
    scans: list[ParcelSeries]
    unreadable: dict[str, str]
    notes: list[str]
    needs_atlas: bool = False


def examine(
    path: Path,
    atlas: Atlas | None = None,
    tr: float | None = None,
    extractor: AVQFeatureExtractor | None = None,
) -> Examined:
    """Read a sample of the scans at a path.

    Parameters
    ----------
    path : pathlib.Path
        A cohort folder, a folder of scans in any form that `prepare` reads, or one scan.
    atlas : Atlas, optional
        Needed for volumes, and for series that do not say where their regions lie.
    tr : float, optional
        Seconds, where the files do not say.
    extractor : AVQFeatureExtractor, optional
        Of a checkpoint: series without coordinates are taken for its regions, if their labels or
        their number allow it.

    Raises
    ------
    InferenceError
        Nothing is there.
    CohortError
        No scan is there, or a cohort that cannot be read.
    """
    if not path.exists():
        raise InferenceError(
            f"{path}: expected a cohort, a folder of scans or one scan, found nothing. Check the "
            "path."
        )
    if path.is_dir() and (
        (path / "cohort.json").is_file() or (path / "timeseries" / "bold.parquet").is_file()
    ):
        return _of_cohort(load_cohort(path))
    return _of_files(path, atlas, tr, extractor)


def _of_cohort(cohort: Cohort) -> Examined:
    table = cohort.participants
    if "recommended" in table:
        table = table[table["recommended"].astype(bool)]
    subjects = [str(subject) for subject in table.index]
    scans, unreadable = [], {}
    for subject in spread(subjects, MOST_SERIES):
        scan = cohort.series(subject)
        try:
            scan.validate()
        except CohortError as error:
            unreadable[subject] = str(error)
        else:
            scans.append(scan)
    prepared = cohort.path is not None and (cohort.path / "cohort.json").is_file()
    kind = "prepared cohort" if prepared else "folder of tables"
    return Examined(f"{kind}, atlas {cohort.atlas}", len(subjects), scans, unreadable, [])


def _of_files(
    path: Path, atlas: Atlas | None, tr: float | None, extractor: AVQFeatureExtractor | None
) -> Examined:
    found = find_scans(path, None if atlas is None else atlas.name)
    kinds = sorted({scan.kind for scan in found})
    pipelines = sorted({scan.pipeline for scan in found} - {""})
    kind = f"{', '.join(kinds)} files{' of ' + ', '.join(pipelines) if pipelines else ''}"
    volumes = "volume" in kinds
    if volumes and atlas is None:
        return Examined(kind, len(found), [], {}, [], needs_atlas=True)
    scans: list[ParcelSeries] = []
    unreadable: dict[str, str] = {}
    notes: list[str] = []
    for source in spread(found, MOST_VOLUMES if volumes else MOST_SERIES):
        try:
            series, facts = _read(source, atlas, tr, extractor)
        except CohortError as error:
            unreadable[source.path.name] = str(error)
            continue
        scans.append(series)
        notes.append(str(facts["warnings"]))
    return Examined(kind, len(found), scans, unreadable, [n for n in dict.fromkeys(notes) if n])


def _read(
    source: ScanSource,
    atlas: Atlas | None,
    tr: float | None,
    extractor: AVQFeatureExtractor | None,
) -> tuple[ParcelSeries, dict]:
    """Read one scan; without regions of its own, by those of the checkpoint."""
    try:
        return read_scan(source, atlas, tr=tr)
    except CohortError:
        own = None if extractor is None or atlas is not None else stored_atlas(extractor)
        if own is None or source.kind == "volume":
            raise
    return read_scan(source, own, tr=tr)


def stored_atlas(extractor: AVQFeatureExtractor) -> Atlas | None:
    """The regions that a checkpoint stores, as an atlas without a label volume."""
    if extractor.region_labels is None or extractor.region_coordinates is None:
        return None
    places = np.asarray(extractor.region_coordinates, np.float32)
    sides = tuple(np.where(places[:, 0] < 0, "L", "R").tolist())
    return Atlas(
        extractor.atlas or "of the checkpoint",
        tuple(extractor.region_labels),
        tuple(range(1, len(places) + 1)),
        places,
        np.zeros(len(places), np.int64),
        sides,
        "MNI",
        "",
    )


def spread(items: list, most: int) -> list:
    """At most `most` of the items, evenly over the list, with the first and the last."""
    if len(items) <= most:
        return list(items)
    places = np.unique(np.linspace(0, len(items) - 1, most).round().astype(int))
    return [items[place] for place in places]
