"""Finding scans: which files of a folder are scans, of whom, and what lies beside them."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .bids import CONFOUNDS, MASK, Sidecars, entities, neighbour, scan_key, upwards
from .series import CohortError, some
from .storage import read_parquet
from .tables import read_table

#: Ending of a file's name -> what `read_scan` does with it; the longest ending counts.
KINDS = {
    ".ptseries.nii": "ptseries",
    ".dtseries.nii": "dtseries",
    ".nii.gz": "volume",
    ".nii": "volume",
    ".1D": "1D",
    ".npy": "npy",
    ".npz": "npz",
    ".mat": "mat",
    ".tsv": "table",
    ".csv": "table",
}
#: CIFTI files that hold maps, labels or matrices, not series.
_NO_SERIES = (".dlabel.nii", ".plabel.nii", ".dscalar.nii", ".pscalar.nii")
_NO_SERIES_PAIRS = (".pconn.nii", ".dconn.nii", ".pdconn.nii", ".dpconn.nii")
_FMRIPREP = re.compile(
    r"(_desc-(preproc|smoothAROMAnonaggr|optcom)_bold\.nii(\.gz)?|_bold\.dtseries\.nii)$"
)
# Up to version 0.6 XCP-D wrote atlas-NAME_timeseries, since 0.7 seg-NAME_stat-mean_timeseries.
_XCPD = re.compile(r"_(atlas|seg)-[^_]+(_[a-z]+-[^_]+)*_timeseries\.(tsv|ptseries\.nii)$")
_XCPD_VOLUME = re.compile(r"_desc-(denoised|residual)_bold\.(nii|nii\.gz|dtseries\.nii)$")
#: Volumes and tables that lie beside scans and are none, by their names.
_BESIDE_VOLUME = re.compile(
    r"(^|[_.-])(brain)?(mask|dseg|probseg|boldref|sbref|T1w|T2w|FLAIR|dwi|epi|phasediff|magnitude"
    r"\d?|boldmap|alff|reho|atlas|parcellation|labels?)($|[_.-])"
)
_BESIDE_TABLE = re.compile(
    r"^(participants|regions|phenotyp\w*|README|CHANGES|quality)$"
    r"|(^|_)(confounds|regressors|events|channels|electrodes|scans|sessions|motion|outliers|design"
    r"|qc|conmat|coverage|dseg|mixing|metrics|physio|stim|labels|morph|alff|reho|xfm)($|_|\.)"
    r"|_bold$"
)
#: Parts of other pipelines' file names that do not name the subject.
_NOT_SUBJECT = re.compile(
    r"^(ROISignals_)|(_rois_\w+|_timeseries|_time_series|_bold|_roi_ts|_ts|\.feat)$"
)


@dataclass(frozen=True)
class ScanSource:
    """One scan on disk, found but not read.

    Attributes
    ----------
    path : pathlib.Path
        The file with the signal.
    kind : str
        volume, ptseries, dtseries, table, 1D, npy, npz, mat or parquet.
    pipeline : str
        fmriprep, xcpd, or empty.
    subject_id, session, task, run, space, atlas : str
        BIDS entities of the file's name (subject without ``sub-``); empty where it has none.
    tr : float or None
        Repetition time of the sidecar, as written there (seconds in BIDS), unchecked.
    tr_source : str
        Where `tr` comes from, or why the sidecar gave none.
    sidecar, confounds, mask, regions : pathlib.Path or None
        JSON with the TR, confounds or motion table, brain mask, regions.tsv.
    extra : tuple of pathlib.Path
        Label files (.dlabel.nii) that could parcellate a .dtseries.nii.
    """

    path: Path
    kind: str
    subject_id: str
    session: str = ""
    task: str = ""
    run: str = ""
    space: str = ""
    atlas: str = ""
    pipeline: str = ""
    tr: float | None = None
    tr_source: str = ""
    sidecar: Path | None = None
    confounds: Path | None = None
    mask: Path | None = None
    regions: Path | None = None
    extra: tuple[Path, ...] = ()

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file that decides what `read_scan` returns."""
        beside = [self.sidecar, self.confounds, self.mask, self.regions, *self.extra]
        if self.confounds is not None:
            facts = self.confounds.with_suffix(".json")  # which components CompCor retained
            beside.append(facts if facts.is_file() else None)
        return (self.path, *(path for path in beside if path is not None))


def kind_of(path: Path) -> str:
    """Which reader a file's name asks for, or an empty string."""
    name = path.name
    if name.startswith(".") or name.endswith(_NO_SERIES + _NO_SERIES_PAIRS):
        return ""
    lowered = name.lower()
    return next((kind for end, kind in KINDS.items() if lowered.endswith(end.lower())), "")


