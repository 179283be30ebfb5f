"""Public cohorts over nilearn's fetchers, in a layout that `cortexicon prepare` reads.

A fetch leaves::

    OUT/download/         what nilearn wrote, in its own layout; it is not downloaded again
    OUT/scans/            the scans (links to the same files), each with its repetition time
    OUT/participants.tsv  participant_id, site, tr (s), age (years), sex (F, M), diagnosis, ...
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from .series import CohortError, some

#: Parcellations in which the ABIDE preprocessed release holds region series.
ABIDE_ATLASES = ("cc200", "cc400", "aal", "ho", "ez", "tt", "dosenbach160")
#: Repetition times (s) of ABIDE I by site, from the acquisition tables of the release: neither the
#: series nor the phenotypes hold them.
ABIDE_TR = {
    "CALTECH": 2.0,
    "CMU": 2.0,
    "KKI": 2.5,
    "LEUVEN_1": 1.656,
    "LEUVEN_2": 1.656,
    "MAX_MUN": 3.0,
    "NYU": 2.0,
    "OHSU": 2.5,
    "OLIN": 1.5,
    "PITT": 1.5,
    "SBL": 2.2,
    "SDSU": 2.0,
    "STANFORD": 2.0,
    "TRINITY": 2.0,
    "UCLA_1": 3.0,
    "UCLA_2": 3.0,
    "UM_1": 2.0,
    "UM_2": 2.0,
    "USM": 2.0,
    "YALE": 2.0,
}
#: Numbers that these phenotypes hold for "unknown".
_UNKNOWN = (-9999, -999, -99)
#: Columns of the regressors of the ADHD data, and what fMRIPrep calls them.
_ADHD_CONFOUNDS = {
    "motion-x": "trans_x",
    "motion-y": "trans_y",
    "motion-z": "trans_z",
    "motion-pitch": "rot_x",
    "motion-roll": "rot_y",
    "motion-yaw": "rot_z",
    "csf": "csf",
    "wm": "white_matter",
    "global": "global_signal",
    **{f"compcor{number + 1}": f"a_comp_cor_{number:02d}" for number in range(5)},
}


class Fetched(NamedTuple):
    """What a fetch left on disk.

    Attributes
    ----------
    scans : pathlib.Path
        Folder with the scans.
    participants : pathlib.Path
    num_scans : int
    atlas : str
        Parcellation of the scans; empty for volumes.
    left_out : dict of str to str
        Subjects without a usable scan, and why. A further fetch tries them again.
    """

    scans: Path
    participants: Path
    num_scans: int
    atlas: str
    left_out: dict[str, str]


class _Scan(NamedTuple):
    """A downloaded file and the name it gets in the folder of scans."""

    subject: str
    path: Path
    name: str
    tr: float
    confounds: pd.DataFrame | None = None


def fetch_cohort(
    name: str,
    out: str | Path,
    num_subjects: int | None = None,
    atlas: str | None = None,
    quiet: bool = False,
) -> Fetched:
    """Download a public cohort, or what is missing of it.

    Parameters
    ----------
    name : {"abide", "adhd", "development"}
        ABIDE I as region series of the preprocessed release (C-PAC, no band-pass, no global signal
        regression; 1035 scans); forty volumes of ADHD-200; volumes of 155 children and adults who
        watched a film. Their terms of use stand with nilearn's fetchers.
    out : path
        Folder to write into.
    num_subjects : int, optional
        Default: all.
    atlas : str, optional
        One of `ABIDE_ATLASES`, for "abide" only. Default there: cc200.
    quiet : bool
        Show no progress.

    Raises
    ------
    CohortError
        Unknown name or atlas, no network, a server that answers with something else, or no scan.
    """
    fetchers: dict[str, Callable[..., tuple[list[_Scan], pd.DataFrame, dict[str, str]]]] = {
        "abide": _fetch_abide,
        "adhd": _fetch_adhd,
        "development": _fetch_development,
    }
    if name not in fetchers:
        raise CohortError(f"expected one of {', '.join(fetchers)}, found {name!r}.")
    if num_subjects is not None and num_subjects < 1:
        raise CohortError(f"expected at least 1 subject, found {num_subjects}.")
    if atlas is not None and (name != "abide" or atlas not in ABIDE_ATLASES):
        raise CohortError(
            f"expected an atlas of {', '.join(ABIDE_ATLASES)} with abide, found {atlas!r} with "
            f"{name}. The volumes of adhd and development get their atlas from `prepare`."
        )
    out = Path(out)
    atlas = (atlas or "cc200") if name == "abide" else ""
    given = (out / "download", num_subjects, quiet) + ((atlas,) if atlas else ())
    with _named_faults(name, out / "download"):
        scans, participants, left_out = fetchers[name](*given)
    usable = []
    for scan in scans:
        problem = _problem(scan.path)
        if problem:
            scan.path.unlink()  # or nilearn would take it for downloaded
            left_out[scan.subject] = problem
        else:
            usable.append(scan)
    if not usable:
        first = next(iter(left_out.values()), "the server lists no subject")
        raise CohortError(f"{out}: expected scans of {name}, found none. {first}")
    try:
        _write(out, usable, participants)
    except OSError as error:
        raise CohortError(
            f"{out}: expected to write the scans, found: {error}. Check space and permissions."
        ) from error
    return Fetched(out / "scans", out / "participants.tsv", len(usable), atlas, left_out)


@contextmanager
def _named_faults(name: str, folder: Path) -> Iterator[None]:
    """Faults of the network and of what came over it, as messages of ours."""
    import requests

    again = "What was downloaded stays; run the same command again to go on."
    try:
        yield
    except requests.HTTPError as error:
        code = "an error" if error.response is None else f"status {error.response.status_code}"
        url = "" if error.request is None else f" for {error.request.url!s}"
        raise CohortError(
            f"fetch {name}: expected a file, found {code}{url}. The server may be down. {again}"
        ) from error
    except requests.RequestException as error:
        url = "" if error.request is None else f" to {error.request.url!s}"
        raise CohortError(
            f"fetch {name}: no connection{url} ({type(error).__name__}). Check the network, or "
            f"fetch where there is one and copy the folder. {again}"
        ) from error
    except CohortError:
        raise
    except (OSError, ValueError, KeyError) as error:
        # What nilearn raises when a table or an archive is not what it expects.
        pages = [path for path in sorted(folder.rglob("*")) if _is_page(path)]
        for path in pages:
            path.unlink()
        found = f"web pages in place of {some(pages)}" if pages else f"{error}"
        raise CohortError(
            f"fetch {name}: expected the files of nilearn's fetcher, found {found}. {again}"
        ) from error


def _fetch_abide(
    folder: Path, num_subjects: int | None, quiet: bool, atlas: str
) -> tuple[list[_Scan], pd.DataFrame, dict[str, str]]:
    """Region series of the ABIDE preprocessed release, subject by subject."""
    import requests
    from nilearn.datasets import fetch_abide_pcp

    def fetch(**chosen: Any) -> Any:
        return fetch_abide_pcp(
            data_dir=folder,
            pipeline="cpac",
            derivatives=[f"rois_{atlas}"],
            quality_checked=False,
            verbose=0,
            **chosen,
        )

    fetch(n_subjects=0)  # the phenotypes alone
    table = _abide_participants(_abide_table(folder)).iloc[:num_subjects]
    scans, left_out = [], {}
    for row in tqdm(table.itertuples(), total=len(table), unit="scan", disable=quiet):
        subject = str(row.participant_id)
        if np.isnan(row.tr):
            left_out[subject] = f"no repetition time is known of site {row.site}"
            continue
        try:
            fetch(SUB_ID=[int(row.sub_id)])
        except requests.HTTPError as error:
            code = None if error.response is None else error.response.status_code
            left_out[subject] = f"the server answered with status {code}"
            continue
        except ValueError:  # nilearn reads the numbers, and a web page holds none
            pass
        path = folder / "ABIDE_pcp" / "cpac" / "nofilt_noglobal" / f"{subject}_rois_{atlas}.1D"
        if not path.is_file():
            left_out[subject] = "the server sent no file"
            continue
        scans.append(_Scan(subject, path, path.name, float(row.tr)))
    return scans, table, left_out


def _abide_table(folder: Path) -> pd.DataFrame:
    """The phenotypes that nilearn downloaded, of subjects with a scan."""
    path = folder / "ABIDE_pcp" / "Phenotypic_V1_0b_preprocessed1.csv"
    table = pd.read_csv(path, encoding="utf-8", encoding_errors="replace", low_memory=False)
    return table[table["FILE_ID"] != "no_filename"]


def _abide_participants(raw: pd.DataFrame) -> pd.DataFrame:
    """Phenotypes of ABIDE I in the columns of BIDS."""
    table = pd.DataFrame({"participant_id": raw["FILE_ID"], "sub_id": raw["SUB_ID"]})
    table["site"] = raw["SITE_ID"]
    table["tr"] = raw["SITE_ID"].map(ABIDE_TR).astype(float)
    table["age"] = raw["AGE_AT_SCAN"]
    table["sex"] = raw["SEX"].map({1: "M", 2: "F"})
    table["diagnosis"] = raw["DX_GROUP"].map({1: "ASD", 2: "control"})
    names = {"HANDEDNESS_CATEGORY": "handedness", "EYE_STATUS_AT_SCAN": "eyes"}
    names |= {name: name.lower() for name in ("FIQ", "VIQ", "PIQ", "func_mean_fd")}
    for old, new in names.items():
        if old in raw:
            table[new] = raw[old]
    if "eyes" in table:
        table["eyes"] = table["eyes"].map({1: "open", 2: "closed"})
    # The raters whose verdict nilearn's own filter asks for; the others' scans are kept and marked.
    verdicts = {
        "qc_rater_1": ("OK",),
        "qc_anat_rater_2": ("OK", "maybe"),
        "qc_func_rater_2": ("OK", "maybe"),
        "qc_anat_rater_3": ("OK",),
        "qc_func_rater_3": ("OK",),
    }
    passed = [raw[name].isin(good) for name, good in verdicts.items() if name in raw]
    table["recommended"] = np.logical_and.reduce(passed) if passed else True
    return table.reset_index(drop=True)


def _fetch_adhd(
    folder: Path, num_subjects: int | None, quiet: bool
) -> tuple[list[_Scan], pd.DataFrame, dict[str, str]]:
    """Volumes and regressors of forty subjects of ADHD-200."""
    from nilearn.datasets import fetch_adhd

    found = fetch_adhd(n_subjects=num_subjects, data_dir=folder, verbose=0 if quiet else 1)
    raw = found["phenotypic"]
    table = pd.DataFrame({"participant_id": raw["Subject"].astype(str).str.zfill(7)})
    table["site"] = raw.get("site", "ADHD-200")
    table["tr"] = float(found["t_r"])
    for name in ("age", "sex", "handedness", "full_2_iq", "full_4_iq", "viq", "piq"):
        if name in raw:
            table[name] = raw[name]
    if "adhd" in raw:
        table["diagnosis"] = raw["adhd"].map({0: "control", 1: "ADHD"})
    if "MeanFD" in raw:
        table["mean_fd"] = raw["MeanFD"]
    scans = []
    for bold, regressors in zip(found["func"], found["confounds"], strict=True):
        subject = Path(bold).parent.name
        scans.append(
            _Scan(
                subject,
                Path(bold),
                f"sub-{subject}_task-rest_space-MNI152_desc-preproc_bold.nii.gz",
                float(found["t_r"]),
                _adhd_confounds(Path(regressors)),
            )
        )
    return scans, table.reset_index(drop=True), {}


def _adhd_confounds(path: Path) -> pd.DataFrame:
    """Regressors of one scan under fMRIPrep's names, with the expansions of the motion.

    NOTE: rotations keep their unit. A regression does not see it; a displacement would.
    """
    raw = pd.read_csv(path, sep=None, engine="python")
    table = raw.rename(columns=_ADHD_CONFOUNDS)[
        [new for old, new in _ADHD_CONFOUNDS.items() if old in raw]
    ]
    for name in [name for name in table if re.match("trans_|rot_|csf|white|global", name)]:
        table[f"{name}_derivative1"] = table[name].diff()
        table[f"{name}_power2"] = table[name] ** 2
        table[f"{name}_derivative1_power2"] = table[f"{name}_derivative1"] ** 2
    return table


def _fetch_development(
    folder: Path, num_subjects: int | None, quiet: bool
) -> tuple[list[_Scan], pd.DataFrame, dict[str, str]]:
    """Volumes and confounds of children and adults watching a film."""
    from nilearn.datasets import fetch_development_fmri

    found = fetch_development_fmri(
        n_subjects=num_subjects,
        reduce_confounds=False,
        data_dir=folder,
        verbose=0 if quiet else 1,
    )
    raw = found["phenotypic"]
    table = pd.DataFrame({"participant_id": raw["participant_id"], "site": "MIT"})
    table["tr"] = float(found["t_r"])
    names = {"Age": "age", "Gender": "sex", "Handedness": "handedness"}
    for old, new in (names | {"AgeGroup": "age_group", "Child_Adult": "child_adult"}).items():
        table[new] = raw[old]
    scans = []
    for bold, confounds in zip(found["func"], found["confounds"], strict=True):
        path = Path(bold)
        read = pd.read_csv(confounds, sep="\t", na_values="n/a")
        scans.append(_Scan(path.name.split("_")[0], path, path.name, float(found["t_r"]), read))
    return scans, table.reset_index(drop=True), {}


def _is_page(path: Path) -> bool:
    """Whether a file holds a web page, which some servers send in place of an error."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(200).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _problem(path: Path) -> str:
    """Why a downloaded file is no scan; empty when it looks like one."""
    with path.open("rb") as file:
        first = file.read(2)
    if not first:
        return "the server sent an empty file"
    if _is_page(path):
        return "the server sent a web page in place of the scan"
    if path.name.endswith(".gz") and first != b"\x1f\x8b":
        return f"the server sent a file that is not compressed (first bytes {first!r})"
    return ""


