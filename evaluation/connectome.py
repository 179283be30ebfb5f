"""What a code of connectivity keeps of people, beside plain codes of the same length.

A system is a function from rows of Fisher-z pairs, (scans, pairs), to rows as decoded; it was
fitted on training people. One fold of one system is one *cell*: a plain dict that `summary` joins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .baselines import gram, is_numeric_target, kernel_ridge, support_vectors
from .connectivity import correlation_by_scan, standardised
from .errors import EvaluationError
from .scores import area_under_curve

if TYPE_CHECKING:
    import pandas as pd

System = Callable[[np.ndarray], np.ndarray]

RAW = "raw connectivity"
GROUP_MEAN = "group mean"
#: name -> principal components, how many of them share a token, codes; 0 codes: not quantised
PLAIN = {
    "PCA 192 + k-means 8192, triples": (192, 3, 8192),
    "PCA 192 + k-means 4096, triples": (192, 3, 4096),
    "PCA 192, not quantised": (192, 1, 0),
    "PCA of all that training spans, not quantised": (10**6, 1, 0),
    "PCA 128 + k-means 4096, quadruples": (128, 4, 4096),
    "PCA 384 + k-means 4096, triples": (384, 3, 4096),
}


def plain_system(train: np.ndarray, name: str, seed: int = 0) -> System:
    """A system that learns nothing but principal components and k-means.

    Parameters
    ----------
    train : float32, (scans, pairs)
        NaN where a pair is missing.
    name : str
        `RAW`, `GROUP_MEAN` or a key of `PLAIN`.
    """
    mean = np.nan_to_num(np.nanmean(train, axis=0))
    if name == RAW:
        return lambda rows: rows
    if name == GROUP_MEAN:
        return lambda rows: np.broadcast_to(mean, rows.shape)
    components, group, codes = PLAIN[name]
    centred = np.nan_to_num(train - mean)
    variances, left = np.linalg.eigh((centred @ centred.T).astype(np.float64) / len(centred))
    count = min(components, int((variances > 1e-9 * variances[-1]).sum()))
    count -= count % group
    variances, left = variances[::-1][:count], left[:, ::-1][:, :count]
    axes = centred.T @ (left / np.sqrt(variances * len(centred))).astype(np.float32)
    spread = np.sqrt(variances).astype(np.float32)
    codebook = None
    if codes:
        # Whitened, as equal importance of all components is what k-means of one book needs.
        codebook = _kmeans((centred @ axes / spread).reshape(-1, group), codes, seed)

    def apply(rows: np.ndarray) -> np.ndarray:
        values = np.nan_to_num(rows - mean) @ axes
        if codebook is not None:
            groups = (values / spread).reshape(-1, group)
            values = codebook[_nearest(groups, codebook)].reshape(values.shape) * spread
        return values @ axes.T + mean

    return apply


def tokens_of(name: str) -> int | None:
    """Tokens a scan of a row of `PLAIN`; None where nothing is quantised."""
    components, group, codes = PLAIN.get(name, (0, 1, 0))
    return components // group if codes else None


def bits_of(name: str) -> float | None:
    """Bits a scan of a row of `PLAIN`; None where nothing is quantised."""
    components, group, codes = PLAIN.get(name, (0, 1, 0))
    return components // group * float(np.log2(codes)) if codes else None


def score_cell(
    system: System,
    train: np.ndarray,
    test: np.ndarray,
    halves: Sequence[np.ndarray],
    people: tuple[pd.DataFrame, pd.DataFrame],
    targets: Sequence[str],
) -> dict[str, Any]:
    """One fold of one system.

    Parameters
    ----------
    system : callable
    train, test : float32, (scans, pairs)
        NaN where a pair is missing.
    halves : two float32 arrays, (test scans, pairs)
        Of the first and the second half of each test scan.
    people : two DataFrames
        Participants of `train` and of `test`, row by row.
    targets : sequence of str
        Their columns to predict: kernel ridge for a number, SVM for two classes.

    Returns
    -------
    dict
        `full`, `deviation` (lists over test scans: correlation of the decoded matrix with the raw
        one, and of both after the training mean of its own kind was taken away), `top1` (halves
        identified among all test scans, both ways), `targets` (name to `y`, `y_hat`).

    Raises
    ------
    EvaluationError
        A target with missing values.
    """
    decoded_train, decoded = system(train), system(test)
    raw_mean, decoded_mean = np.nanmean(train, axis=0), np.nanmean(decoded_train, axis=0)
    features = standardised(decoded_train, decoded)
    kernels = gram(features[0], features[0]), gram(features[1], features[0])
    found: dict[str, Any] = {}
    for target in targets:
        columns = [part[target] for part in people]
        if any(column.isna().any() for column in columns):
            raise EvaluationError(
                f"{target}: expected a value for everybody, found some missing. Leave it out."
            )
        generator = np.random.default_rng(0)
        if is_numeric_target(columns[0]):
            y, truth = (column.to_numpy(float) for column in columns)
            found[target] = {
                "y": truth,
                "y_hat": kernel_ridge(kernels[0], y, kernels[1], generator),
            }
        else:
            y, truth = (column.astype(str).to_numpy() for column in columns)
            _, score = support_vectors(kernels[0], y, kernels[1], generator)
            found[target] = {"y": (truth == np.unique(y)[-1]).astype(float), "y_hat": score}
        found[target]["number"] = is_numeric_target(columns[0])
    moved = decoded - decoded_mean
    moved = np.where(np.abs(moved) > 1e-5, moved, 0.0)  # the mean decoded anew is no deviation
    return {
        "full": correlation_by_scan(test, decoded),
        "deviation": correlation_by_scan(test - raw_mean, moved),
        "top1": top1_of_halves(*(system(half) for half in halves)),
        "targets": found,
    }


def top1_of_halves(first: np.ndarray, second: np.ndarray) -> float:
    """Share of scans whose other half is the most similar one; mean of both directions.

    Parameters
    ----------
    first, second : float, (scans, pairs)
        Row i of both is of scan i.
    """

    def unit(rows: np.ndarray) -> np.ndarray:
        rows = np.nan_to_num(rows)
        rows = rows - rows.mean(axis=1, keepdims=True)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    similarity, scan = unit(first) @ unit(second).T, np.arange(len(first))
    if np.ptp(similarity) < 1e-9:
        return float("nan")  # all alike: nobody can be told
    hits = (similarity.argmax(1) == scan).mean() + (similarity.argmax(0) == scan).mean()
    return 0.5 * float(hits)


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row of the table from the cells of all folds of a system.

    Medians are over the scans of all folds; MAE and r over all scans; AUC and top-1 are means over
    folds, because a score of one fold's SVM has no place among another's.
    """

    def median(name: str) -> float | None:
        values = np.concatenate([np.array(cell[name], float) for cell in cells])
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    top1 = [cell["top1"] for cell in cells if np.isfinite(np.array(cell["top1"], float))]
    row: dict[str, Any] = {
        "folds": len(cells),
        "scans": sum(len(cell["full"]) for cell in cells),
        "full": median("full"),
        "deviation": median("deviation"),
        "top1": float(np.mean(top1)) if top1 else None,
    }
    for target, first in cells[0]["targets"].items():
        parts = [cell["targets"][target] for cell in cells]
        if first["number"]:
            y, y_hat = (np.concatenate([part[key] for part in parts]) for key in ("y", "y_hat"))
            row[f"{target}_mae"] = float(np.abs(y - y_hat).mean())
            row[f"{target}_r"] = float(np.corrcoef(y, y_hat)[0, 1]) if y_hat.std() > 0 else None
        else:
            row[f"{target}_auc"] = float(
                np.mean(
                    [area_under_curve(np.array(p["y"]) > 0, np.array(p["y_hat"])) for p in parts]
                )
            )
    return row


def _nearest(rows: np.ndarray, centres: np.ndarray) -> np.ndarray:
    half = 0.5 * (centres**2).sum(axis=1)
    blocks = np.array_split(rows, max(1, len(rows) // 256))  # scores that stay in the cache
    return np.concatenate([(block @ centres.T - half).argmax(axis=1) for block in blocks])


def _kmeans(rows: np.ndarray, codes: int, seed: int, iterations: int = 25) -> np.ndarray:
    """Lloyd's algorithm; no more centres than rows."""
    rng = np.random.default_rng(seed)
    centres = rows[rng.choice(len(rows), min(codes, len(rows)), replace=False)].copy()
    for _ in range(iterations):
        nearest = _nearest(rows, centres)
        counts = np.bincount(nearest, minlength=len(centres))
        sums = np.stack(
            [np.bincount(nearest, column, minlength=len(centres)) for column in rows.T], axis=1
        )
        filled = counts > 0
        centres[filled] = sums[filled] / counts[filled, None]
    return centres
