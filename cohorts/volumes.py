"""Mean series of the regions of a label volume, in one pass over the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .atlases import Atlas
from .images import check_4d, load_image, read_blocks, read_image, scaling
from .series import MAX_MASKED_SHARE, CohortError, some

#: Bytes of volumes that are held at a time: about what fits a core's caches was fastest.
BLOCK_BYTES = 4 * 2**20
#: Affines that differ by less than this, in mm and in mm per voxel, are the same grid.
SAME_GRID_MM = 1e-3


class RegionMeans(NamedTuple):
    """Series of the regions of an atlas in one image.

    Attributes
    ----------
    values : numpy.ndarray of float32, shape (time, regions)
        Mean signal; NaN throughout for a region without signal in the image.
    voxels : numpy.ndarray of int64, shape (regions,)
        Voxels of the image that were averaged; 0 for a lost region.
    covered : numpy.ndarray of float64, shape (regions,)
        Share of the region that has signal: inside the image and the mask, neither NaN nor 0
        throughout.
    """

    values: np.ndarray
    voxels: np.ndarray
    covered: np.ndarray


def region_means(
    image: Any,
    atlas: Atlas,
    mask: Any = None,
    block_bytes: int = BLOCK_BYTES,
) -> RegionMeans:
    """Average a 4-D image over the regions of a label volume.

    The image is never resampled: where the grids differ, the label volume is brought to the
    image's by nearest neighbour, as nilearn's ``NiftiLabelsMasker`` does by default, whose values
    these are. What differs: the file is read once and never held whole; sums are taken over the
    labelled voxels only, in float64 and before the header's scaling; voxels that are NaN in the
    first volume count as outside the image and not as 0; a lost region stays in its column.

    Parameters
    ----------
    image : path or nibabel image, shape (x, y, z, time)
    atlas : Atlas
        With a label volume.
    mask : path or nibabel image, shape (x, y, z), optional
        Voxels to use (not 0); brought to the image's grid as the labels are.
    block_bytes : int
        Bytes of volumes held at a time, and at least one volume.

    Returns
    -------
    RegionMeans

    Raises
    ------
    CohortError
        As `load_image`; not 4-D or too few volumes; truncated data; infinite voxels; more than
        10 % of the regions lost, with how each kind was lost.
    """
    if atlas.image is None:
        raise CohortError(
            f"atlas {atlas.name}: expected a label volume, found none. Volumes need an atlas of "
            "volumes; name one, or give the path of a label volume."
        )
    where = str(image) if isinstance(image, str | Path) else "image in memory"
    opened = load_image(image) if isinstance(image, str | Path) else image
    check_4d(tuple(opened.shape), where)
    regions = _Regions(atlas, opened, mask, where)
    time = opened.shape[3]
    sums = np.full((time, len(atlas)), np.nan)
    for first, block in read_blocks(opened, where, block_bytes):
        kept = block.take(regions.order, axis=1)  # (volumes, labelled voxels)
        if first == 0 and kept.dtype.kind == "f" and np.isnan(kept[0]).any():
            regions.drop(np.isnan(kept[0]))
            kept = block.take(regions.order, axis=1)
        rows = slice(first, first + len(block))
        with np.errstate(invalid="ignore"):  # NaN, and inf - inf, which is looked at next
            regions.alive |= kept.any(axis=0)
            part = np.add.reduceat(kept.astype(np.float64), regions.starts, axis=1)
        if not np.isfinite(part).all():
            _refuse_infinite(kept, regions.order, opened.shape, first, where)
        sums[rows, regions.columns] = part
    covered = regions.finish()
    slope, inter = scaling(opened)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        values = (sums / regions.voxels * slope + inter).astype(np.float32)
    values[:, regions.voxels == 0] = np.nan
    return RegionMeans(values, regions.voxels, covered)


class _Regions:
    """Which voxels of an image belong to which region, and why regions were lost.

    Attributes
    ----------
    order : numpy.ndarray of int64, shape (labelled voxels,)
        Positions in a volume (first axis fastest), sorted by region.
    starts : numpy.ndarray, shape (present regions,)
        Where each region begins in `order`.
    columns : numpy.ndarray, shape (present regions,)
        Their columns in the atlas.
    voxels : numpy.ndarray of int64, shape (regions,)
    alive : numpy.ndarray of bool, shape (labelled voxels,)
        Voxels that were not 0 in every volume so far.
    """

    def __init__(self, atlas: Atlas, image: Any, mask: Any, where: str):
        self.atlas, self.where = atlas, where
        self.header_places = int(image.header["sform_code"]) or int(image.header["qform_code"])
        self.size_mm = np.sqrt((image.affine[:3, :3] ** 2).sum(axis=0))
        shape = tuple(image.shape[:3])
        table = np.zeros(atlas.values[-1] + 1, np.int32)
        table[list(atlas.values)] = np.arange(1, len(atlas) + 1)
        own = np.asanyarray(atlas.image.dataobj)
        grid = nearest(table[own], atlas.image.affine, image.affine, shape)  # 0: no region
        count = len(atlas)
        self.inside = self._share_inside(own, table, image.affine, shape)
        self.on_grid = np.bincount(grid.reshape(-1), minlength=count + 1)[1:]
        if mask is not None:
            grid = np.where(_load_mask(mask, image.affine, shape, where), grid, 0)
        flat = grid.reshape(-1, order="F")
        order = np.flatnonzero(flat)
        region = flat[order] - 1
        by_region = np.argsort(region, kind="stable")
        self.order, self.region = order[by_region], region[by_region]
        self.in_mask = np.bincount(region, minlength=count)
        self._count()
        self.alive = np.zeros(len(self.order), bool)
        self._check()

    def _count(self) -> None:
        self.voxels = np.bincount(self.region, minlength=len(self.atlas))
        self.columns = np.flatnonzero(self.voxels)
        self.starts = np.concatenate([[0], np.cumsum(self.voxels[self.columns])[:-1]])

    def drop(self, missing: np.ndarray) -> None:
        """Leave out voxels, shape (labelled voxels,), before anything was summed."""
        self.order, self.region = self.order[~missing], self.region[~missing]
        self._count()
        self.alive = np.zeros(len(self.order), bool)
        self._check()

    def finish(self) -> np.ndarray:
        """Share of each region with signal, shape (regions,); regions without any become lost."""
        alive = np.bincount(self.region[self.alive], minlength=len(self.atlas))
        share = alive / np.maximum(self.on_grid, 1)
        self.voxels = np.where(alive > 0, self.voxels, 0)
        self._check()
        return self.inside * share

    def _share_inside(
        self, own: np.ndarray, table: np.ndarray, affine: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Share of each region of the atlas that lies in the image's box, shape (regions,)."""
        flat = np.flatnonzero(own)
        voxels = np.stack(np.unravel_index(flat, own.shape), axis=1)
        matrix = np.linalg.inv(affine) @ self.atlas.image.affine
        places = voxels @ matrix[:3, :3].T + matrix[:3, 3]  # (labelled voxels of the atlas, 3)
        inside = ((places >= -0.5) & (places < np.array(shape) - 0.5)).all(axis=1)
        region = table[own.reshape(-1)[flat]] - 1
        count = len(self.atlas)
        return np.bincount(region, inside, count) / np.maximum(np.bincount(region, None, count), 1)

    def _check(self) -> None:
        """Refuse an image in which too many regions of the atlas are lost."""
        count, lost = len(self.atlas), self.voxels == 0
        if lost.sum() <= MAX_MASKED_SHARE * count:
            return
        outside = lost & (self.inside == 0) & (self.atlas.sizes > 0)
        small = lost & ~outside & (self.on_grid == 0)
        masked = lost & ~outside & ~small & (self.in_mask == 0)
        empty = lost & ~outside & ~small & ~masked
        size = " x ".join(f"{length:.3g}" for length in self.size_mm)
        reasons = [
            f"{int(kind.sum())} {text}"
            for kind, text in (
                (outside, "outside its box"),
                (small, f"smaller than its voxels of {size} mm, or not in the label volume"),
                (masked, "outside the mask"),
                (empty, "where it is NaN or 0 throughout"),
            )
            if kind.any()
        ]
        names = [self.atlas.labels[column] for column in np.flatnonzero(lost)]
        space = "MNI" if "MNI" in self.atlas.space or self.atlas.space == "unknown" else None
        header = "" if self.header_places else " Its header places it nowhere (sform, qform 0)."
        question, advice = "", "Use an atlas with larger regions."
        if small.sum() <= lost.sum() / 2:
            question = f"; is it in {space or self.atlas.space} space?{header}"
            advice = "Normalise the image to the atlas's template, or leave the scan out."
        raise CohortError(
            f"{self.where}: only {int((~lost).sum())} of {count} regions overlap the image"
            f"{question or '.'} Lost of atlas {self.atlas.name}: "
            f"{', '.join(reasons)} ({some(names)}). {advice}"
        )


