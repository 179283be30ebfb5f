"""The Gaussian rate-distortion reference: what R2 a given number of bits could buy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .errors import EvaluationError


def separable_spectrum(windows: Iterable[np.ndarray]) -> np.ndarray:
    """Eigenvalues of the spatial x temporal covariance of training windows, largest first.

    The covariance is taken as the Kronecker product of one over regions and one over the samples
    of a window, so that any cohort, parcellation and window length has one.

    Parameters
    ----------
    windows : iterable of float arrays, (windows, window, regions)
        Training windows, scan by scan, z-scored.

    Returns
    -------
    float64, (components,)
        Up to a common factor, which cancels in R2; components without variance are left out.

    Raises
    ------
    EvaluationError
        If there is no window or no variance.
    """
    spatial = temporal = None
    for scan in windows:
        values = np.asarray(scan, np.float64)
        if not len(values):
            continue
        if spatial is None or temporal is None:
            spatial = np.zeros((values.shape[2], values.shape[2]))
            temporal = np.zeros((values.shape[1], values.shape[1]))
        flat = values.reshape(-1, values.shape[2])
        spatial += flat.T @ flat
        turned = values.transpose(0, 2, 1).reshape(-1, values.shape[1])
        temporal += turned.T @ turned
    if spatial is None or temporal is None or not np.trace(spatial) > 0:
        raise EvaluationError("The Gaussian reference needs at least one window with variance.")
    product = np.outer(np.linalg.eigvalsh(spatial), np.linalg.eigvalsh(temporal)).ravel()
    return np.sort(product[product > 1e-12 * product.max()])[::-1]


def rate_distortion_r2(variances: np.ndarray, bits_per_window: float) -> float:
    """R2 of an ideal code of independent Gaussian components, by reverse water-filling.

    Parameters
    ----------
    variances : float, (components,)
        Largest first, all positive; see `separable_spectrum`.
    bits_per_window : float
        Tokens per window times log2(K).

    Returns
    -------
    float
        1 - distortion / variance at that many bits.

    Raises
    ------
    EvaluationError
        A negative number of bits.

    References
    ----------
    Cover & Thomas, Elements of Information Theory, 2nd ed., section 10.3.3.
    """
    if bits_per_window < 0:
        raise EvaluationError(f"bits_per_window must not be negative; found {bits_per_window}.")
    logs = np.cumsum(np.log2(variances))
    number = np.arange(1, len(variances) + 1)
    # With the n largest components above the water level w: n log2 w = sum log2 - 2 bits.
    levels = 2.0 ** ((logs - 2.0 * bits_per_window) / number)
    # That holds for the first n and for no later one; without bits rounding may deny it to all.
    active = max(1, int(np.count_nonzero(levels <= variances)))
    distortion = active * levels[active - 1] + variances[active:].sum()
    return float(1.0 - distortion / variances.sum())


def gaussian_reference(windows: Iterable[np.ndarray], bits_per_window: float) -> float:
    """R2 of reverse water-filling over a spatial x temporal covariance of training windows.

    A reference and no strict bound: real series are neither Gaussian nor separable. Parameters,
    errors and source are those of `separable_spectrum` and `rate_distortion_r2`, its two steps.
    """
    return rate_distortion_r2(separable_spectrum(windows), bits_per_window)