def find_scans(
    source: str | Path, atlas: str | None = None, space: str | None = None
) -> list[ScanSource]:
    """Find the scans of a folder (or take one file) and what lies beside them.

    In a folder with outputs of XCP-D only its parcellated series count (its denoised volumes when
    there are none), with outputs of fMRIPrep only its preprocessed BOLD series. Of several
    versions of one scan the MNI volume comes first, then CIFTI, then native space.

    Parameters
    ----------
    source : path
        A folder of derivatives, of single files, or of our own Parquet; or one file.
    atlas : str, optional
        Chooses among the atlases of XCP-D, by name.
    space : str, optional
        Chooses among the versions of a scan by the BIDS entity ``space``, for example fsLR.

    Returns
    -------
    list of ScanSource
        Sorted by path. Files are listed by name; whether they can be read is not known yet.

    Raises
    ------
    CohortError
        Nothing there, no file of a known kind, or a choice that only the user can make.
    """
    source = Path(source)
    if source.is_file():
        return [_single(source)]
    if not source.is_dir():
        raise CohortError(
            f"{source}: expected a folder with scans or one scan, found nothing. Check the path."
        )
    if (source / "cohort.json").is_file() or (source / "timeseries" / "bold.parquet").is_file():
        return _parquet_scans(source)
    files = _walk(source)
    chosen, pipeline = _candidates(files)
    if pipeline == "xcpd":
        chosen = _of_atlas(chosen, atlas, source)
    if space is not None:
        chosen = _of_space(chosen, space, source)
    if pipeline:
        chosen = _best_versions(chosen)
    if not chosen:
        ends = Counter("".join(path.suffixes[-2:]) or path.name for path in files)
        raise CohortError(
            f"{source}: expected scans ({', '.join(KINDS)}), found none among {len(files)} files "
            f"({some([f'{count} x {end}' for end, count in ends.most_common()]) or 'empty'}). "
            "Point to the folder that holds them."
        )
    return _describe(chosen, files, source, pipeline)


def _single(path: Path) -> ScanSource:
    """One file that the user named: always a scan, whatever its name says."""
    if not kind_of(path):
        advice = "Convert it."
        if path.suffix == ".parquet":
            advice = "Give the cohort's folder instead of one of its Parquet files."
        raise CohortError(
            f"{path}: expected a scan ({', '.join(KINDS)}), found another kind of file. {advice}"
        )
    files = [item for item in sorted(path.parent.iterdir()) if item.is_file()]
    pipeline = "xcpd" if _XCPD.search(path.name) else ""
    pipeline = "fmriprep" if _FMRIPREP.search(path.name) else pipeline
    return _describe([path], files, path.parent, pipeline)[0]


def _walk(source: Path) -> list[Path]:
    """All files below a folder, sorted; hidden ones and hidden folders left out.

    Links to folders are followed, as clusters lay out their data, but no folder is entered twice.
    """
    found, entered = [], {source.resolve()}
    for folder, folders, names in os.walk(source, followlinks=True):
        inside = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            place = Path(folder, name).resolve()
            if place not in entered:
                entered.add(place)
                inside.append(name)
        folders[:] = inside
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _candidates(files: list[Path]) -> tuple[list[Path], str]:
    """Files that are scans by their names, and the pipeline that wrote them."""
    patterns: list[tuple[str, Callable[[str], object]]] = [
        ("xcpd", _XCPD.search),
        ("xcpd", _XCPD_VOLUME.search),
        ("fmriprep", _FMRIPREP.search),
    ]
    for pipeline, matches in patterns:
        found = [path for path in files if matches(path.name)]
        if found:
            return found, pipeline
    found = []
    for path in files:
        kind, stem = kind_of(path), path.name.split(".")[0]
        beside = _BESIDE_TABLE if kind == "table" else _BESIDE_VOLUME
        if kind and not (kind in ("table", "volume") and beside.search(stem)):
            found.append(path)
    return found, ""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _atlas_of(path: Path) -> str:
    parts = entities(path.name)
    return parts.get("seg") or parts.get("atlas") or ""


def _of_atlas(paths: list[Path], atlas: str | None, source: Path) -> list[Path]:
    """Of XCP-D's series, those of one atlas; tables before CIFTI with the same numbers."""
    names = sorted({_atlas_of(path) for path in paths} - {""})
    if len(names) > 1:
        wanted = _plain(Path(atlas).name.split(".")[0]) if atlas else ""
        same = [name for name in names if _plain(name) == wanted]
        same = same or [name for name in names if wanted and _plain(name) in wanted]
        if len(same) != 1:
            raise CohortError(
                f"{source}: expected the series of one atlas, found {len(names)}: "
                f"{some(names, 20)}; asked for {atlas or 'none'}. Name one of them as the atlas, "
                "or a label volume whose file name holds one of these names."
            )
        paths = [path for path in paths if _atlas_of(path) == same[0]]
    tables = {scan_key(path) for path in paths if path.name.endswith(".tsv")}
    return [p for p in paths if p.name.endswith(".tsv") or scan_key(p) not in tables]


