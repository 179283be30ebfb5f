"""CIFTI-2 files: parcellated series, and dense series with a label file."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import pandas as pd
from nibabel.affines import apply_affine
from nibabel.cifti2 import BrainModelAxis, LabelAxis, ParcelsAxis, SeriesAxis
from scipy import sparse

from .array_files import RawSeries, readable
from .mat_files import MAX_SAMPLES
from .series import CohortError, check_labels, some

#: Bytes of a dense series that are in memory at once.
BLOCK_BYTES = 8 * 2**20
#: Labels of a label file that name no region.
_BACKGROUND = {"???", "background", "unknown", ""}


def read_ptseries(path: Path) -> RawSeries:
    """Read a parcellated series (.ptseries.nii).

    Returns
    -------
    RawSeries
        values (time, parcels) float32, parcel names, the series step as TR. `regions` where every
        parcel lies in the volume: the centres of surface parcels depend on a surface that the
        file does not hold.

    Raises
    ------
    CohortError
        Damaged, no CIFTI-2, or another pair of axes than series x parcels.
    """
    with readable(path, "a CIFTI file of parcel series (.ptseries.nii)"):
        image, axes = _open(path)
        kinds = [type(axis) for axis in axes]
        if sorted(kind.__name__ for kind in kinds) != ["ParcelsAxis", "SeriesAxis"]:
            raise CohortError(_axes_message(path, "series x parcels (.ptseries.nii)", axes))
        time, parcels = (axes[kinds.index(kind)] for kind in (SeriesAxis, ParcelsAxis))
        values = _block(image, ...)
        if kinds[0] is ParcelsAxis:
            values = values.T
        labels = [str(name) for name in parcels.name]
        check_labels(labels, str(path))
        tr, source = _step(time)
        return RawSeries(values, labels, 1, tr, source, _volume_regions(parcels, labels))


def read_dtseries(path: Path, label_files: tuple[Path, ...], atlas: str = "") -> RawSeries:
    """Read a dense series (.dtseries.nii) as means over the labels of a .dlabel.nii, in one pass.

    Grayordinates that are zero or NaN at all times do not count; one that is NaN at some times
    makes its region NaN. Regions without a grayordinate are kept as NaN.

    Parameters
    ----------
    label_files : tuple of pathlib.Path
        Label files found with the scans. Of several, the one whose file name holds `atlas`.

    Raises
    ------
    CohortError
        Damaged; no label file or no way to choose one; another surface mesh or volume grid.
    """
    dlabel = _choose_labels(path, label_files, atlas)
    with readable(dlabel, "a CIFTI label file (.dlabel.nii)"):
        labels = _read_labels(dlabel, dlabel.stat().st_mtime_ns)
    keep = list(labels.names)
    with readable(path, "a CIFTI file of dense series (.dtseries.nii)"):
        image, axes = _open(path)
        if not isinstance(axes[0], SeriesAxis) or not isinstance(axes[1], BrainModelAxis):
            raise CohortError(_axes_message(path, "series x grayordinates (.dtseries.nii)", axes))
        wanted = _on_grayordinates(axes[1], labels, path, dlabel)  # (grayordinates,)
        place = np.searchsorted(keep, wanted).clip(max=len(keep) - 1)
        region = np.where(np.asarray(keep)[place] == wanted, place, -1)
        values = _means(image, region, len(keep))
        found = np.bincount(region[region >= 0], minlength=len(keep)) > 0
        if found.sum() < 0.9 * len(keep):
            lost = [labels.names[k] for k, there in zip(keep, found, strict=True) if not there]
            raise CohortError(
                f"{path}: expected the {len(keep)} regions of {dlabel.name}, found only "
                f"{int(found.sum())} of them among its grayordinates; missing: {some(lost)}. "
                "Use a label file for the same grayordinates."
            )
        tr, source = _step(axes[0])
    return RawSeries(values, list(labels.names.values()), 1, tr, source)


class _Labels(NamedTuple):
    """What a label file says: its axis, the value of each grayordinate, value -> name."""

    axis: BrainModelAxis
    keys: np.ndarray
    names: dict[int, str]


@lru_cache(maxsize=2)
def _read_labels(path: Path, changed: int) -> _Labels:
    """Regions of a label file, by value; read once per process and file date."""
    image, axes = _open(path)
    if not isinstance(axes[0], LabelAxis) or not isinstance(axes[1], BrainModelAxis):
        raise CohortError(_axes_message(path, "labels x grayordinates", axes))
    keys = np.nan_to_num(np.asarray(image.dataobj[0], np.float64))
    table = {int(key): str(name).strip() for key, (name, _) in axes[0].label[0].items()}
    used = set(np.unique(keys).tolist())
    names = {
        key: table[key]
        for key in sorted(table)
        if key > 0 and key in used and table[key].lower() not in _BACKGROUND
    }
    if not names:
        raise CohortError(f"{path}: expected labelled regions, found none. Use another file.")
    check_labels(list(names.values()), str(path))
    return _Labels(axes[1], keys, names)


def _open(path: Path) -> tuple[Any, list[Any]]:
    """Image and its two axes; anything else than a CIFTI-2 matrix is refused."""
    image = nibabel.load(path, mmap=False)
    if not isinstance(image, nibabel.Cifti2Image):
        raise CohortError(
            f"{path}: expected a CIFTI-2 file, found {type(image).__name__} of shape "
            f"{image.shape}. Convert CIFTI-1 with wb_command -cifti-convert; name volumes .nii.gz."
        )
    if (
        len(image.shape) != 2
        or 0 in image.shape
        or np.prod(image.shape, dtype=object) > MAX_SAMPLES
    ):
        raise CohortError(f"{path}: expected a matrix of two axes, found shape {image.shape}.")
    if image.get_data_dtype().kind not in "fiu":
        raise CohortError(f"{path}: expected real numbers, found {image.get_data_dtype()}.")
    axes = [image.header.get_axis(index) for index in (0, 1)]
    lengths = tuple(len(axis) for axis in axes)
    if lengths != image.shape:
        raise CohortError(
            f"{path}: expected axes of lengths {image.shape} as the matrix has, found {lengths}: "
            "corrupted. Copy the file again."
        )
    return image, axes


def _axes_message(path: Path, expected: str, axes: list[Any]) -> str:
    kinds = " x ".join(type(axis).__name__.removesuffix("Axis") for axis in axes)
    return (
        f"{path}: expected {expected}, found {kinds} of shape "
        f"({', '.join(str(len(axis)) for axis in axes)}). Pass the file with the time series."
    )


def _block(image: Any, part: Any) -> np.ndarray:
    """Part of the matrix as float32, infinite where a stored number overflows it."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(image.dataobj[part]).astype(np.float32, copy=False)


