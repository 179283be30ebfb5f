"""The folder that `prepare` writes: its manifest, and the cohort put together from results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .atlases import Atlas
from .build import FIXED_COLUMNS, build_cohort, digest_values
from .quality import quality_table
from .scan_results import READING_VERSION, Reading, load_result
from .series import CohortError
from .shards import read_parquet, split_series, view_series
from .storage import describe_prepared, save_cohort

MANIFEST = "prepare.json"
QUALITY = "quality.tsv"
#: Columns of a participants table that hold head motion; without one, the measured one is added.
MOTION_COLUMNS = ("mean_fd", "func_mean_fd", "framewise_displacement")


def make_manifest(
    rows: Sequence[dict[str, Any]], atlas: Atlas | None, reading: Reading, people: dict[str, Any]
) -> dict[str, Any]:
    """All that decides the content of a prepared folder, in types that JSON keeps.

    Parameters
    ----------
    rows : sequence of dict
        One per scan that was found: source, kind, subject_id, session, task, run, status, reason,
        key and record (see `read_record`; None for scans that are not used).
    people : dict
        What identifies the participants table and how it was read.
    """
    known = None
    if atlas is not None:
        known = {"name": atlas.name, "space": atlas.space, "sha256": atlas.sha256}
    settings = {
        "confounds": reading.confounds,
        "scrub_mm": reading.scrub_mm,
        "band_pass": reading.band_pass,
        "tr": reading.tr,
        "time_axis": reading.time_axis,
    }
    manifest = {
        "version": READING_VERSION,
        "atlas": known,
        "settings": settings,
        "participants": people,
        "scans": list(rows),
    }
    return json.loads(json.dumps(manifest))


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a folder that `prepare` wrote, or an empty one where there is no folder.

    Raises
    ------
    CohortError
        The folder holds something else, or its manifest is damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        for row in manifest["scans"]:
            _ = row["source"], row["key"], row["status"], row["record"]
    except FileNotFoundError:
        raise CohortError(
            f"{out}: expected a new folder or one that `prepare` wrote, found something else (no "
            f"{MANIFEST}). Choose another folder."
        ) from None
    except NotADirectoryError:
        raise CohortError(f"{out}: expected a folder, found a file. Choose another name.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CohortError(
            f"{out / MANIFEST}: expected the description of a prepared cohort, found damage "
            f"({error!r}). Remove the folder and run the command again."
        ) from error
    return manifest


def used_rows(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the scans that are in the cohort, in its order."""
    return [row for row in manifest.get("scans", []) if row["status"] == "used"]


def manifest_quality(manifest: dict[str, Any]) -> pd.DataFrame:
    """The quality table of a manifest, see `quality_table`."""
    rows = []
    for row in manifest["scans"]:
        plain = {name: value for name, value in row.items() if name not in ("key", "record")}
        rows.append((row["record"] or {}).get("quality", {}) | plain)
    return quality_table(rows)


def write_cohort(
    manifest: dict[str, Any],
    results: dict[str, Path],
    table: pd.DataFrame,
    atlas: Atlas | None,
    out: Path,
    work: Path,
) -> Path:
    """Put the results of the used scans together in a folder inside `work`.

    The series pass through one file mapped into memory, so a cohort may be larger than memory.

    Parameters
    ----------
    manifest : dict
        See `make_manifest`.
    results : dict of str to pathlib.Path
        Subject to the result of each scan that was read now; the others are in `out`.
    table : pandas.DataFrame
        The participants table; the cohort's scans stand in its order.
    out : pathlib.Path
        The cohort of before.
    work : pathlib.Path
        Where to write.

    Returns
    -------
    pathlib.Path
        The finished folder, to be moved to `out`.

    Raises
    ------
    CohortError
        A result is damaged, or as `build_cohort` and `save_cohort`.
    """
    place = {subject: number for number, subject in enumerate(table["subject_id"])}
    rows = sorted(used_rows(manifest), key=lambda row: place[row["subject_id"]])
    regions = _regions(rows[0]["record"], atlas)
    lengths = [row["record"]["n_timepoints"] for row in rows]
    shape = (sum(lengths), len(regions))
    values = np.memmap(work / "series.f32", np.float32, "w+", shape=shape)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    slots = {
        row["subject_id"]: values[starts[number] : starts[number + 1]]
        for number, row in enumerate(rows)
    }
    digests = {row["subject_id"]: row["record"]["digest"] for row in rows}
    for subject, path in results.items():
        slots[subject][:] = load_result(path, digests[subject])
    earlier = set(slots) - set(results)
    _copy_earlier({subject: digests[subject] for subject in earlier}, slots, out)
    name = rows[0]["record"]["regions"]["atlas"] if atlas is None else atlas.name
    cohort = build_cohort(values, _participants(rows, table), regions, name)
    new = save_cohort(cohort, work / "cohort")
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (new / MANIFEST).write_text(text + "\n", encoding="utf-8")
    manifest_quality(manifest).to_csv(new / QUALITY, sep="\t", index=False, na_rep="n/a")
    return new


def _copy_earlier(digests: dict[str, str], slots: dict[str, np.ndarray], out: Path) -> None:
    """Fill the slots of scans that are in the cohort of before; `digests` of these subjects."""
    if not digests:
        return
    missing = set(digests)
    try:
        known = describe_prepared(out)
        for shard in known.shards:
            plain, scans = split_series(read_parquet(shard), len(known.regions), shard)
            for number, subject in enumerate(plain.column("subject_id").to_pylist()):
                if subject not in missing:
                    continue
                found = view_series(scans.slice(number, 1).combine_chunks(), len(known.regions))
                if digest_values(found) != digests[subject]:
                    raise CohortError(f"{shard}: the series of {subject} changed.")
                slots[subject][:] = found
                missing.discard(subject)
        if missing:
            raise CohortError(f"{out}: {len(missing)} of its scans are gone.")
    except CohortError as error:
        raise CohortError(
            f"{error} To read all scans anew, remove {out} and run the command again."
        ) from error


def _regions(record: dict[str, Any], atlas: Atlas | None) -> pd.DataFrame:
    if atlas is not None:
        return atlas.regions_table().drop(columns="column", errors="ignore")
    table = pd.DataFrame(record["regions"]["coordinates"], columns=["x", "y", "z"])
    table.insert(0, "label", record["regions"]["labels"])
    return table


def _participants(rows: list[dict[str, Any]], table: pd.DataFrame) -> pd.DataFrame:
    """The table that `build_cohort` takes: one row per scan, then the phenotypes."""
    people = table.set_index("subject_id")
    fixed = pd.DataFrame(
        {
            "subject_id": [row["subject_id"] for row in rows],
            "session": [row["session"] for row in rows],
            "site": [str(people.loc[row["subject_id"], "site"]) for row in rows],
            "tr": [float(row["record"]["tr"]) for row in rows],
            "n_timepoints": [int(row["record"]["n_timepoints"]) for row in rows],
        }
    )
    extra = people.drop(columns=list(FIXED_COLUMNS), errors="ignore")
    motion = [row["record"]["quality"].get("mean_fd") for row in rows]
    joined = fixed.join(extra, on="subject_id")
    if not set(MOTION_COLUMNS) & set(extra) and any(value is not None for value in motion):
        joined["mean_fd"] = pd.Series(motion, dtype=float)
    return joined