def _of_space(paths: list[Path], space: str, source: Path) -> list[Path]:
    spaces = sorted({entities(path.name).get("space", "") for path in paths})
    if space not in spaces:
        raise CohortError(
            f"{source}: expected scans in space {space}, found the spaces "
            f"{some([name or 'native' for name in spaces], 20)}. Choose one of these."
        )
    return [path for path in paths if entities(path.name).get("space", "") == space]


def _rank(path: Path) -> tuple:
    """Order of preference among versions of one scan; smaller is better."""
    parts, kind = entities(path.name), kind_of(path)
    space = parts.get("space", "")
    if kind in ("volume", "table") and space.startswith("MNI"):
        place = 0
    else:
        place = 1 if kind.endswith("tseries") else 2
    desc = parts.get("desc", "")
    order = ("preproc", "denoised", "optcom", "smoothAROMAnonaggr")
    return (
        place,
        "echo" in parts,
        "NLin2009cAsym" not in space,
        order.index(desc) if desc in order else len(order),
        path.name,
    )


def _best_versions(paths: list[Path]) -> list[Path]:
    best: dict[tuple, Path] = {}
    for path in paths:
        key = scan_key(path)
        if key not in best or _rank(path) < _rank(best[key]):
            best[key] = path
    return sorted(best.values())


def _describe(
    paths: list[Path], files: list[Path], source: Path, pipeline: str
) -> list[ScanSource]:
    """Subjects, sidecars and neighbours of the chosen files."""
    subjects = _subjects(paths, source)
    folders: dict[Path, list[Path]] = {}
    for path in files:
        folders.setdefault(path.parent, []).append(path)
    labels = tuple(path for path in files if path.name.endswith(".dlabel.nii"))
    sidecars = Sidecars(files)
    found = []
    for path, subject in zip(paths, subjects, strict=True):
        parts, kind = entities(path.name), kind_of(path)
        sidecar, tr, tr_source = sidecars.find(path)
        found.append(
            ScanSource(
                path,
                kind,
                subject,
                parts.get("ses", ""),
                parts.get("task", ""),
                parts.get("run", ""),
                parts.get("space", ""),
                _atlas_of(path),
                pipeline,
                tr,
                tr_source,
                sidecar,
                neighbour(path, folders[path.parent], CONFOUNDS) if pipeline else None,
                neighbour(path, folders[path.parent], MASK) if pipeline == "fmriprep" else None,
                upwards(path.parent, "regions.tsv", source),
                labels if kind == "dtseries" else (),
            )
        )
    return found


def _subjects(paths: list[Path], source: Path) -> list[str]:
    """A subject for every file: ``sub-`` in name or folders, HCP's folder, or the file's name."""
    names = []
    for path in paths:
        inside = path.relative_to(source)
        folders = [part for part in inside.parts[:-1] if part.startswith("sub-")]
        if "sub" in (parts := entities(path.name)):
            names.append(parts["sub"])
        elif folders:
            names.append(folders[0].removeprefix("sub-"))
        elif "MNINonLinear" in inside.parts[1:]:  # HCP: 100307/MNINonLinear/Results/...
            names.append(inside.parts[inside.parts.index("MNINonLinear") - 1])
        else:
            end = next(end for end in KINDS if path.name.lower().endswith(end.lower()))
            stem = path.name[: -len(end)]
            names.append(_NOT_SUBJECT.sub("", stem) or stem)
    doubled = {name for name, count in Counter(names).items() if count > 1}
    for place, path in enumerate(paths):
        folder = path.relative_to(source).parent.as_posix()
        known = "sub-" in path.relative_to(source).as_posix() or "MNINonLinear" in path.parts
        if names[place] in doubled and not known and folder != ".":
            names[place] = folder.replace("/", "_")  # one folder per subject, the same name in each
    return names


def _parquet_scans(source: Path) -> list[ScanSource]:
    """One scan for each participant of a prepared cohort or a folder of tables."""
    tables = source / "timeseries" / "bold.parquet"
    found = []
    if not (source / "cohort.json").is_file():
        table = read_table(source / "participants.tsv")
        if "participant_id" not in table:
            raise CohortError(
                f"{source / 'participants.tsv'}: expected a column participant_id, found "
                f"{some(list(table), 8)}. Name the column of the subjects participant_id."
            )
        regions = source / "regions.tsv"
        for subject in table["participant_id"]:
            found.append(
                ScanSource(
                    tables, "parquet", subject, regions=regions if regions.is_file() else None
                )
            )
        return found
    for shard in sorted((source / "data").glob("scans-*.parquet")):
        table = read_parquet(shard)
        if not {"subject_id", "session"} <= set(table.column_names):
            raise CohortError(
                f"{shard}: expected the columns subject_id and session, found "
                f"{some(table.column_names, 8)}. Write the cohort again."
            )
        pairs = zip(table["subject_id"].to_pylist(), table["session"].to_pylist(), strict=True)
        found += [ScanSource(shard, "parquet", str(s), str(v or "")) for s, v in pairs]
    if not found:
        raise CohortError(
            f"{source / 'data'}: expected shards scans-*.parquet, found none. Copy it again."
        )
    return found
