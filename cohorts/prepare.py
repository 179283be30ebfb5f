"""Files of a preprocessing pipeline to a cohort folder: in parallel, resumable, one bad scan apart.

Two steps. Every scan is read by itself, in any order and by any number of processes, and its
result is kept in a work folder beside the cohort. Then the results are put together in the order
of the participants table. The second step depends on nothing but the results, so neither the
number of processes nor an interruption can change a byte of the cohort.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from tqdm import tqdm

from .confounds import parse_strategy
from .prepared_folder import (
    make_manifest,
    manifest_quality,
    read_manifest,
    used_rows,
    write_cohort,
)
from .readers import read_participants
from .scan_results import Job, Reading, read_record, result_path
from .series import CohortError, check_tr, some
from .sources import ScanSource, find_scans
from .subjects import match_subjects
from .work import Run, put_in_place, work_folder, workers


class People(NamedTuple):
    """Where the phenotypes come from.

    Attributes
    ----------
    path : pathlib.Path
        participants.tsv, see `read_participants`.
    site : str or None
        Scanner of everybody, for tables without a column site.
    sex_codes : mapping of str to str, or None
        As {"1": "M", "2": "F"}.
    """

    path: Path
    site: str | None = None
    sex_codes: Mapping[str, str] | None = None


class Prepared(NamedTuple):
    """What `prepare_cohort` did.

    Attributes
    ----------
    path : pathlib.Path
        The cohort folder.
    quality : pandas.DataFrame
        One row per scan that was found: `status` is used, refused (with the reason) or not used
        (another scan of the same person is).
    num_finished_before : int
        Scans that were not read again.
    without_scan : list of str
        Participants for whom no scan was found, or none that can be used.
    """

    path: Path
    quality: pd.DataFrame
    num_finished_before: int
    without_scan: list[str]


@dataclass
class _Found:
    """A scan that was found, and what became of it."""

    job: Job
    owner: str = ""
    key: str = ""
    record: dict[str, Any] | None = None
    status: str = "not used"
    reason: str = ""

    def refuse(self, reason: str) -> None:
        """Leave the scan out for a reason that the user has to know."""
        self.status, self.reason, self.key, self.record = "refused", reason, "", None

    def row(self) -> dict[str, Any]:
        """The scan's row in the manifest."""
        scan = self.job.scan
        return {
            "source": self.job.source,
            "kind": scan.kind,
            "subject_id": self.owner or scan.subject_id,
            "session": scan.session,
            "task": scan.task,
            "run": scan.run,
            "status": self.status,
            "reason": self.reason,
            "key": self.key,
            "record": self.record,
        }


def prepare_cohort(
    source: str | Path,
    out: str | Path,
    people: People,
    reading: Reading | None = None,
    task: str | None = None,
    space: str | None = None,
    num_proc: int = 1,
    dask_address: str | None = None,
    progress: bool = False,
) -> Prepared:
    """Turn the files of a preprocessing pipeline into a cohort folder.

    One scan per participant is used: of several, the first by session and run that can be read.
    Finished scans are not read again, neither after an interruption nor when the same command
    runs once more: the SHA-256 of their files and of the settings decides.

    Layout of the folder, beside what `save_cohort` writes::

        OUT/prepare.json   settings, atlas with its SHA-256 and space, one record per scan
        OUT/quality.tsv    `Prepared.quality`

    Parameters
    ----------
    source : path
        What `find_scans` reads.
    out : path
        Folder to write; one that `prepare_cohort` wrote before is brought up to date.
    people : People
        The participants table.
    reading : Reading, optional
        Atlas, confounds, scrubbing, pass band, TR. Without: the regions that the files bring.
    task, space : str, optional
        Only scans with this BIDS entity.
    num_proc : int
        Processes on this machine.
    dask_address : str, optional
        Scheduler of a Dask cluster whose workers see the same files; replaces `num_proc`.
    progress : bool
        Show a bar on stderr.

    Raises
    ------
    CohortError
        Nothing to read, a choice that only the user can make, no scan that can be used, `out`
        holds something else or is in use, or results cannot be written.
    """
    source, out, reading = Path(source).absolute(), Path(out).absolute(), reading or Reading()
    _check(reading, num_proc)
    read_manifest(out)  # refuses a folder of something else before any work
    table = read_participants(people.path, people.sex_codes, people.site, need_tr=False)
    atlas = None if reading.atlas is None else reading.atlas.load()
    listed = find_scans(source, None if reading.atlas is None else reading.atlas.name, space)
    listed = _of_one_task(listed, task, source)
    with work_folder(out) as work:
        before = read_manifest(out)
        scans = [_Found(Job(scan, source, reading, None, work / "scans")) for scan in listed]
        queues = _queues(scans, table, used_rows(before))
        with workers(num_proc, dask_address) as run:
            num_before = _read_all(queues, run, progress)
        _take_records(scans, used_rows(before))
        _refuse_twins(scans)
        _refuse_other_regions(scans)
        used = [scan for scan in scans if scan.status == "used"]
        if not used:
            reasons = dict.fromkeys(scan.reason for scan in scans if scan.reason)
            raise CohortError(
                f"{source}: expected at least one scan that can be used, found {len(scans)} and "
                f"none of them can be: {some(list(reasons), 3)}"
            )
        manifest = make_manifest([scan.row() for scan in scans], atlas, reading, _describe(people))
        if manifest != before:
            results = {
                scan.owner: result_path(scan.job) for scan in used if scan.key != scan.job.known_key
            }
            new = write_cohort(manifest, results, table, atlas, out, work)
            put_in_place(new, out, work)
    with_scan = {scan.owner for scan in used}
    without = [subject for subject in table["subject_id"] if subject not in with_scan]
    return Prepared(out, manifest_quality(manifest), num_before, without)


