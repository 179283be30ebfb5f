"""Scores files of predictions: any system, ours or not, by the same code, subject by subject."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .errors import EvaluationError
from .predictions import missing_answers, read_predictions
from .scores import (
    area_under_curve,
    balanced_accuracy,
    bootstrap_interval,
    interval_of,
    mean_absolute_error,
    pearson,
    prediction_r2,
)

# The systems every other one is compared with (`baselines.py` writes them).
NUMERIC_FLOOR, NUMERIC_REFERENCE = "cohort median", "kernel ridge on connectivity"
CLASS_FLOOR, CLASS_REFERENCE = "majority class", "SVM on connectivity"
SCORED_PARTS = ("test", "test_sites")


def score_clinical(
    prediction_files: Iterable[str | Path],
    parts: Sequence[str] = SCORED_PARTS,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score every system of every target in every part.

    Parameters
    ----------
    prediction_files : iterable of path
        Files in the format of `predictions.py`; folds of one system are pooled.
    parts : sequence of str
    num_resamples : int
        Bootstrap resamples over subjects, the same draws for all systems of equal size.
    seed : int

    Returns
    -------
    dict
        {target: {"kind": "number" or "classes", "parts": {part: {"num_subjects", the true values'
        `sd`, `minimum`, `maximum` or class counts, "systems": {system: scores}, "ranking"}}}}.
        Numbers: `mae`, `r`, `r2`, each with `_interval`; `predicted_sd`, `predicted_minimum`,
        `predicted_maximum`; `difference_to_reference` and `difference_to_floor` (MAE of the system
        minus that of kernel ridge / of the median, same subjects; below 0 is better) with
        intervals; `gain_share` (share of kernel ridge's gain over the median that the system
        recovers); `mae_bias_corrected`, shown and never ranked, since it uses the true value.
        Classes: `balanced_accuracy`, `auc`, differences of the AUC (above 0 is better).
        Both: `num_subjects`, `num_invalid`, `free_answers_valid`, `by_site`. What cannot be
        compared is absent.

    Raises
    ------
    EvaluationError
        From `read_predictions`; also if the truth of a target is partly number, partly label.

    Notes
    -----
    An invalid answer counts as the floor's answer for that subject (the cohort median, the
    majority class), so that no system gains by declining to answer. Where no file holds the floor
    it is left out; `num_invalid` counts it either way.

    Of a system that was fitted several times (column `draw`, such as the permuted labels), scores
    are means over the times, and intervals are over subjects and times, as in a benchmark.
    """
    rows = read_predictions(prediction_files)
    result: dict[str, Any] = {}
    for target, of_target in rows.groupby("target", sort=False):
        numbers = pd.to_numeric(of_target["y"], errors="coerce").to_numpy(float)
        numeric = bool(np.isfinite(numbers).all())
        if not numeric and np.isfinite(numbers).any():
            raise EvaluationError(
                f"Target '{target}' has both numbers and labels as true values, for example "
                f"{', '.join(sorted(set(of_target['y']))[:4])}; give one kind in all files."
            )
        of_part = {
            part: _score_part(of_target[of_target["part"] == part], numeric, num_resamples, seed)
            for part in parts
            if (of_target["part"] == part).any()
        }
        result[str(target)] = {"kind": "number" if numeric else "classes", "parts": of_part}
    return result


