"""Patterns of connections that tell variables of people apart: for the stream of connectivity."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .arguments import TrainingError

_FEWEST = 10  # people with a value


def target_columns(table: pd.DataFrame, targets: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """What a linear model is to tell of each target.

    Parameters
    ----------
    table : DataFrame
        Participants, one row each.
    targets : sequence of str
        Its columns: a number becomes itself (its logarithm where all are positive), two classes
        become 0 and 1, more classes one such column each.

    Returns
    -------
    list of (name, float64 array (people,))
        NaN where the value is missing.

    Raises
    ------
    TrainingError
        No such column, or a column that tells nothing.
    """
    found = []
    for target in targets:
        if target not in table:
            raise TrainingError(
                f"targets: expected columns of the participants table, found {target!r}. It has "
                f"{', '.join(map(str, table.columns))}."
            )
        column = table[target]
        known = column.notna().to_numpy()
        numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        if numeric:
            values = column.to_numpy(float)
            parts = [(target, np.log(values) if (values[known] > 0).all() else values)]
        else:
            labels = column.astype(str).to_numpy()
            classes = sorted(set(labels[known]))
            parts = [
                (f"{target} = {name}", np.where(known, labels == name, np.nan))
                for name in (classes[1:] if len(classes) == 2 else classes)
            ]
        for name, values in parts:
            told = values[np.isfinite(values)]
            if len(told) < _FEWEST or np.ptp(told) == 0:
                raise TrainingError(
                    f"targets: {target}: expected at least {_FEWEST} training people who differ, "
                    f"found {len(told)}. Leave it out."
                )
            found.append((name, values))
    return found


def balanced_weights(values: np.ndarray) -> np.ndarray:
    """Weights, mean 1: of two classes, 0 and 1, each counts half in all; numbers count the same."""
    weights = np.ones(len(values))
    if set(np.unique(values)) == {0.0, 1.0}:
        weights = 0.5 / np.where(values == 1, values.mean(), 1 - values.mean())
    return weights


def leave_one_out(
    kernel: np.ndarray, wanted: np.ndarray, weights: np.ndarray, penalty: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Weighted kernel ridge with an intercept, and what it says of each row without that row.

    Parameters
    ----------
    kernel : float64, (rows, rows)
    wanted, weights : float64, (rows,)
    penalty : float

    Returns
    -------
    found : float64, (rows,)
        The regression fitted to all other rows, at this row (Wahba 1990; exact).
    dual : float64, (rows,)
        Of all rows: a query with kernel k has k @ dual + intercept.
    intercept : float
    """
    inverse = np.linalg.inv(kernel + np.diag(penalty / weights))
    side = inverse.sum(1)
    residual = inverse - np.outer(side, side) / side.sum()  # the intercept is not penalised
    dual = residual @ wanted
    return wanted - dual / np.diag(residual), dual, float(side @ wanted / side.sum())


def ridge_patterns(
    rows: np.ndarray, columns: Sequence[tuple[str, np.ndarray]], penalty: float
) -> np.ndarray:
    """Weights of connections in a ridge regression of each column on standardised connections.

    Two classes count the same in all: where one in seven is a woman, an unweighted regression finds
    what most men have in common.

    Parameters
    ----------
    rows : float32, (people, pairs)
        NaN where a pair is missing.
    columns : list of (name, values)
        As from `target_columns`.
    penalty : float
        Of a kernel whose diagonal is about 1. High, because what is wanted is where a variable
        shows, rather than what predicts it best in these very people.

    Returns
    -------
    float32, (columns, pairs)
        Of raw connections, not of standardised ones.
    """
    known = np.isfinite(rows)
    count = np.maximum(known.sum(0), 1)
    centred = np.where(known, rows - np.where(known, rows, 0).sum(0) / count, 0.0)
    spread = np.sqrt((centred**2).sum(0) / count)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-8)
    scaled = (centred * scale).astype(np.float32)
    kernel = (scaled @ scaled.T).astype(np.float64) / scaled.shape[1]
    found = []
    for _, values in columns:
        told = np.isfinite(values)
        weights = balanced_weights(values[told])
        wanted = values[told] - np.average(values[told], weights=weights)
        wanted /= np.sqrt(np.average(wanted**2, weights=weights))
        _, dual, _ = leave_one_out(kernel[np.ix_(told, told)], wanted, weights, penalty)
        found.append((dual.astype(np.float32) @ scaled[told]) * scale)
    return np.stack(found).astype(np.float32)
