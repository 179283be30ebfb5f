"""The atlases that are known by name: their files in a folder, or nilearn's fetchers."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .atlas_tables import label_table
from .series import CohortError, some

NAMES = (
    *(f"schaefer{count}" for count in range(100, 1100, 100)),
    *("aal", "aal3", "cc200", "cc400", "harvard-oxford", "a424"),
    *(f"tian-s{scale}" for scale in range(1, 5)),
)
#: Other spellings, compared without case and without anything but letters and digits.
ALIASES = {"ho": "harvard-oxford", "aal1": "aal", "aal116": "aal", "aal166": "aal3"}
#: FSL's subcortical Harvard-Oxford map also holds tissue, which is no region of an atlas.
NOT_REGIONS = ("white matter", "cerebral cortex", "ventric", "background")


@dataclass(frozen=True)
class KnownAtlas:
    """What is known of an atlas before any file is read.

    Attributes
    ----------
    name : str
        Its canonical name.
    prefix : str
        What regions are called, with their value behind it, where no table names them.
    space : str
        Template space of its label volume.
    volumes, tables : tuple of str
        Patterns of file names (lower case, without .nii or .nii.gz for volumes), best first.
    """

    name: str
    prefix: str
    space: str
    volumes: tuple[str, ...]
    tables: tuple[str, ...]


def known_atlas(name: str) -> KnownAtlas:
    """The atlas that `name` means.

    Raises
    ------
    CohortError
        No such atlas; the nearest names are given.
    """
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    match = re.fullmatch(r"schaefer(?:2018)?(\d+?)(?:parcels)?(?:(7|17)(?:n|networks)?)?", plain)
    if match and f"schaefer{match[1]}" in NAMES:
        count, networks = match[1], match[2] or "7"
        stem = rf"schaefer2018_{count}parcels_{networks}networks_order"
        bids = rf".*atlas-schaefer2018_desc-{count}parcels{networks}networks_dseg"
        return KnownAtlas(
            f"schaefer{count}" + ("" if networks == "7" else "-17"),
            f"Schaefer{count}",
            "MNI152NLin6Asym",
            (rf"{stem}_fslmni152_2mm", rf"{stem}_fslmni152_.*", bids),
            (rf"{stem}\.txt", rf"{bids}\.tsv"),
        )
    plain = ALIASES.get(plain, plain)
    for known in _KNOWN:
        if re.sub(r"[^a-z0-9]", "", known.name) == re.sub(r"[^a-z0-9]", "", plain):
            return known
    near = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.5)
    raise CohortError(
        f"Expected the name of an atlas or the path of a label volume (.nii, .nii.gz), found "
        f"{name!r}. {f'Did you mean {some(near)}? ' if near else ''}Names: schaefer100 to "
        f"schaefer1000, {', '.join(NAMES[10:])}."
    )


_KNOWN = (
    KnownAtlas(
        "aal",
        "AAL",
        "MNIColin27",
        (r"aal(_spm12)?(_2mm)?", r"roi_mni_v4", r"aal_roi_atlas", r"abide_pcp_aal_3mm"),
        (r"aal(_spm12)?\.xml", r"roi_mni_v4\.(xml|txt)"),
    ),
    KnownAtlas(
        "aal3",
        "AAL3",
        "MNIColin27",
        (r"aal3v1(_2mm)?", r"aal3(v1)?(_.*)?"),
        (r"aal3v1\.xml", r"aal3(v1)?(_.*)?\.(xml|tsv)"),
    ),
    KnownAtlas(
        "cc200",
        "CC200",
        "MNI152",
        (r"cc200_roi_atlas", r"abide_pcp_cc200_3mm", r"cc200(_.*)?"),
        (r"cc200_roi_labels\.csv", r"cc200_labels\.csv"),
    ),
    KnownAtlas(
        "cc400",
        "CC400",
        "MNI152",
        (r"cc400_roi_atlas", r"abide_pcp_cc400_3mm", r"cc400(_.*)?"),
        (r"cc400_roi_labels\.csv", r"cc400_labels\.csv"),
    ),
    KnownAtlas(
        "harvard-oxford",
        "HO",
        "MNI152NLin6Asym",
        (r"ho_roi_atlas", r"abide_pcp_ho_3mm", r"harvardoxford(_.*)?"),
        (r"ho_labels\.(csv|tsv)", r"harvardoxford(_.*)?\.tsv"),
    ),
    # "+" holds all 424 regions; the plain file lost one when it was resampled.
    KnownAtlas("a424", "A424", "MNI152", (r"a424\+2mm", r"a424"), (r"a424_coordinates\.dat",)),
    *(
        KnownAtlas(
            f"tian-s{scale}",
            f"TianS{scale}",
            "MNI152NLin6Asym",
            (rf"tian_subcortex_s{scale}_3t(_2mm)?", rf"tian_subcortex_s{scale}_3t_.*"),
            (rf"tian_subcortex_s{scale}_3t_label\.txt",),
        )
        for scale in range(1, 5)
    ),
)


def find_known(known: KnownAtlas, folder: Path) -> tuple[Path, Path | None]:
    """Label volume of a known atlas, and its table if there is one, in a folder or below.

    Raises
    ------
    CohortError
        No such folder, or no label volume in it.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CohortError(f"{folder}: expected a folder of atlases, found {found}.")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    volumes = [path for path in files if path.name.lower().endswith((".nii", ".nii.gz"))]
    volume = _first(volumes, tuple(rf"{pattern}\.nii(\.gz)?" for pattern in known.volumes))
    if volume is None:
        raise CohortError(
            f"{folder}: expected the label volume of atlas {known.name} (a file called like "
            f"{_readable(known.volumes)}), found {len(volumes)} other volumes"
            f"{': ' + some([path.name for path in volumes]) if volumes else ''}. Put it there, or "
            "give the path of a label volume instead of a name."
        )
    return volume, _first(files, known.tables)