def _step(axis: SeriesAxis) -> tuple[float | None, str]:
    """TR of a series axis."""
    if str(axis.unit).upper() != "SECOND":
        return None, f"the CIFTI series is in {str(axis.unit).lower()}, not in seconds"
    return float(axis.step), "CIFTI series step"


def _volume_regions(parcels: ParcelsAxis, labels: list[str]) -> pd.DataFrame | None:
    """Centres and sizes of parcels that lie in the volume; None when one lies on a surface."""
    if parcels.affine is None or any(parcels.vertices):
        return None
    if not all(len(voxels) for voxels in parcels.voxels):
        return None
    centres = np.stack([np.asarray(voxels).mean(axis=0) for voxels in parcels.voxels])
    table = pd.DataFrame(
        apply_affine(parcels.affine, centres).astype(np.float32),
        columns=["x", "y", "z"],
    )
    table.insert(0, "label", labels)
    table["size"] = [len(voxels) for voxels in parcels.voxels]
    return table


def _choose_labels(path: Path, label_files: tuple[Path, ...], atlas: str) -> Path:
    """The label file that parcellates a dense series."""
    if not label_files:
        raise CohortError(
            f"{path}: expected a label file (.dlabel.nii) for the same grayordinates beside the "
            "scans, found none. Put it into the source folder."
        )
    wanted = "".join(filter(str.isalnum, atlas.lower()))
    same = [
        f for f in label_files if wanted and wanted in "".join(filter(str.isalnum, f.name.lower()))
    ]
    choice = label_files if len(label_files) == 1 else same
    if len(choice) != 1:
        raise CohortError(
            f"{path}: expected one label file, found {len(label_files)}: "
            f"{some([file.name for file in label_files])}; asked for atlas {atlas or 'none'}. "
            "Keep one, or name the atlas as the file is named."
        )
    return choice[0]


