"""Names of files in BIDS and its derivatives: entities, sidecars, neighbours of a scan."""

from __future__ import annotations

import json
import re
from pathlib import Path

_ENTITY = re.compile(r"(?:^|_)([a-zA-Z]+)-([a-zA-Z0-9+]+)(?=_|$)")
#: Entities that tell versions of one scan apart, not scans.
_VERSION = {"space", "res", "den", "desc", "atlas", "seg", "stat", "echo", "part", "hemi"}
#: Tables of confounds or motion, new and old names of fMRIPrep and XCP-D.
CONFOUNDS = re.compile(
    r"_(desc-confounds_(timeseries|regressors)|desc-filtered_motion|motion|outliers)\.tsv$"
)
MASK = re.compile(r"_desc-brain_mask\.nii(\.gz)?$")


def entities(name: str) -> dict[str, str]:
    """BIDS entities of a file name: ``sub-01_task-rest_bold.nii.gz`` -> sub 01, task rest."""
    return dict(_ENTITY.findall(name.split(".")[0]))


def scan_key(path: Path) -> tuple[tuple[str, str], ...]:
    """What versions of one scan have in common: all entities but space, resolution and such."""
    parts = entities(path.name)
    return tuple(sorted(item for item in parts.items() if item[0] not in _VERSION))


class Sidecars:
    """The JSON files of a data set, to be asked for the repetition time of each scan.

    Parameters
    ----------
    files : list of pathlib.Path
        All files of the data set.
    """

    def __init__(self, files: list[Path]):
        self._read: dict[Path, tuple[float | None, str]] = {}
        self._files: dict[tuple[Path, str | None], list[tuple[dict[str, str], Path]]] = {}
        for path in files:
            if re.search(r"(?<!desc-confounds)_(bold|timeseries)\.json$", "_" + path.name):
                parts = entities(path.name)
                self._files.setdefault((path.parent, parts.get("sub")), []).append((parts, path))

    def find(self, scan: Path) -> tuple[Path | None, float | None, str]:
        """The sidecar of a scan, its RepetitionTime, and where that comes from.

        By the inheritance of BIDS: a JSON in the scan's folder or above applies when it has no
        entity that the scan contradicts; the most specific one counts.
        """
        own = entities(scan.name)
        found: list[tuple[tuple, Path]] = []
        for folder in scan.parents:
            for subject in {own.get("sub"), None}:
                for parts, path in self._files.get((folder, subject), ()):
                    shared = {k: v for k, v in parts.items() if k not in _VERSION}
                    if all(own.get(key) == value for key, value in shared.items()):
                        same = sum(own.get(key) == value for key, value in parts.items())
                        is_bold = path.name.endswith("bold.json")
                        found.append(((len(shared), same, is_bold, path.name), path))
        files = [path for _, path in sorted(found, reverse=True)]
        plain = scan.parent / (scan.name.split(".")[0] + ".json")
        if plain not in files and plain.is_file():
            files.append(plain)
        for path in files:
            if path not in self._read:
                self._read[path] = _repetition_time(path)
        # A sidecar of fMRIPrep may leave the TR to the one of the raw data.
        useful = [path for path in files if self._read[path][0] is not None]
        if not files:
            return None, None, ""
        sidecar = (useful or files)[0]
        return sidecar, *self._read[sidecar]


def _repetition_time(path: Path) -> tuple[float | None, str]:
    """RepetitionTime of a sidecar and its source; the reader decides what to do without one."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None, f"{path.name} cannot be read as JSON"
    tr = facts.get("RepetitionTime") if isinstance(facts, dict) else None
    if tr is None:
        return None, f"{path.name} has no RepetitionTime"
    if isinstance(tr, bool) or not isinstance(tr, int | float) or abs(tr) > 1e9:
        return None, f"RepetitionTime in {path.name} is {str(tr)[:40]!r}, not a number of seconds"
    return float(tr), f"sidecar {path.name}"


def neighbour(scan: Path, files: list[Path], pattern: re.Pattern[str]) -> Path | None:
    """The file of a scan's folder that matches and belongs to the same scan and space."""
    own, key, best = entities(scan.name), scan_key(scan), None
    for path in files:
        if not pattern.search(path.name) or scan_key(path) != key:
            continue
        parts = entities(path.name)
        fixed = [k for k in ("space", "res") if k in parts or pattern is MASK]
        if any(parts.get(k) != own.get(k) for k in fixed):
            continue
        # A table of motion says more than a table of outliers.
        if best is None or "outliers" in best.name:
            best = path
    return best


def upwards(folder: Path, name: str, stop: Path) -> Path | None:
    """The nearest file of this name in a folder or above it, not above `stop`."""
    while True:
        if (folder / name).is_file():
            return folder / name
        if folder == stop or folder == folder.parent:
            return None
        folder = folder.parent
