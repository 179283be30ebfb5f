"""Parcellations: label volumes with names, centres, sizes, hemispheres, space and a fingerprint."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .atlas_files import KnownAtlas, fetch_atlas, find_known, known_atlas
from .atlas_tables import read_labels
from .images import load_image, read_image
from .series import CohortError, check_labels, some

#: A region whose centre is nearer to the midline than this, in mm, belongs to both hemispheres.
MIDLINE_MM = 3.0
#: More labels than this are not a parcellation but an image of something else.
MAX_REGIONS = 20_000
# A lone letter says it only at the end: in Tian's HIP-head-l-rh it means lateral.
SIDES = (
    (re.compile(r"(^|[_\-. ])(lh|left)([_\-. ]|$)|[_\-. ]l$", re.IGNORECASE), "L"),
    (re.compile(r"(^|[_\-. ])(rh|right)([_\-. ]|$)|[_\-. ]r$", re.IGNORECASE), "R"),
)


@dataclass(frozen=True, eq=False)
class Atlas:
    """A parcellation, and all of it that travels with a cohort.

    Attributes
    ----------
    name : str
        ``cc200``, ``schaefer400``, ... or the stem of the label volume.
    labels : tuple of str
        Region names in the order of `values`.
    values : tuple of int
        What the regions are called in the label volume, ascending.
    coordinates : numpy.ndarray of float32, shape (regions, 3)
        Centres of mass in mm, in the atlas's space.
    sizes : numpy.ndarray of int64, shape (regions,)
        Voxels of the label volume; 0 for a region that only the table knows.
    hemispheres : tuple of str
        L, R, or B for both: by name where the name says it, else by the centre.
    space : str
        ``MNI152NLin6Asym``, ``MNIColin27``, ... or ``unknown``.
    sha256 : str
        Of grid, label data and table; the same whatever the file's compression or number type.
    image : nibabel.Nifti1Image or None
        The label volume as int32, background 0. None for atlases of surfaces.
    """

    name: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    coordinates: np.ndarray
    sizes: np.ndarray
    hemispheres: tuple[str, ...]
    space: str
    sha256: str
    image: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def regions_table(self) -> pd.DataFrame:
        """One row per region, as `read_regions` makes it.

        Returns
        -------
        pandas.DataFrame
            label, x, y, z (mm), size (voxels), hemisphere, atlas_value and column.
        """
        x, y, z = self.coordinates.astype(np.float64).round(2).T
        return pd.DataFrame(
            {
                "label": list(self.labels),
                "x": x,
                "y": y,
                "z": z,
                "size": self.sizes.astype(np.float64),
                "hemisphere": list(self.hemispheres),
                "atlas_value": [str(value) for value in self.values],
                "column": list(self.labels),
            }
        )


def load_atlas(
    name_or_path: str | Path,
    labels: Path | None = None,
    folder: Path | None = None,
    space: str | None = None,
) -> Atlas:
    """Load a parcellation by name, or any label volume by path.

    Names: ``schaefer100`` ... ``schaefer1000`` (``schaefer400-17`` with 17 networks), ``aal``,
    ``aal3``, ``cc200``, ``cc400``, ``harvard-oxford``, ``a424``, ``tian-s1`` ... ``tian-s4``.

    Parameters
    ----------
    name_or_path : str or path
        One of the names, or a NIfTI label volume: whole numbers, 0 is background.
    labels : path, optional
        Table of the label values and their names: BIDS ``dseg.tsv``, a cohort's ``regions.tsv``,
        a colour table, AAL's or FSL's XML, or one name a line. Default: the one that belongs to
        the name, or the file that is called as the volume is. Without any, regions are named by
        their values.
    folder : path, optional
        Where to look for label volume and table of a name, subfolders included. Without it,
        nilearn fetches them (once; then they lie in its cache).
    space : str, optional
        Template space of the label volume. Default: what the name or the file's ``space-`` or
        ``tpl-`` says, else what its header says.

    Returns
    -------
    Atlas

    Raises
    ------
    CohortError
        An unknown name, files not found or not fetched, no label volume, or a table that does not
        fit it.
    """
    path = Path(name_or_path)
    if path.name.endswith((".nii", ".nii.gz", ".hdr", ".img")) or path.is_file():
        names = read_labels(labels or _table_beside(path))
        return _from_file(_stem(path), path, names, space or _space_of_name(path), None)
    known = known_atlas(str(name_or_path))
    if folder is not None:
        volume, table = find_known(known, Path(folder))
        names = read_labels(labels or table)
        return _from_file(known.name, volume, names, space or _space_of_name(volume), known)
    image, names = fetch_atlas(known)
    if labels is not None:
        names = read_labels(labels)
    data, where = np.asanyarray(image.dataobj), f"atlas {known.name}"
    return _build(known.name, data, image.affine, names, space or known.space, where, known)


def _from_file(
    name: str, path: Path, names: pd.DataFrame, space: str, known: KnownAtlas | None
) -> Atlas:
    image = load_image(path)
    shape = image.shape
    if len(shape) == 4 and shape[3] == 1:
        shape = shape[:3]
    if len(shape) != 3:
        raise CohortError(
            f"{path}: expected a label volume with three axes, found shape {image.shape}. "
            "Probability maps are no label volume; make one by giving each voxel to one region."
        )
    data = read_image(image, path).reshape(shape)
    if not space and known is not None:
        space = known.space
    if not space:
        code = int(image.header["sform_code"] or image.header["qform_code"])
        space = {3: "Talairach", 4: "MNI152"}.get(code, "unknown")
    return _build(name, data, image.affine, names, space, str(path), known)


def _build(
    name: str,
    data: np.ndarray,
    affine: np.ndarray,
    names: pd.DataFrame,
    space: str,
    where: str,
    known: KnownAtlas | None,
) -> Atlas:
    """An `Atlas` of label data (x, y, z), an affine to mm, and a table value -> name, x, y, z."""
    import nibabel

    grid = _whole_numbers(data, where)
    present = np.unique(grid)
    present = present[present != 0]
    if present.size and present[0] < 0:
        raise CohortError(
            f"{where}: expected labels from 1 and background 0, found {present[0]}. Set negative "
            "voxels to 0, or give those regions positive values."
        )
    if not 2 <= present.size <= MAX_REGIONS:
        raise CohortError(
            f"{where}: expected a label volume with 2 to {MAX_REGIONS} regions, found "
            f"{present.size} values besides 0. Is it a mask or a statistical map?"
        )
    if len(names):
        extra = [int(value) for value in present if value not in names.index]
        if extra:
            raise CohortError(
                f"{where}: expected the {len(names)} regions of its label table, found "
                f"{present.size} in the volume; without a name: {some(extra)}. Use the table of "
                "this volume, or add them to it (a background value must be 0)."
            )
    # A region that the volume lost stays in the atlas if the table says where it is.
    placed = names.index[np.isfinite(names[["x", "y", "z"]].to_numpy(np.float64)).all(axis=1)]
    values = np.union1d(present, placed.to_numpy(np.int64))
    column = np.full(int(values[-1]) + 1, -1)
    column[values] = np.arange(len(values))
    flat = np.flatnonzero(grid)
    regions = column[grid.reshape(-1)[flat]]
    sizes = np.bincount(regions, minlength=len(values))
    voxels = np.stack(np.unravel_index(flat, grid.shape), axis=1)  # (labelled voxels, 3)
    mm = voxels @ affine[:3, :3].T + affine[:3, 3]
    with np.errstate(invalid="ignore"):
        centres = np.stack(
            [np.bincount(regions, axis, minlength=len(values)) / sizes for axis in mm.T], axis=1
        )
    for row in np.flatnonzero(sizes == 0):
        centres[row] = names.loc[values[row], ["x", "y", "z"]]
    prefix = known.prefix if known is not None else name
    width = max(3, len(str(values[-1])))
    labels = tuple(
        str(names.at[value, "label"])
        if value in names.index and names.at[value, "label"]
        else f"{prefix}_{value:0{width}d}"
        for value in values
    )
    check_labels(list(labels), where)
    image = nibabel.Nifti1Image(grid, affine)
    return Atlas(
        name=name,
        labels=labels,
        values=tuple(int(value) for value in values),
        coordinates=centres.astype(np.float32),
        sizes=sizes,
        hemispheres=tuple(_side(*pair) for pair in zip(labels, centres[:, 0], strict=True)),
        space=space,
        sha256=_fingerprint(grid, affine, values, labels),
        image=image,
    )


def _whole_numbers(data: np.ndarray, where: str) -> np.ndarray:
    """Label data as int32, C order; refuses numbers that name no region."""
    if data.dtype.kind == "f":
        rounded = np.rint(data)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(data - rounded) < 1e-3)  # NaN counts as wrong
        if wrong.any():
            raise CohortError(
                f"{where}: expected a label volume of whole numbers, found "
                f"{data[wrong][0]:g} and {int(wrong.sum()) - 1} more that are none. Is it a "
                "probability map, or was it resampled with interpolation?"
            )
        data = rounded
    if data.size and (data.max() >= 2**31 or data.min() < -(2**31)):
        raise CohortError(
            f"{where}: expected labels below 2147483648, found {data.max():g}. Is it an atlas?"
        )
    # A label's value indexes a table here: a few huge ones would cost memory for nothing.
    if data.size and data.max() > 10_000_000:
        raise CohortError(
            f"{where}: expected labels up to 10000000, found {data.max():g}. Renumber the regions."
        )
    return np.ascontiguousarray(data, dtype=np.int32)


def _side(label: str, x: float) -> str:
    """L, R or B: what the name says, else where the centre lies."""
    for pattern, side in SIDES:
        if pattern.search(label):
            return side
    return "B" if abs(x) < MIDLINE_MM else "L" if x < 0 else "R"


def _fingerprint(
    grid: np.ndarray, affine: np.ndarray, values: np.ndarray, labels: tuple[str, ...]
) -> str:
    """SHA-256 of grid, label data and table, independent of the machine and of the file."""
    place = np.round(affine, 4) + 0.0  # + 0.0: no negative zero
    digest = hashlib.sha256(f"{grid.shape}".encode())
    digest.update(place.astype("<f8").tobytes())
    digest.update(grid.astype("<i4").tobytes())
    digest.update("\n".join(f"{v}\t{n}" for v, n in zip(values, labels, strict=True)).encode())
    return digest.hexdigest()


def _stem(path: Path) -> str:
    return re.sub(r"(\.nii)?(\.gz)?$|\.(hdr|img)$", "", path.name)


def _table_beside(path: Path) -> Path | None:
    """The label table that lies beside a volume under the same name."""
    for suffix in (".tsv", ".csv", ".txt", ".xml", ".dat"):
        table = path.with_name(_stem(path) + suffix)
        if table.is_file():
            return table
    return None


def _space_of_name(path: Path) -> str:
    match = re.search(r"(?:^|_)(?:space|tpl)-([A-Za-z0-9]+)", path.name)
    return match[1] if match else ""
