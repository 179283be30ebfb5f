"""One scan of `prepare`: read, checked and kept on disk under a key of everything it depends on.

The key is a SHA-256 over the content of the scan's files and over the settings. A result with the
same key is never made again; files that only look new (another date, same bytes) change nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from .atlases import Atlas, load_atlas
from .build import digest_values
from .quality import plain_facts, scan_quality
from .scan_files import read_scan
from .series import CohortError
from .sources import ScanSource

#: Part of every key: raise it when the same files and settings come to mean other numbers.
READING_VERSION = 1
#: Two repetition times that differ by a larger share contradict each other.
TR_TOLERANCE = 0.01
#: Warnings and numbers of threads belong to the whole process, where Dask may run several threads.
_ONE_AT_A_TIME = Lock()


class AtlasChoice(NamedTuple):
    """Which parcellation, in words that a worker process can load it by.

    Attributes
    ----------
    name : str
        A name that `load_atlas` knows, or a label volume's path.
    labels, folder : str or None
        Label table, and the folder of volumes and tables for work without a network.
    """

    name: str
    labels: str | None = None
    folder: str | None = None

    def load(self) -> Atlas:
        """The atlas; loaded once per process."""
        return _load_atlas(self)


@lru_cache(maxsize=2)
def _load_atlas(choice: AtlasChoice) -> Atlas:
    labels, folder = (None if text is None else Path(text) for text in choice[1:])
    return load_atlas(choice.name, labels=labels, folder=folder)


class Reading(NamedTuple):
    """How scans are read: what `read_scan` is told.

    Attributes
    ----------
    atlas : AtlasChoice or None
        None: every file brings its own regions.
    confounds : str or None
        Strategy of nilearn's `load_confounds`.
    scrub_mm : float or None
        Framewise displacement in mm above which a volume is dropped.
    band_pass : (float, float) or None
        Hz.
    tr : float or None
        Repetition time in seconds of every scan, whatever the files say.
    time_axis : int or None
        0 or 1 for arrays that could be read either way round.
    """

    atlas: AtlasChoice | None = None
    confounds: str | None = None
    scrub_mm: float | None = None
    band_pass: tuple[float, float] | None = None
    tr: float | None = None
    time_axis: int | None = None


class Job(NamedTuple):
    """One scan to prepare.

    Attributes
    ----------
    scan : ScanSource
    root : pathlib.Path
        The source; file names in keys and tables are relative to it.
    reading : Reading
    table_tr : float or None
        TR of the participants table, in seconds. It counts more than a header, which is often
        wrong, and must agree with a sidecar.
    folder : pathlib.Path
        Where results are kept.
    known_key : str
        Key of this scan's result in the finished cohort, or "".
    """

    scan: ScanSource
    root: Path
    reading: Reading
    table_tr: float | None
    folder: Path
    known_key: str = ""

    @property
    def source(self) -> str:
        """The scan's file relative to the source; its name in tables, the same on every machine."""
        return relative_name(self.scan.path, self.root)


class Outcome(NamedTuple):
    """What became of one scan.

    Attributes
    ----------
    key : str
        "" where the scan could not be read.
    problem : str
        Why it cannot be used; "" when it can.
    finished_before : bool
        The result was there and nothing was read.
    """

    key: str
    problem: str = ""
    finished_before: bool = False


def prepare_scan(job: Job) -> Outcome:
    """Read and check one scan and keep the result, unless the same result is there already.

    A scan that cannot be read or used is an outcome, never an exception: one bad scan must not
    stop the others.

    Raises
    ------
    CohortError
        The result cannot be written (a full disk): no other scan would fare better.
    """
    try:
        mark_of(job).touch()
        with _ONE_AT_A_TIME:
            return _prepare(job)
    except OSError as error:
        raise CohortError(
            f"{job.folder}: expected to write the result of a scan, found: {error}. Check space "
            "and permissions, then run the same command again; finished scans are kept."
        ) from error
    finally:
        mark_of(job).unlink(missing_ok=True)


def _prepare(job: Job) -> Outcome:
    """As `prepare_scan`; raises OSError when the result cannot be written."""
    stem = result_stem(job)
    # One thread: sums in another order differ in the last bit, and results must not depend on
    # how many processes worked on them.
    with threadpool_limits(limits=1), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            kept = _read_stored(job.folder, stem)
            inputs = _hash_inputs(job, kept.get("inputs", {}))
            key = _key(job, inputs)
            if key in (kept.get("key"), job.known_key):
                return Outcome(key, finished_before=True)
            series, record = _read(job)
        except CohortError as error:
            return Outcome("", _plain_text(str(error), job.root))
        except Exception as error:  # a reader's fault on one file; the others go on
            text = f"{type(error).__name__}: {error}"
            return Outcome("", _plain_text(f"could not be read: {text}", job.root))
    said = [str(w.message) for w in heard if issubclass(w.category, (UserWarning, RuntimeWarning))]
    said = [_plain_text(text, job.root) for text in dict.fromkeys(said)]
    quality = record["quality"]
    quality["warnings"] = _plain_text(" ".join([quality["warnings"], *said]), job.root)
    stored = {"key": key, "inputs": inputs, "record": record}
    write_result(job.folder, stem, series, stored)
    return Outcome(key)


