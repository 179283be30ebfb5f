"""Region series painted into the voxels of their atlas: a 4-D NIfTI image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .atlases import Atlas
from .series import CohortError

if TYPE_CHECKING:
    import nibabel

#: A larger image is refused: somebody asked for more windows than they meant.
MAX_BYTES = 4 * 2**30


def paint_series(values: np.ndarray, atlas: Atlas, tr: float) -> nibabel.Nifti1Image:
    """Give every voxel of a region the region's value.

    Parameters
    ----------
    values : numpy.ndarray of float32, shape (time, regions)
        Any unit; columns in the order of `atlas.labels`.
    atlas : Atlas
        With a label volume.
    tr : float
        Seconds between samples, for the header.

    Returns
    -------
    nibabel.Nifti1Image
        Float32 (x, y, z, time) on the atlas's grid and in its space, 0 outside regions.

    Raises
    ------
    CohortError
        An atlas of surfaces, another number of regions, values that are not finite, or an image of
        more than 4 GiB.
    """
    import nibabel

    if atlas.image is None:
        raise CohortError(f"atlas {atlas.name}: expected a label volume to paint, found none.")
    values = np.asarray(values, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] != len(atlas):
        raise CohortError(
            f"expected series (time, {len(atlas)} regions of {atlas.name}), found {values.shape}."
        )
    if not np.isfinite(values).all():
        raise CohortError("expected finite series to paint, found NaN or infinite values.")
    grid = np.asarray(atlas.image.dataobj)
    size = grid.size * len(values) * 4
    if size > MAX_BYTES:
        raise CohortError(
            f"{len(values)} volumes of {grid.shape} voxels are {size / 2**30:.1f} GiB; at most "
            f"{MAX_BYTES / 2**30:.0f} are written. Ask for fewer windows, or a coarser atlas."
        )
    column = np.full(int(max(atlas.values)) + 1, -1)
    column[list(atlas.values)] = np.arange(len(atlas))
    region = column[np.clip(grid, 0, None)]
    region[grid <= 0] = -1
    painted = np.zeros((*grid.shape, len(values)), dtype=np.float32)
    inside = region >= 0
    painted[inside] = values.T[region[inside]]
    image = nibabel.Nifti1Image(painted, atlas.image.affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    image.header.set_xyzt_units("mm", "sec")
    code = 4 if atlas.space.startswith("MNI") else 1
    image.set_sform(atlas.image.affine, code)
    image.set_qform(atlas.image.affine, code)
    return image