def nearest(
    data: np.ndarray, affine: np.ndarray, to_affine: np.ndarray, to_shape: tuple[int, ...]
) -> np.ndarray:
    """Bring a volume to another grid by nearest neighbour; 0 outside.

    Parameters
    ----------
    data : numpy.ndarray, shape (x, y, z)
    affine, to_affine : numpy.ndarray, shape (4, 4)
        From voxels to mm, of `data` and of the wanted grid.
    to_shape : tuple of int

    Returns
    -------
    numpy.ndarray of the dtype of `data`, shape `to_shape`
        `data` itself when the grids are the same.
    """
    if data.shape == to_shape and np.allclose(affine, to_affine, rtol=0, atol=SAME_GRID_MM):
        return data
    matrix = np.linalg.inv(affine) @ to_affine
    out = np.zeros(to_shape, data.dtype)
    # Column i of the matrix says how the place in `data` moves with axis i of the wanted grid.
    plane = (
        matrix[:3, 0, None, None] * np.arange(to_shape[0])[:, None]
        + matrix[:3, 1, None, None] * np.arange(to_shape[1])
        + matrix[:3, 3, None, None]
    )  # (3, x, y) at z = 0
    limits = np.array(data.shape)[:, None, None]
    for z in range(to_shape[2]):
        # Halves go up; the rounding keeps noise of the last digit from deciding them.
        place = np.floor(np.round(plane + matrix[:3, 2, None, None] * z, 6) + 0.5)
        inside = ((place >= 0) & (place < limits)).all(axis=0)
        i, j, k = place[:, inside].astype(np.int64)
        out[inside, z] = data[i, j, k]
    return out


