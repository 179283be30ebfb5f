"""The formulas: every number in a report is computed by one of these functions.

NumPy in, NumPy or plain Python out; nothing here reads a file or knows a model. The `evaluate`
modules under `metrics/` wrap the same functions, so that a score has one definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .errors import EvaluationError

# Fisher's z of a correlation beyond this is not told apart from it: arctanh(0.99999) = 6.1.
LARGEST_CORRELATION = 0.99999


def squared_error_sums(
    raw: np.ndarray, reconstruction: np.ndarray, region_mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sum the squared error and the squared deviation from the mean, region by region.

    Parameters
    ----------
    raw, reconstruction : float array, (time, regions)
        One scan, both in the same unit (the z-scored signal).
    region_mask : bool array, (regions,), optional
        False where a region has no signal; such regions get NaN in both results.

    Returns
    -------
    sse, sst : float64 array, (regions,)
        SST is taken around the scan's own mean of each region.

    Raises
    ------
    EvaluationError
        If the shapes differ or a value of a valid region is not finite.
    """
    raw = np.asarray(raw, dtype=np.float64)
    reconstruction = np.asarray(reconstruction, dtype=np.float64)
    if raw.ndim != 2 or raw.shape != reconstruction.shape:
        raise EvaluationError(
            "raw and reconstruction must be two arrays of one shape (time, regions); "
            f"found {raw.shape} and {reconstruction.shape}."
        )
    valid = valid_regions(raw, region_mask)
    for name, values in (("raw", raw), ("reconstruction", reconstruction)):
        broken = ~np.isfinite(values[:, valid])
        if broken.any():
            column = int(np.flatnonzero(valid)[np.argwhere(broken)[0, 1]])
            raise EvaluationError(
                f"{name} holds {int(broken.sum())} values that are not finite, the first in region "
                f"column {column}; mask that region or leave the scan out."
            )
    sse = np.full(raw.shape[1], np.nan)
    sst = np.full(raw.shape[1], np.nan)
    kept = raw[:, valid]
    sse[valid] = ((kept - reconstruction[:, valid]) ** 2).sum(axis=0)
    sst[valid] = ((kept - kept.mean(axis=0)) ** 2).sum(axis=0)
    return sse, sst


def valid_regions(raw: np.ndarray, region_mask: np.ndarray | None = None) -> np.ndarray:
    """Name the regions that can be scored: inside the mask and not constant over the scan.

    Returns
    -------
    bool array, (regions,)
    """
    mask = np.ones(raw.shape[1], bool) if region_mask is None else np.asarray(region_mask, bool)
    if mask.shape != (raw.shape[1],):
        raise EvaluationError(
            f"region_mask must have one entry per region ({raw.shape[1]}); found {mask.shape}."
        )
    varies = np.zeros_like(mask)
    varies[mask] = np.ptp(raw[:, mask], axis=0) > 0 if raw.shape[0] else False
    # NaN compares as False above and would pass for a constant region: it must reach the check.
    varies[mask] |= ~np.isfinite(raw[:, mask]).all(axis=0)
    return varies


def r2_from_sums(sse: np.ndarray | float, sst: np.ndarray | float) -> np.ndarray:
    """1 - SSE/SST, never clipped; NaN where SST is zero or unknown."""
    sse, sst = np.asarray(sse, np.float64), np.asarray(sst, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sst > 0, 1.0 - sse / sst, np.nan)


