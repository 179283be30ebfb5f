"""Files of predictions: the one format every system, ours or not, is scored from.

CSV with a header: `subject_id,y,y_hat,system,target,fold,part`, one row per subject and fold;
`part` is validation, test, test_sites, or all (predicted without a split). For classes y and y_hat
are labels, and the column `score` is higher the more likely the class that sorts last; where it is
a probability, `probability` repeats it, and calibration is shown. A column `site` is optional; one
file that has it serves all (the per-site table needs it). An empty y_hat is an invalid answer;
`free_answer_valid`, optional too, is the share of a subject's answers that were valid before a
grammar was laid over them. Where a system was fitted several times, `draw` numbers the times: a
seed of a model, or one of the permutations of a control.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import EvaluationError

COLUMNS = ["subject_id", "y", "y_hat", "system", "target", "fold", "part"]
OPTIONAL_COLUMNS = ["score", "probability", "site", "free_answer_valid", "draw"]
PARTS = ("validation", "test", "test_sites", "all")


def write_predictions(
    path: str | Path,
    subject_ids: Iterable[str],
    y: np.ndarray,
    y_hat: np.ndarray,
    *,
    system: str,
    target: str,
    fold: int,
    part: str | Iterable[str],
    score: np.ndarray | None = None,
    site: np.ndarray | None = None,
    draw: np.ndarray | None = None,
) -> Path:
    """Write one system's predictions of one target, through a temporary file.

    Parameters
    ----------
    path : path
    subject_ids : iterable of str
    y, y_hat : arrays, (subjects,)
        Numbers, or class labels.
    system, target : str
    fold : int
    part : str or one per subject
    score : float array, (subjects,), optional
        For classes: higher means the class that sorts last is more likely.
    site : array of str, (subjects,), optional
    draw : int array, (subjects,), optional
        Which time it was fitted, where the rows hold several.

    Returns
    -------
    Path
        The file written.
    """
    table = pd.DataFrame({"subject_id": [str(name) for name in subject_ids]})
    table["y"], table["y_hat"] = np.asarray(y), np.asarray(y_hat)
    table["system"], table["target"], table["fold"] = system, target, fold
    table["part"] = part if isinstance(part, str) else list(part)
    if score is not None:
        table["score"] = np.asarray(score, float)
    if site is not None:
        table["site"] = np.asarray(site, str)
    if draw is not None:
        table["draw"] = np.asarray(draw, int)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    table.to_csv(temporary, index=False)
    temporary.replace(path)
    return path


def read_predictions(paths: Iterable[str | Path]) -> pd.DataFrame:
    """Read and check files of predictions.

    Returns
    -------
    DataFrame
        Columns of the format with the optional ones (NaN or empty where unknown), y and y_hat as
        strings, one row per subject, system, target, part and draw.

    Raises
    ------
    EvaluationError
        If a file is missing or unreadable, a column is absent, a part is unknown, y is missing,
        or one system predicts a subject twice for one target in one draw.
    """
    tables = []
    for path in map(Path, paths):
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise EvaluationError(
                f"{path}: expected a CSV file of predictions, could not read it ({error})."
            ) from error
        absent = [name for name in COLUMNS if name not in table]
        if absent:
            raise EvaluationError(
                f"{path}: expected the columns {', '.join(COLUMNS)}; missing {', '.join(absent)}, "
                f"found {', '.join(table.columns)}."
            )
        unknown = sorted(set(table["part"]) - set(PARTS))
        if unknown:
            raise EvaluationError(
                f"{path}: part must be one of {', '.join(PARTS)}; found {', '.join(unknown)}."
            )
        unlabelled = table["subject_id"][_is_missing(table["y"])]
        if len(unlabelled):
            raise EvaluationError(
                f"{path}: {len(unlabelled)} rows have no true value y, the first for subject "
                f"{unlabelled.iloc[0]}; leave out subjects whose target is unknown."
            )
        for name in OPTIONAL_COLUMNS:
            if name not in table:
                table[name] = ""
        for name in ("score", "probability", "free_answer_valid"):
            table[name] = pd.to_numeric(table[name], errors="coerce")
        tables.append(table[[*COLUMNS, *OPTIONAL_COLUMNS]].assign(file=str(path)))
    if not tables:
        raise EvaluationError("No file of predictions was given; expected at least one CSV file.")
    rows = pd.concat(tables, ignore_index=True)
    key = ["subject_id", "system", "target", "part", "draw"]
    twice = rows[rows.duplicated(key, keep=False)]
    if len(twice):
        first = twice.iloc[0]
        files = sorted(set(twice[(twice[key] == first[key]).all(axis=1)]["file"]))
        raise EvaluationError(
            f"Subject {first.subject_id} is predicted more than once by '{first.system}' for "
            f"'{first.target}' in part {first.part} ({', '.join(files)}); each subject may be "
            "tested once. Remove the stale file."
        )
    truth = rows.groupby(["subject_id", "target"])["y"].agg(lambda values: len(set(values)))
    if (truth > 1).any():
        rows = _agreed_truth(rows, list(truth.index[truth > 1]))
    named = rows[rows["site"] != ""]
    sites = dict(zip(named["subject_id"], named["site"], strict=True))
    rows["site"] = [sites.get(name, "") for name in rows["subject_id"]]
    return rows


def _is_missing(values: pd.Series) -> pd.Series:
    return values.str.strip().str.lower().isin({"", "nan"})


def _agreed_truth(rows: pd.DataFrame, keys: list[tuple[str, str]]) -> pd.DataFrame:
    """Accept 21.0 beside 21 for one subject's truth; refuse values that really differ."""
    for subject_id, target in keys:
        mine = (rows["subject_id"] == subject_id) & (rows["target"] == target)
        numbers = pd.to_numeric(rows.loc[mine, "y"], errors="coerce")
        if numbers.isna().any() or np.ptp(numbers) > 1e-3 * max(1.0, float(numbers.abs().max())):
            raise EvaluationError(
                f"The files disagree on the true {target} of subject {subject_id}: "
                f"{', '.join(sorted(set(rows.loc[mine, 'y'])))}. Predict from the same cohort."
            )
        rows.loc[mine, "y"] = str(numbers.iloc[0])
    return rows


def missing_answers(rows: pd.DataFrame, numeric: bool) -> np.ndarray:
    """True where y_hat is empty or, for a numeric target, no finite number; bool (rows,)."""
    if numeric:
        return ~np.isfinite(pd.to_numeric(rows["y_hat"], errors="coerce").to_numpy(float))
    return _is_missing(rows["y_hat"]).to_numpy()