def _read(job: Job) -> tuple[np.ndarray, dict[str, Any]]:
    """Series (time, regions) float32 in the atlas' order, and all that is known about the scan."""
    reading, scan, table_tr = job.reading, job.scan, job.table_tr
    atlas = None if reading.atlas is None else reading.atlas.load()
    if scan.tr is None and table_tr is not None:
        scan = replace(scan, tr=table_tr, tr_source="participants table")
    series, facts = read_scan(
        scan,
        atlas=atlas,
        confounds=reading.confounds,
        scrub_mm=reading.scrub_mm,
        band_pass=reading.band_pass,
        tr=reading.tr,
        time_axis=reading.time_axis,
    )
    if reading.tr is None and table_tr and abs(series.tr / table_tr - 1) > TR_TOLERANCE:
        raise CohortError(
            f"{job.source}: expected the TR of the participants table, {table_tr:g} s, found "
            f"{series.tr:g} s ({facts['tr_source']}). Correct one of them, or give the TR to the "
            "command."
        )
    if atlas is not None:
        series = series.reorder(list(atlas.labels), atlas.name)
    measured = scan_quality(series)
    said = [text for text in (measured["warnings"], facts.pop("warnings", "")) if text]
    facts.pop("path", None)  # a folder of this machine; the row says which file it was
    quality = plain_facts(facts | measured | {"warnings": " ".join(said)})
    values = np.ascontiguousarray(series.values, dtype=np.float32)
    record = {
        "n_timepoints": len(values),
        "tr": float(series.tr),
        "digest": digest_values(values),
        "quality": quality,
        "regions": None
        if atlas is not None
        else {
            "atlas": series.atlas,
            "labels": list(series.labels),
            "coordinates": np.asarray(series.coordinates, np.float64).tolist(),
        },
    }
    return values, record


def relative_name(path: Path, root: Path) -> str:
    """A file's name below the source, with forward slashes; whole when it lies elsewhere."""
    base = root if root.is_dir() else root.parent
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def result_stem(job: Job) -> str:
    """File name, without ending, of a scan's result."""
    name = json.dumps([job.source, job.scan.subject_id, job.scan.session])
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def mark_of(job: Job) -> Path:
    """The file that exists while a scan is being read; it outlives a process that is killed."""
    return job.folder / f"{result_stem(job)}.reading"


def _plain_text(text: str, root: Path) -> str:
    """A message on one line, without the folders of this machine."""
    for folder in (str(root), str(root.resolve())):
        text = text.replace(folder + os.sep, "")
    return " ".join(text.split())


# ------------------------------------------------------------------ keys


def _key(job: Job, inputs: dict[str, list]) -> str:
    reading = job.reading
    facts = {
        "version": READING_VERSION,
        "inputs": {name: state[2] for name, state in inputs.items()},
        "who": [job.scan.subject_id, job.scan.session],
        "atlas": None if reading.atlas is None else reading.atlas.load().sha256,
        "atlas_name": None if reading.atlas is None else reading.atlas.load().name,
        "confounds": reading.confounds,
        "scrub_mm": reading.scrub_mm,
        "band_pass": reading.band_pass,
        "tr": [reading.tr, job.table_tr],
        "time_axis": reading.time_axis,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _hash_inputs(job: Job, before: dict[str, list]) -> dict[str, list]:
    """Name of each file of a scan to [size, time of change in ns, SHA-256].

    A file whose size and time of change are those that were hashed before is not read again.
    """
    found = {}
    for path in job.scan.inputs:
        state, name = path.stat(), relative_name(path, job.root)
        size, changed = state.st_size, state.st_mtime_ns
        old = before.get(name)
        same = old is not None and old[:2] == [size, changed]
        digest = old[2] if old is not None and same else _hash_file(str(path), size, changed)
        found[name] = [size, changed, digest]
    return found


@lru_cache(maxsize=4096)
def _hash_file(path: str, size: int, changed: int) -> str:
    """SHA-256 of a file; size and time are there so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ results on disk


def write_result(folder: Path, stem: str, values: np.ndarray, stored: dict[str, Any]) -> None:
    """Write one result: first the series, then the record that makes it count."""
    mark = f"{stem}.{uuid.uuid4().hex}.tmp"
    try:
        with (folder / mark).open("wb") as file:
            np.save(file, values, allow_pickle=False)
        os.replace(folder / mark, folder / f"{stem}.npy")
        (folder / mark).write_text(json.dumps(stored), encoding="utf-8")
        os.replace(folder / mark, folder / f"{stem}.json")
    finally:
        (folder / mark).unlink(missing_ok=True)


def result_path(job: Job) -> Path:
    """Where the series of a finished scan are: float32 (time, regions), NumPy's format."""
    return job.folder / f"{result_stem(job)}.npy"


def _read_stored(folder: Path, stem: str) -> dict[str, Any]:
    """What `write_result` stored, or an empty dictionary when there is no whole result."""
    try:
        stored = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if (folder / f"{stem}.npy").is_file() else {}


def read_record(job: Job, key: str) -> dict[str, Any]:
    """What is known about a finished scan.

    Returns
    -------
    dict
        n_timepoints, tr (s), digest of the series, quality (see `scan_quality`), and regions:
        None with an atlas, else atlas, labels and coordinates that the file brought.

    Raises
    ------
    CohortError
        There is no such result.
    """
    stored = _read_stored(job.folder, result_stem(job))
    if stored.get("key") != key or "record" not in stored:
        raise CohortError(
            f"{job.folder}: expected the result of {job.source}, found none. Do all workers see "
            "this folder under this name? Run the same command again."
        )
    return stored["record"]


def load_result(path: Path, digest: str) -> np.ndarray:
    """Series of a finished scan, float32 (time, regions), compared with their SHA-256.

    Raises
    ------
    CohortError
        The file is damaged; the scan is read again when the command is repeated.
    """
    try:
        values = np.load(path, allow_pickle=False)
        if digest_values(values) != digest:
            raise ValueError("other numbers than were written")
    except (OSError, ValueError, EOFError) as error:
        path.unlink(missing_ok=True)
        raise CohortError(
            f"{path}: expected a finished scan, found damage ({error}). Run the same command "
            "again: this scan is then read anew."
        ) from error
    return values