def fisher_z(series: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Fisher-z connectivity of one scan as a vector over region pairs.

    Parameters
    ----------
    series : float array, (time, regions)
    valid : bool array, (regions,), optional
        Regions that count; pairs with any other region become NaN. A region that is valid but
        constant here correlates 0 with everything: it tells nothing, and is not left out for it.

    Returns
    -------
    float32 array, (pairs,)
        Upper triangle without the diagonal, row by row.
    """
    series = np.asarray(series, np.float64)
    centred = series - series.mean(axis=0)
    norm = np.sqrt((centred**2).sum(axis=0))
    scaled = np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-12)
    correlation = scaled.T @ scaled
    z = np.arctanh(np.clip(correlation, -LARGEST_CORRELATION, LARGEST_CORRELATION))
    if valid is not None:
        z[~valid] = np.nan
        z[:, ~valid] = np.nan
    return z[np.triu_indices(len(z), 1)].astype(np.float32)


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson correlation over the entries finite in both; NaN if one of them does not vary."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < 2:
        return float("nan")
    a = first[both] - first[both].mean()
    b = second[both] - second[both].mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    # Predictions of one and the same number differ by rounding only: that is no variation.
    tiny = 1e-12 * (1.0 + float(np.abs(first[both]).max()) * float(np.abs(second[both]).max()))
    return float(a @ b / norm) if norm > tiny else float("nan")


def code_usage(counts: np.ndarray) -> dict[str, float]:
    """Describe how evenly a codebook is used.

    Parameters
    ----------
    counts : int array, (num_codes,)
        How often each code occurred.

    Returns
    -------
    dict
        `usage` (share of codes that occur at all), `entropy_bits`, `perplexity` (2**entropy),
        `num_codes`, `num_tokens`. NaN for entropy and perplexity without any token.
    """
    counts = np.asarray(counts, np.float64)
    total = counts.sum()
    share = counts[counts > 0] / total if total else np.empty(0)
    entropy = float(-(share * np.log2(share)).sum()) + 0.0 if total else float("nan")
    return {
        "usage": float((counts > 0).mean()),
        "entropy_bits": entropy,
        "perplexity": float(2.0**entropy),
        "num_codes": len(counts),
        "num_tokens": int(total),
    }


def mean_absolute_error(y: np.ndarray, y_hat: np.ndarray) -> float:
    """Mean of |y_hat - y|, in the unit of y."""
    return float(np.abs(np.asarray(y_hat, np.float64) - np.asarray(y, np.float64)).mean())


def prediction_r2(y: np.ndarray, y_hat: np.ndarray) -> float:
    """1 - SSE/SST over subjects, SST around the mean of the scored subjects; never clipped."""
    y, y_hat = np.asarray(y, np.float64), np.asarray(y_hat, np.float64)
    return float(r2_from_sums(((y_hat - y) ** 2).sum(), ((y - y.mean()) ** 2).sum()))


def balanced_accuracy(y: np.ndarray, y_hat: np.ndarray) -> float:
    """Mean over the true classes of the share answered correctly."""
    _, label = np.unique(np.asarray(y), return_inverse=True)
    right = np.bincount(label, weights=np.asarray(y) == np.asarray(y_hat))
    return float((right / np.bincount(label)).mean())


def area_under_curve(is_positive: np.ndarray, score: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties counting one half (Mann-Whitney).

    NaN if one of the classes is absent or a score is missing.
    """
    positive, score = np.asarray(is_positive, bool), np.asarray(score, np.float64)
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative or not np.isfinite(score).all():
        return float("nan")
    levels, level = np.unique(score, return_inverse=True)
    positives = np.bincount(level[positive], minlength=len(levels))
    negatives = np.bincount(level[~positive], minlength=len(levels))
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + 0.5 * negatives)).sum() / (n_positive * n_negative))


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float],
    num_subjects: int,
    num_resamples: int = 1000,
    seed: int = 0,
    coverage: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a statistic over subjects drawn with replacement.

    Parameters
    ----------
    statistic : callable
        Takes an int array of row numbers (one per drawn subject) and returns a number. Resamples
        where it is not finite (a class absent, no variation) are left out.
    num_subjects : int
    num_resamples : int
    seed : int
        The same seed draws the same subjects, so intervals of paired systems belong together.
    coverage : float
        0.95 for a 95 % interval.

    Returns
    -------
    low, high : float
        NaN, NaN with fewer than two subjects or no finite resample.
    """
    if num_subjects < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    drawn = np.array(
        [statistic(generator.integers(0, num_subjects, num_subjects)) for _ in range(num_resamples)]
    )
    low, high = percentile_interval(drawn, coverage)
    return low, high


def percentile_interval(drawn: np.ndarray, coverage: float = 0.95) -> list[float]:
    """Low and high of the resamples that are finite; NaN, NaN where none is."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return [float("nan"), float("nan")]
    tail = 50.0 * (1.0 - coverage)
    return [float(end) for end in np.percentile(drawn, [tail, 100.0 - tail])]