def _first(files: list[Path], patterns: tuple[str, ...]) -> Path | None:
    """The first file that fits the first pattern that any file fits."""
    for pattern in patterns:
        for path in files:
            if re.fullmatch(pattern, path.name, re.IGNORECASE):
                return path
    return None


def _readable(patterns: tuple[str, ...]) -> str:
    return re.sub(r"\\|\(_\.\*\)\?|\(|\)\?|\)", "", patterns[0]) + ".nii.gz"


def fetch_atlas(known: KnownAtlas) -> tuple[Any, pd.DataFrame]:
    """Label volume and table of a known atlas through nilearn's fetchers and their cache.

    Returns
    -------
    nibabel image, shape (x, y, z)
    pandas.DataFrame
        As `label_table` makes it.

    Raises
    ------
    CohortError
        nilearn has no fetcher for it, or could not fetch it.
    """
    if known.name == "a424" or known.name.startswith("tian"):
        raise CohortError(
            f"atlas {known.name}: expected a folder that holds it, found none: nilearn does not "
            f"fetch it. Put {_readable(known.volumes)} into a folder and name that folder "
            "(--atlas-folder)."
        )
    try:
        from nilearn import datasets
    except ModuleNotFoundError:
        raise CohortError(
            "Fetching an atlas needs nilearn: pip install 'cortexicon[io]', or name a folder that "
            "holds the atlas (--atlas-folder)."
        ) from None
    try:
        return _fetch(known, datasets)
    # NOTE: a fetcher raises what its download meets: requests, urllib, tar, XML errors.
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CohortError(
            f"atlas {known.name}: nilearn could not fetch it ({text[:200]}). Without a network, "
            "put label volume and table into a folder and name that folder (--atlas-folder)."
        ) from None


def _fetch(known: KnownAtlas, datasets: Any) -> tuple[Any, pd.DataFrame]:
    import nibabel

    if known.name.startswith("schaefer"):
        count = int(re.sub(r"-17$|\D", "", known.name))
        networks = 17 if known.name.endswith("-17") else 7
        got = datasets.fetch_atlas_schaefer_2018(count, networks, 2, verbose=0)
        return nibabel.load(got.maps), _from_lut(got.lut)
    if known.name in ("aal", "aal3"):
        got = datasets.fetch_atlas_aal("SPM12" if known.name == "aal" else "3v2", verbose=0)
        return nibabel.load(got.maps), _from_lut(got.lut)
    if known.name == "harvard-oxford":
        return _fetch_harvard_oxford(datasets)
    # Craddock's file stacks label volumes of 10 to 1000 clusters; the name's number picks one.
    got = datasets.fetch_atlas_craddock_2012(verbose=0, homogeneity="temporal", grp_mean=False)
    stack = nibabel.load(got.maps)
    data = np.asanyarray(stack.dataobj)
    counts = [len(np.unique(data[..., place])) - 1 for place in range(data.shape[3])]
    wanted = {"cc200": 200, "cc400": 392}[known.name]  # as many as PCP's volumes have
    place = int(np.argmin(np.abs(np.array(counts) - wanted)))
    return nibabel.Nifti1Image(data[..., place], stack.affine), label_table([])


def _fetch_harvard_oxford(datasets: Any) -> tuple[Any, pd.DataFrame]:
    """Cortex, each region split by hemisphere, and the subcortical nuclei, in one label volume."""
    import nibabel

    cortex = datasets.fetch_atlas_harvard_oxford(
        "cort-maxprob-thr25-2mm", symmetric_split=True, verbose=0
    )
    below = datasets.fetch_atlas_harvard_oxford("sub-maxprob-thr25-2mm", verbose=0)
    data = np.array(cortex.maps.dataobj, dtype=np.int32)
    rows = [(value, name) for value, name in enumerate(cortex.labels) if value]
    nuclei = np.asanyarray(below.maps.dataobj)
    for value, name in enumerate(below.labels):
        if any(word in name.lower() for word in NOT_REGIONS):
            continue
        data[(nuclei == value) & (data == 0)] = len(cortex.labels) + value
        rows.append((len(cortex.labels) + value, name))
    return nibabel.Nifti1Image(data, cortex.maps.affine), label_table(rows)


def _from_lut(lut: pd.DataFrame) -> pd.DataFrame:
    pairs = zip(lut["index"], lut["name"], strict=True)
    return label_table([(int(value), str(name)) for value, name in pairs if int(value)])