def _on_grayordinates(
    series: BrainModelAxis, source: _Labels, path: Path, dlabel: Path
) -> np.ndarray:
    """Label of each grayordinate of the series, shape (grayordinates,), 0 where it has none."""
    labels = source.axis
    found = np.zeros(len(series), np.int64)
    known = {name: (part, model) for name, part, model in labels.iter_structures()}
    for name, part, model in series.iter_structures():
        if name not in known:
            continue
        other_part, other = known[name]
        own = source.keys[other_part].astype(np.int64)
        if name in series.nvertices:
            if series.nvertices[name] != labels.nvertices.get(name):
                raise CohortError(
                    f"{path}: expected the surface mesh of {dlabel.name} "
                    f"({labels.nvertices.get(name)} vertices in {name}), found "
                    f"{series.nvertices[name]}. Use a label file for the same mesh."
                )
            lookup = np.zeros(series.nvertices[name], np.int64)
            lookup[other.vertex] = own
            found[part] = lookup[model.vertex]
            continue
        if (
            labels.affine is None
            or series.volume_shape != labels.volume_shape
            or not np.allclose(series.affine, labels.affine, atol=1e-3)
        ):
            raise CohortError(
                f"{path}: expected the volume grid of {dlabel.name} {labels.volume_shape}, found "
                f"{series.volume_shape} or another affine. Use a label file for the same grid."
            )
        shape = tuple(int(n) for n in series.volume_shape)
        volume = np.zeros(shape, np.int64)
        volume[tuple(other.voxel.T)] = own
        found[part] = volume[tuple(model.voxel.T)]
    return found


def _means(image: Any, region: np.ndarray, count: int) -> np.ndarray:
    """Region means (time, regions) float32 of a dense series, read in blocks of grayordinates.

    NOTE: time runs fastest in the file, so that blocks of time would read all of it every time.

    Parameters
    ----------
    region : numpy.ndarray of int, shape (grayordinates,)
        Row of the result, -1 for none.
    """
    sums = np.zeros((count, image.shape[0]))
    voted, broken = np.zeros(count), np.zeros(count, bool)
    step = max(1, BLOCK_BYTES // (4 * image.shape[0]))
    for start in range(0, image.shape[1], step):
        stop = min(start + step, image.shape[1])
        inside = np.flatnonzero(region[start:stop] >= 0)
        if not len(inside):
            continue
        own = region[start:stop][inside]
        block = _block(image, (slice(None), slice(start, stop))).T[inside]  # (grayordinates, time)
        missing = np.isnan(block)
        if missing.any():
            broken[own[missing.any(axis=1) & ~missing.all(axis=1)]] = True
            block[missing] = 0
        voted += np.bincount(own[block.any(axis=1)], minlength=count)
        member = sparse.csr_matrix(
            (np.ones(len(own)), (own, np.arange(len(own)))), shape=(count, len(own))
        )
        sums += member @ block.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = (sums.T / voted).astype(np.float32)
    values[:, broken | (voted == 0)] = np.nan
    return values