def _load_mask(mask: Any, affine: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """The voxels of the image's grid that a mask keeps, shape (x, y, z)."""
    named = isinstance(mask, str | Path)
    opened = load_image(mask) if named else mask
    data = read_image(opened, mask if named else "mask")
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise CohortError(
            f"{mask if named else 'mask'}: expected a mask with three axes for {where}, found "
            f"shape {data.shape}. Pass one volume."
        )
    kept = np.nan_to_num(data) != 0
    if not kept.any():
        raise CohortError(
            f"{mask if named else 'mask'}: expected a mask with voxels that are not 0 for "
            f"{where}, found none. Pass another mask, or none."
        )
    return nearest(kept, opened.affine, affine, shape)


def _refuse_infinite(
    kept: np.ndarray, order: np.ndarray, shape: tuple[int, ...], first: int, where: str
) -> None:
    """Raise for an infinite voxel; NaN is left to become a masked region."""
    volumes, places = np.nonzero(np.isinf(kept))
    if not len(volumes):
        return
    voxel = tuple(int(n) for n in np.unravel_index(order[places[0]], shape[:3], order="F"))
    raise CohortError(
        f"{where}: expected finite numbers, found {kept[volumes[0], places[0]]} in volume "
        f"{first + volumes[0]}, voxel {voxel} ({len(volumes)} such in this block). Look for "
        "overflow in the preprocessing of this scan."
    )