def _write(out: Path, scans: list[_Scan], participants: pd.DataFrame) -> None:
    """Links, repetition times and confounds of the scans, and the participants table."""
    folder = out / "scans"
    folder.mkdir(parents=True, exist_ok=True)
    for scan in scans:
        target = folder / scan.name
        target.unlink(missing_ok=True)
        try:
            os.link(scan.path, target)
        except OSError:  # another file system, or one without links
            shutil.copyfile(scan.path, target)
        sidecar = folder / f"{scan.name.split('.')[0]}.json"
        sidecar.write_text(json.dumps({"RepetitionTime": scan.tr}) + "\n")
        if scan.confounds is not None:
            stem = re.split("_space-|_desc-", scan.name)[0]
            confounds = folder / f"{stem}_desc-confounds_timeseries.tsv"
            scan.confounds.to_csv(confounds, sep="\t", index=False, na_rep="n/a")
    kept = participants["participant_id"].astype(str).isin([scan.subject for scan in scans])
    table = participants[kept].replace(list(_UNKNOWN), np.nan)
    if "sex" in table:
        table["sex"] = table["sex"].replace({"Female": "F", "Male": "M", "f": "F", "m": "M"})
    partial = out / ".participants.tsv.partial"
    table.to_csv(partial, sep="\t", index=False, na_rep="n/a")
    os.replace(partial, out / "participants.tsv")