def _score_part(rows: pd.DataFrame, numeric: bool, num_resamples: int, seed: int) -> dict[str, Any]:
    floor, reference = (
        (NUMERIC_FLOOR, NUMERIC_REFERENCE) if numeric else (CLASS_FLOOR, CLASS_REFERENCE)
    )
    times = rows.groupby("system")["draw"].nunique()
    often = set(times.index[times > 1])
    everything, rows = rows, rows[~rows["system"].isin(often)]
    invalid_rows = missing_answers(rows, numeric)
    floor_rows = rows[rows["system"] == floor].set_index("subject_id")
    tables: dict[str, pd.DataFrame] = {}
    invalid: dict[str, int] = {}
    for system in rows["system"].drop_duplicates():
        mine = (rows["system"] == system).to_numpy()
        table = rows[mine].copy()
        table["invalid"] = invalid_rows[mine]
        invalid[system] = int(table["invalid"].sum())
        for column, fallback in (("y_hat", np.nan), ("score", 0.0)):
            known = table["subject_id"].map(floor_rows[column]) if len(floor_rows) else fallback
            table[column] = table[column].where(~table["invalid"], known)
        table = table[table["y_hat"].notna() & ~table["y_hat"].isin([""])].set_index("subject_id")
        if numeric:
            table["y"], table["y_hat"] = table["y"].astype(float), table["y_hat"].astype(float)
        tables[system] = table.sort_index()

    truth = everything.drop_duplicates("subject_id")["y"]
    described: dict[str, Any] = {"num_subjects": len(truth)}
    if numeric:
        described |= spread(truth.astype(float).to_numpy(), "")
    else:
        described["class_counts"] = truth.value_counts().sort_index().to_dict()
    score_one = _score_numbers if numeric else _score_classes
    systems: dict[str, dict[str, Any]] = {}
    for system, table in tables.items():
        scores: dict[str, Any] = {"num_subjects": len(table), "num_invalid": invalid[system]}
        free = table["free_answer_valid"].dropna()
        if len(free):
            scores["free_answers_valid"] = float(free.mean())
        if len(table):
            # Comparing a system with itself says nothing.
            of_floor = tables.get(floor) if system != floor else None
            of_reference = tables.get(reference) if system != reference else None
            scores |= score_one(table, of_floor, of_reference, num_resamples, seed)
            scores["by_site"] = _by_site(table, numeric)
        systems[system] = scores
    if often:
        from .benchmark_scores import score_draws  # it is built on this module

        systems |= score_draws(everything, sorted(often), numeric, num_resamples)
    key, sign = ("mae", 1.0) if numeric else ("auc", -1.0)
    order = [
        (sign * scores[key] if np.isfinite(scores.get(key, np.nan)) else np.inf, name)
        for name, scores in systems.items()
    ]
    described["ranking"] = [name for _, name in sorted(order, key=lambda item: item[0])]
    described["systems"] = systems
    return described


def spread(values: np.ndarray, prefix: str) -> dict[str, float]:
    """SD, minimum and maximum, their keys with `prefix`."""
    return {
        f"{prefix}sd": float(values.std(ddof=1)) if len(values) > 1 else float("nan"),
        f"{prefix}minimum": float(values.min()),
        f"{prefix}maximum": float(values.max()),
    }