def _check(reading: Reading, num_proc: int) -> None:
    """Refuse settings that would fail for every scan."""
    if num_proc < 1:
        raise CohortError(f"expected at least one process, found {num_proc}.")
    parse_strategy(reading.confounds)
    if reading.scrub_mm is not None and not reading.scrub_mm > 0:
        raise CohortError(f"expected a scrubbing threshold above 0 mm, found {reading.scrub_mm}.")
    if reading.tr is not None:
        check_tr(reading.tr, "the TR given to the command")
    low, high = reading.band_pass or (0.0, 1.0)
    if not 0 <= low < high:
        raise CohortError(f"expected a pass band from low to high in Hz, found {low:g} {high:g}.")


def _of_one_task(scans: list[ScanSource], task: str | None, source: Path) -> list[ScanSource]:
    """Scans of the task asked for; refuses to choose among several."""
    tasks = sorted({scan.task for scan in scans})
    if task is not None:
        if task not in tasks:
            raise CohortError(
                f"{source}: expected scans of task {task}, found "
                f"{some([name or '(none)' for name in tasks], 20)}. Choose one of these."
            )
        return [scan for scan in scans if scan.task == task]
    if len(tasks) > 1:
        raise CohortError(
            f"{source}: expected scans of one task, found {len(tasks)}: "
            f"{some([name or '(none)' for name in tasks], 20)}. Say which one is meant (--task)."
        )
    return scans


def _queues(
    scans: list[_Found], table: pd.DataFrame, before: list[dict[str, Any]]
) -> dict[str, list[_Found]]:
    """Scans of every participant in the order of trying; scans of nobody are refused."""
    owners = match_subjects(
        [scan.job.scan.subject_id for scan in scans],
        [scan.job.source for scan in scans],
        list(table["subject_id"]),
    )
    trs = dict(zip(table["subject_id"], table["tr"], strict=True))
    keys = {(row["source"], row["subject_id"]): row["key"] for row in before}
    queues: dict[str, list[_Found]] = defaultdict(list)
    for scan, (owner, reason) in zip(scans, owners, strict=True):
        if not owner:
            scan.refuse(reason)
            continue
        scan.owner = owner
        scan.job = scan.job._replace(
            table_tr=None if pd.isna(trs[owner]) else float(trs[owner]),
            known_key=keys.get((scan.job.source, owner), ""),
        )
        queues[owner].append(scan)
    for queue in queues.values():
        queue.sort(key=lambda scan: (scan.job.scan.session, scan.job.scan.run, scan.job.source))
    return queues


def _read_all(queues: dict[str, list[_Found]], run: Run, progress: bool) -> int:
    """Read one scan per participant, going on to the next one where one cannot be used.

    Returns
    -------
    int
        Scans that were finished before.
    """
    waiting, finished_before = {owner: list(queue) for owner, queue in queues.items()}, 0
    with tqdm(total=len(waiting), unit="scan", disable=not progress, desc="prepare") as bar:
        while waiting:
            turn = {queue[0].job: queue[0] for queue in waiting.values()}
            for job, outcome in run(list(turn)):
                scan = turn[job]
                if outcome.problem:
                    scan.refuse(outcome.problem)
                    waiting[scan.owner].pop(0)
                else:
                    scan.status, scan.key = "used", outcome.key
                    finished_before += outcome.finished_before
                    for other in waiting[scan.owner][1:]:
                        other.reason = f"{scan.job.source} of the same person is used"
                    waiting[scan.owner] = []
                bar.update(not waiting[scan.owner])
            waiting = {owner: queue for owner, queue in waiting.items() if queue}
    return finished_before


def _take_records(scans: list[_Found], before: list[dict[str, Any]]) -> None:
    """Give every used scan what is known about it."""
    known = {row["key"]: row["record"] for row in before}
    for scan in scans:
        if scan.status == "used":
            in_cohort = scan.key == scan.job.known_key
            scan.record = known[scan.key] if in_cohort else read_record(scan.job, scan.key)


def _refuse_twins(scans: list[_Found]) -> None:
    """Refuse all scans of different people that hold the same numbers."""
    same: dict[str, list[_Found]] = defaultdict(list)
    for scan in scans:
        if scan.record is not None:
            same[scan.record["digest"]].append(scan)
    for group in same.values():
        names = ", ".join(f"{scan.job.source} ({scan.owner})" for scan in group)
        for scan in group if len(group) > 1 else []:
            scan.refuse(
                f"expected different scans of different people, found the same scan in {names}: "
                "find out whose it is and remove the others"
            )


def _refuse_other_regions(scans: list[_Found]) -> None:
    """Refuse scans that bring other regions than the first scan does (without an atlas)."""
    first: dict[str, Any] | None = None
    for scan in scans:
        if scan.record is None or scan.record["regions"] is None:
            continue
        found = scan.record["regions"]
        if first is None:
            first, source = found, scan.job.source
        if found == first:
            continue
        pairs = zip(found["labels"], first["labels"], strict=False)
        differing = [f"{ours} for {theirs}" for ours, theirs in pairs if ours != theirs]
        scan.refuse(
            f"expected the {len(first['labels'])} regions of {source}, found "
            f"{len(found['labels'])} of atlas {found['atlas']} "
            f"({some(differing, 3) or 'other coordinates'}): give an atlas, or prepare them apart"
        )


def _describe(people: People) -> dict[str, Any]:
    """What identifies the participants table, for the manifest."""
    return {
        "sha256": hashlib.sha256(people.path.read_bytes()).hexdigest(),
        "site": people.site,
        "sex_codes": dict(people.sex_codes) if people.sex_codes else None,
    }