def resampled_auc(
    is_positive: np.ndarray, scores: np.ndarray, num_resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """`area_under_curve` of every column, over subjects drawn with replacement.

    Drawing subjects does not change the order of their scores, so every resample is a weighting of
    one sorted list: ten times as fast as sorting each.

    Parameters
    ----------
    is_positive : bool array, (subjects,)
    scores : float array, (subjects, seeds)
    num_resamples, seed : int
        The same seed draws the same subjects.

    Returns
    -------
    float64, (resamples, seeds)
        NaN where a class is absent or a score is missing.
    """
    positive, count = np.asarray(is_positive, bool), len(scores)
    generator = np.random.default_rng(seed)
    weights = np.stack(
        [
            np.bincount(generator.integers(0, count, count), minlength=count)
            for _ in range(num_resamples)
        ]
    ).astype(np.float64)
    found = np.full((num_resamples, scores.shape[1]), np.nan)
    for place, column in enumerate(np.asarray(scores, np.float64).T):
        if not np.isfinite(column).all():
            continue
        order = np.argsort(column, kind="stable")
        first_of_level = np.flatnonzero(np.r_[True, np.diff(column[order]) > 0])
        sorted_weights = weights[:, order]
        positives = np.add.reduceat(sorted_weights * positive[order], first_of_level, axis=1)
        negatives = np.add.reduceat(sorted_weights * ~positive[order], first_of_level, axis=1)
        below = np.cumsum(negatives, axis=1) - negatives
        with np.errstate(invalid="ignore"):
            pairs = positives.sum(axis=1) * negatives.sum(axis=1)
            found[:, place] = (positives * (below + 0.5 * negatives)).sum(axis=1) / pairs
    return found


def interval_of(
    formula: Callable[..., float],
    arrays: Sequence[np.ndarray],
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[float]:
    """`bootstrap_interval` of a formula over arrays with one entry per subject, drawn together."""

    def statistic(rows: np.ndarray) -> float:
        return float(formula(*(array[rows] for array in arrays)))

    return list(bootstrap_interval(statistic, len(arrays[0]), num_resamples, seed))


def crossed_interval(
    formula: Callable[..., float],
    columns: Sequence[np.ndarray],
    tables: Sequence[np.ndarray],
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[float]:
    """Interval of a formula over subjects and, where there are several, over seeds.

    Both are drawn with replacement, each seed's column as a whole: the pigeonhole bootstrap (Owen
    2007, Annals of Applied Statistics 1), which is never too narrow. With one seed it is
    `interval_of`.

    Parameters
    ----------
    formula : callable
        Takes what was drawn of `columns`, then of `tables`, and returns a number.
    columns : sequence of arrays, (subjects,)
    tables : sequence of arrays, (subjects, seeds)
        Each may have its own number of seeds.
    num_resamples, seed : int

    Returns
    -------
    list of float
        Low and high.
    """
    generator = np.random.default_rng([seed, 1])

    def statistic(rows: np.ndarray) -> float:
        drawn = [table[rows] for table in tables]
        for place, table in enumerate(drawn):
            width = table.shape[1]
            if width > 1:
                drawn[place] = table[:, generator.integers(0, width, width)]
        return float(formula(*(column[rows] for column in columns), *drawn))

    return list(bootstrap_interval(statistic, len(tables[0]), num_resamples, seed))
