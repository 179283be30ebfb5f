"""Connectivity of a scan, as the connectivity stream reads it: Fisher z between regions."""

from typing import Any

import numpy as np
import torch

from .columns_avq import Columns, match_columns
from .input_checks_avq import as_series, check_magnitude
from .tokenization_errors import TokenizationError

# As in modeling_avq_connectome.py: correlations nearer to 1 than this have no finite Fisher z.
_LARGEST_CORRELATION = 0.999999
_LARGEST_MASKED_FRACTION = 0.10
_FEWEST_SAMPLES = 10


def scan_connectivity(
    x: Any, expected: Columns, num_regions: int | None, found: Columns, where: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Fisher-z correlations of one whole scan at its own sampling interval.

    Parameters
    ----------
    x : array or tensor, real numbers, shape (time, regions)
    expected, num_regions
        Columns that the model expects, and their number (None: any).
    found : Columns
        What came with `x`.
    where : str
        Put in front of messages.

    Returns
    -------
    matrix : ndarray float32 (regions, regions)
        In the expected order; the diagonal and missing regions 0.
    region_mask : ndarray bool (regions,)
        False for regions with NaN or without variance.

    Raises
    ------
    TokenizationError
        As `match_columns`; fewer than ten samples; more than 10 % of the regions missing.
    """
    series = as_series(x, where)
    order, _ = match_columns(series.shape, expected, num_regions, found, where)
    if order is not None:
        series = series[:, order]
    check_magnitude(series, expected.labels or found.labels, where)
    if len(series) < _FEWEST_SAMPLES:
        raise TokenizationError(
            f"{where}expected at least {_FEWEST_SAMPLES} samples for a correlation, found "
            f"{len(series)}; leave this scan out"
        )
    mask = np.isfinite(series).all(axis=0)
    series = np.where(mask, series, 0.0)
    mask &= series.max(axis=0) > series.min(axis=0)
    missing = int((~mask).sum())
    if missing > _LARGEST_MASKED_FRACTION * len(mask):
        raise TokenizationError(
            f"{where}at most 10 % of the regions may be without signal, found {missing} of "
            f"{len(mask)}; check the mask and the field of view of this scan, or leave it out"
        )
    centred = (series - series.mean(axis=0)) * mask
    length = np.sqrt((centred**2).sum(axis=0))
    scaled = centred / np.maximum(length, 1e-12)
    matrix = np.arctanh(np.clip(scaled.T @ scaled, -_LARGEST_CORRELATION, _LARGEST_CORRELATION))
    matrix *= np.outer(mask, mask)
    np.fill_diagonal(matrix, 0.0)
    return matrix.astype(np.float32), mask


def checked_matrices(connectivity: Any, num_regions: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Matrices that a user brings, float32 (scans, regions, regions), and their region masks.

    A region is missing where all its entries are NaN; a single NaN is a missing pair.

    Raises
    ------
    TokenizationError
        No square matrices, another number of regions, not symmetric, infinite off the diagonal, or
        correlations instead of Fisher z.
    """
    if isinstance(connectivity, (list, tuple)):
        connectivity = np.stack([_as_array(matrix) for matrix in connectivity])
    matrices = _as_array(connectivity)
    if matrices.ndim == 2:
        matrices = matrices[None]
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or 0 in matrices.shape:
        raise TokenizationError(
            f"expected connectivity (scans, regions, regions), found shape {matrices.shape}"
        )
    if num_regions is not None and matrices.shape[1] != num_regions:
        raise TokenizationError(
            f"expected connectivity between {num_regions} regions, found {matrices.shape[1]}"
        )
    regions = matrices.shape[1]
    if (np.diagonal(matrices, axis1=1, axis2=2) == 1).all():
        raise TokenizationError(
            "expected Fisher z, found matrices with 1 on the diagonal, which look like "
            "correlations; pass numpy.arctanh of them (the diagonal does not matter)"
        )
    matrices = matrices.copy()
    matrices[:, range(regions), range(regions)] = np.nan
    mask = ~np.isnan(matrices).all(axis=2)
    matrices[:, range(regions), range(regions)] = 0
    matrices = np.where(mask[:, :, None] & mask[:, None, :], matrices, 0.0)
    if np.isinf(matrices).any():
        raise TokenizationError(
            "expected finite Fisher z, found infinite entries off the diagonal: two regions have "
            "the same series; set one of them to NaN"
        )
    if not np.allclose(matrices, matrices.transpose(0, 2, 1), atol=1e-4, equal_nan=True):
        raise TokenizationError("expected symmetric matrices of connectivity, found others")
    return matrices.astype(np.float32), mask


def _as_array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)