def _score_numbers(
    table: pd.DataFrame,
    floor: pd.DataFrame | None,
    reference: pd.DataFrame | None,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    y, y_hat = table["y"].to_numpy(), table["y_hat"].to_numpy()
    scores: dict[str, Any] = {}
    for name, formula in (("mae", mean_absolute_error), ("r", pearson), ("r2", prediction_r2)):
        scores[name] = formula(y, y_hat)
        scores[f"{name}_interval"] = interval_of(formula, (y, y_hat), num_resamples, seed)
    scores |= spread(y_hat, "predicted_")
    scores["mae_bias_corrected"] = bias_corrected_mae(y, y_hat)
    for name, other in (("difference_to_floor", floor), ("difference_to_reference", reference)):
        errors = _paired_errors(table, other)
        if errors is not None:
            gap = errors[0] - errors[1]
            scores[name] = float(gap.mean())
            scores[f"{name}_interval"] = interval_of(np.mean, (gap,), num_resamples, seed)
    errors = _paired_errors(table, floor, reference)
    if errors is not None:
        mine, of_floor, of_reference = errors

        def share(rows: np.ndarray) -> float:
            gain = of_floor[rows].mean() - of_reference[rows].mean()
            return float((of_floor[rows].mean() - mine[rows].mean()) / gain) if gain > 0 else np.nan

        scores["gain_share"] = share(np.arange(len(mine)))
        scores["gain_share_interval"] = list(
            bootstrap_interval(share, len(mine), num_resamples, seed)
        )
    return scores


def _paired_errors(*tables: pd.DataFrame | None) -> list[np.ndarray] | None:
    """Absolute errors of several systems on the subjects common to all."""
    known = [table for table in tables if table is not None]
    if len(known) < len(tables):
        return None
    common = known[0].index
    for table in known[1:]:
        common = common.intersection(table.index)
    if not len(common):
        return None
    return [np.abs(t.loc[common, "y_hat"] - t.loc[common, "y"]).to_numpy() for t in known]


def bias_corrected_mae(y: np.ndarray, y_hat: np.ndarray) -> float:
    """MAE after the error's straight-line dependence on the TRUE value is removed.

    NOTE: the usual "bias correction" of brain-age papers. It knows the true value, so a constant
    predictor comes out perfect; it is printed because readers look for it, and ranks nothing.
    """
    if len(y) < 3 or np.ptp(y) == 0:
        return float("nan")
    slope, intercept = np.polyfit(y, y_hat - y, 1)
    return mean_absolute_error(y, y_hat - (slope * y + intercept))


def _score_classes(
    table: pd.DataFrame,
    floor: pd.DataFrame | None,
    reference: pd.DataFrame | None,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    y, y_hat = table["y"].to_numpy(str), table["y_hat"].to_numpy(str)
    # Whole numbers instead of strings: the bootstrap compares them a thousand times.
    _, coded = np.unique(np.r_[y, y_hat], return_inverse=True)
    truth_code, answer_code = coded[: len(y)], coded[len(y) :]
    scores: dict[str, Any] = {
        "balanced_accuracy": balanced_accuracy(y, y_hat),
        "balanced_accuracy_interval": interval_of(
            balanced_accuracy, (truth_code, answer_code), num_resamples, seed
        ),
        "auc": _auc(table),
        "predicted_counts": pd.Series(y_hat).value_counts().sort_index().to_dict(),
    }
    positive, values = (y == np.unique(y)[-1]), table["score"].to_numpy(float)
    scores["auc_interval"] = interval_of(area_under_curve, (positive, values), num_resamples, seed)
    for name, other in (("difference_to_floor", floor), ("difference_to_reference", reference)):
        if other is None or not len(common := table.index.intersection(other.index)):
            continue
        mine, theirs = table.loc[common], other.loc[common]
        truth = (mine["y"] == mine["y"].max()).to_numpy()
        first, second = mine["score"].to_numpy(float), theirs["score"].to_numpy(float)
        scores[name] = _auc_gap(truth, first, second)
        scores[f"{name}_interval"] = interval_of(
            _auc_gap, (truth, first, second), num_resamples, seed
        )
    return scores


def _auc_gap(truth: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    return area_under_curve(truth, first) - area_under_curve(truth, second)


def _auc(table: pd.DataFrame) -> float:
    """AUC of the class that sorts last; NaN unless there are two classes and all scores."""
    y = table["y"].to_numpy(str)
    if len(np.unique(y)) != 2:
        return float("nan")
    return area_under_curve(y == np.unique(y)[-1], table["score"].to_numpy(float))


def _by_site(table: pd.DataFrame, numeric: bool) -> dict[str, dict[str, float]]:
    """Scores within each site; empty where the files do not name the sites."""
    found: dict[str, dict[str, float]] = {}
    for site, rows in table[table["site"] != ""].groupby("site"):
        scores: dict[str, float] = {"num_subjects": len(rows)}
        y, y_hat = rows["y"].to_numpy(), rows["y_hat"].to_numpy()
        if numeric:
            scores["mae"] = mean_absolute_error(y, y_hat)
            scores["r"] = pearson(y, y_hat) if len(rows) > 2 else float("nan")
        else:
            scores["balanced_accuracy"] = balanced_accuracy(y, y_hat)
            scores["auc"] = _auc(rows)
        found[str(site)] = scores
    return found
