"""Scores of many systems on the same held-out subjects: one table of a benchmark.

With several seeds a score is the mean over seeds, and its interval is over subjects and seeds: what
a permutation of labels finds by chance it finds for all subjects alike, so an interval over
subjects alone would be too narrow. Everything paired is paired by subject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from .clinical import (
    CLASS_FLOOR,
    CLASS_REFERENCE,
    NUMERIC_FLOOR,
    NUMERIC_REFERENCE,
    bias_corrected_mae,
    spread,
)
from .predictions import missing_answers
from .scores import (
    area_under_curve,
    balanced_accuracy,
    crossed_interval,
    interval_of,
    mean_absolute_error,
    pearson,
    percentile_interval,
    prediction_r2,
    resampled_auc,
)

#: Sign flips of the paired test; the smallest p is one in this many.
FLIPS = 10_000
CALIBRATION_BINS = 5


class Answers(NamedTuple):
    """One system's answers about one target: rows are subjects, columns are seeds.

    Attributes
    ----------
    subjects : Index
    y : float or str array, (subjects,)
    y_hat : float or str array, (subjects, seeds)
        Invalid answers are the floor's.
    score, probability : float arrays, (subjects, seeds)
        NaN where a system has none.
    site : str array, (subjects,)
    num_invalid : int
        Over all seeds.
    """

    subjects: pd.Index
    y: np.ndarray
    y_hat: np.ndarray
    score: np.ndarray
    probability: np.ndarray
    site: np.ndarray
    num_invalid: int

    def of(self, subjects: pd.Index) -> Answers:
        """Those of some of the subjects, in their order."""
        rows = self.subjects.get_indexer(subjects)
        return self._replace(
            subjects=subjects,
            y=self.y[rows],
            y_hat=self.y_hat[rows],
            score=self.score[rows],
            probability=self.probability[rows],
            site=self.site[rows],
        )


def over_seeds(formula: Callable[[np.ndarray, np.ndarray], float]) -> Callable[..., float]:
    """The mean over seeds of `formula(y (subjects,), y_hat (subjects,))`."""

    def mean(y: np.ndarray, y_hat: np.ndarray) -> float:
        return float(np.mean([formula(y, column) for column in y_hat.T]))

    return mean


def score_view(
    rows: pd.DataFrame, facts: Mapping[str, Mapping[str, Any]], num_resamples: int = 1000
) -> dict[str, Any]:
    """Score every system on every target of one split.

    Parameters
    ----------
    rows : DataFrame
        subject_id, site, target, system, seed, y, y_hat, score, probability; y and y_hat as text.
    facts : mapping
        System -> at least `ranked` and `control`.
    num_resamples : int
        Bootstrap resamples over subjects, the same draws for systems of equal size.

    Returns
    -------
    dict
        Target -> `kind` (number, classes), `num_subjects`, the truth's spread or `class_counts`,
        `systems` (name -> scores), `ranking` (names of what is ranked, best first), `unranked`,
        and `controls` (name -> `passes`, with the figure that decides).

    Notes
    -----
    A control passes when it is no better than the median: for numbers, the interval of the paired
    difference of errors is not below 0; for classes, that of the AUC is not above one half.
    """
    found: dict[str, Any] = {}
    for target, mine in rows.groupby("target", sort=False):
        truth = mine.drop_duplicates("subject_id")["y"]
        numbers = pd.to_numeric(truth, errors="coerce")
        numeric = bool(numbers.notna().all())
        described: dict[str, Any] = {
            "kind": "number" if numeric else "classes",
            "num_subjects": len(truth),
        }
        if numeric:
            described |= spread(numbers.to_numpy(float), "")
        else:
            described["class_counts"] = truth.value_counts().sort_index().to_dict()
        answers = answers_of(mine, numeric)
        score = _score_numbers if numeric else _score_classes
        systems = {
            name: score(name, answers, num_resamples, by_site=not facts[name]["control"])
            for name in answers
        }
        key = "mae" if numeric else "auc"
        sign = 1.0 if numeric else -1.0
        order = sorted(
            systems, key=lambda n: sign * systems[n].get(key, np.nan) if systems[n] else np.inf
        )
        controls = [name for name in order if facts[name]["control"]]
        plain = [name for name in order if name not in controls]
        described["ranking"] = [name for name in plain if facts[name]["ranked"]]
        described["unranked"] = [name for name in plain if not facts[name]["ranked"]]
        described["controls"] = {name: _verdict(systems[name], numeric) for name in controls}
        _holm(systems, [name for name in described["ranking"] if "p_reference" in systems[name]])
        described["systems"] = systems
        found[str(target)] = described
    return found


def score_draws(
    rows: pd.DataFrame, names: Iterable[str], numeric: bool, num_resamples: int
) -> dict[str, dict[str, Any]]:
    """Scores of systems that were fitted several times, as rows beside those fitted once.

    Parameters
    ----------
    rows : DataFrame
        Of one target and one part, in the format of `predictions.py`.
    names : iterable of str
        The systems to score; the others are what they are compared with.
    numeric : bool
    num_resamples : int

    Returns
    -------
    dict
        System -> scores: means over the times, intervals over subjects and times.
    """
    answers = answers_of(rows.assign(seed=rows["draw"]), numeric)
    score = _score_numbers if numeric else _score_classes
    return {
        name: score(name, answers, num_resamples, by_site=False)
        for name in names
        if name in answers
    }


def answers_of(rows: pd.DataFrame, numeric: bool) -> dict[str, Answers]:
    """System -> its answers about one target, on the subjects that all its seeds answered."""
    floor = rows[rows["system"] == (NUMERIC_FLOOR if numeric else CLASS_FLOOR)]
    fallback = floor.drop_duplicates("subject_id").set_index("subject_id")
    invalid = missing_answers(rows, numeric)
    found: dict[str, Answers] = {}
    for name in rows["system"].drop_duplicates():
        mine = (rows["system"] == name).to_numpy()
        table, broken = rows[mine].copy(), invalid[mine]
        table["y_hat"] = table["y_hat"].where(~broken, table["subject_id"].map(fallback["y_hat"]))
        table["score"] = table["score"].where(~broken, 0.0)
        table = table[table["y_hat"].notna()]
        if not len(table):
            continue
        wide = {
            column: table.pivot(index="subject_id", columns="seed", values=column).sort_index()
            for column in ("y_hat", "score", "probability")
        }
        whole = wide["y_hat"].notna().all(axis=1)
        subjects = wide["y_hat"].index[whole]
        first = table.drop_duplicates("subject_id").set_index("subject_id").loc[subjects]
        kind = float if numeric else str
        found[str(name)] = Answers(
            subjects,
            first["y"].to_numpy().astype(kind),
            wide["y_hat"].loc[subjects].to_numpy().astype(kind),
            wide["score"].loc[subjects].to_numpy(float),
            wide["probability"].loc[subjects].to_numpy(float),
            first["site"].to_numpy(str),
            int(broken.sum()),
        )
    return found


def _score_numbers(
    name: str, answers: dict[str, Answers], num_resamples: int, by_site: bool
) -> dict[str, Any]:
    mine = answers[name]
    scores = _counts(mine)
    for key, formula in (("mae", mean_absolute_error), ("r", pearson), ("r2", prediction_r2)):
        statistic = over_seeds(formula)
        scores[key] = statistic(mine.y, mine.y_hat)
        scores[f"{key}_interval"] = crossed_interval(
            statistic, (mine.y,), (mine.y_hat,), num_resamples
        )
    scores |= spread(mine.y_hat.ravel(), "predicted_")
    scores["mae_bias_corrected"] = over_seeds(bias_corrected_mae)(mine.y, mine.y_hat)
    scores["seeds"] = [mean_absolute_error(mine.y, column) for column in mine.y_hat.T]
    for key, other in (("floor", NUMERIC_FLOOR), ("reference", NUMERIC_REFERENCE)):
        pair = _paired(mine, answers.get(other)) if name != other else None
        if pair is None:
            continue
        errors = [np.abs(side.y_hat - side.y[:, None]) for side in pair]
        gap = errors[0].mean(axis=1) - errors[1].mean(axis=1)
        scores[f"difference_to_{key}"] = float(gap.mean())
        drawn = crossed_interval(_mean_gap, (), errors, num_resamples)
        scores[f"difference_to_{key}_interval"] = drawn
        scores[f"p_{key}"] = sign_flip_p(gap)
    scores["calibration"] = _number_calibration(mine)
    if not by_site:
        return scores
    scores["by_site"] = {
        site: {
            "num_subjects": len(rows),
            "mae": float(np.abs(rows - y).mean()),
            "mae_interval": interval_of(np.mean, (np.abs(rows - y).mean(axis=1),), num_resamples),
        }
        for site, y, rows in _sites(mine)
    }
    return scores


def _score_classes(
    name: str, answers: dict[str, Answers], num_resamples: int, by_site: bool
) -> dict[str, Any]:
    mine = answers[name]
    _, coded = np.unique(np.c_[mine.y, mine.y_hat], return_inverse=True)
    coded = coded.reshape(len(mine.y), -1)
    truth, answer = coded[:, 0], coded[:, 1:]
    positive = mine.y == np.unique(mine.y)[-1]
    scores = _counts(mine)
    accuracy, auc = over_seeds(balanced_accuracy), over_seeds(area_under_curve)
    scores["balanced_accuracy"] = accuracy(truth, answer)
    interval = crossed_interval(accuracy, (truth,), (answer,), num_resamples)
    scores["balanced_accuracy_interval"] = interval
    scores["predicted_counts"] = pd.Series(mine.y_hat.ravel()).value_counts().sort_index().to_dict()
    if len(np.unique(mine.y)) == 2:
        scores["auc"] = auc(positive, mine.score)
        drawn = _over_drawn_seeds(resampled_auc(positive, mine.score, num_resamples))
        scores["auc_interval"] = percentile_interval(drawn)
        scores["seeds"] = [area_under_curve(positive, column) for column in mine.score.T]
        pair = _paired(mine, answers.get(CLASS_REFERENCE)) if name != CLASS_REFERENCE else None
        if pair is not None:
            positives = pair[0].y == np.unique(mine.y)[-1]
            first, second = (auc(positives, side.score) for side in pair)
            scores["difference_to_reference"] = first - second
            drawn_first, drawn_second = (
                _over_drawn_seeds(resampled_auc(positives, side.score, num_resamples))
                for side in pair
            )
            gaps = drawn_first - drawn_second
            scores["difference_to_reference_interval"] = percentile_interval(gaps)
            scores["p_reference"] = _bootstrap_p(gaps)
    calibration = _class_calibration(mine, positive)
    if calibration is not None:
        scores["calibration"] = calibration
    if not by_site:
        return scores
    scores["by_site"] = {}
    for site, y, rows in _sites(mine):
        scores["by_site"][site] = {
            "num_subjects": len(rows),
            "balanced_accuracy": accuracy(y, rows),
        }
        of_site = mine.site == site
        if len(np.unique(y)) == 2:
            columns = (positive[of_site], mine.score[of_site])
            scores["by_site"][site]["auc"] = auc(*columns)
            drawn = resampled_auc(*columns, num_resamples).mean(axis=1)
            scores["by_site"][site]["auc_interval"] = percentile_interval(drawn)
    return scores


def _counts(mine: Answers) -> dict[str, Any]:
    return {
        "num_subjects": len(mine.y),
        "num_seeds": mine.y_hat.shape[1],
        "num_invalid": mine.num_invalid,
    }


def _sites(mine: Answers) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(site, y, y_hat) of every site; y as a column where it is a number."""
    found = []
    for site in np.unique(mine.site):
        rows = mine.site == site
        y = mine.y[rows]
        found.append((str(site), y[:, None] if y.dtype.kind == "f" else y, mine.y_hat[rows]))
    return found


def _paired(mine: Answers, other: Answers | None) -> tuple[Answers, Answers] | None:
    """Both systems on the subjects they share."""
    if other is None:
        return None
    common = mine.subjects.intersection(other.subjects)
    return (mine.of(common), other.of(common)) if len(common) else None


def _mean_gap(first: np.ndarray, second: np.ndarray) -> float:
    return float(first.mean() - second.mean())


def _over_drawn_seeds(drawn: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mean over seeds that are drawn with replacement, (resamples, seeds) to (resamples,)."""
    width = drawn.shape[1]
    chosen = np.random.default_rng([seed, 1]).integers(0, width, drawn.shape)
    return np.take_along_axis(drawn, chosen, axis=1).mean(axis=1)


def sign_flip_p(gap: np.ndarray, flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p of paired differences: how often random signs give as large a mean.

    Parameters
    ----------
    gap : float array, (subjects,)
    """
    generator = np.random.default_rng(seed)
    observed = abs(float(gap.sum()))
    beyond = 0
    for _ in range(0, flips, 1000):
        signs = generator.integers(0, 2, (1000, len(gap))) * 2 - 1
        beyond += int((np.abs(signs @ gap) >= observed * (1 - 1e-12)).sum())
    return (1 + beyond) / (1 + flips)


def _bootstrap_p(gaps: np.ndarray) -> float:
    """Two-sided p from the share of resamples on the other side of no difference."""
    gaps = gaps[np.isfinite(gaps)]
    smaller = 1 + min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
    return min(1.0, 2.0 * smaller / (1 + len(gaps)))


def _holm(systems: dict[str, dict[str, Any]], names: list[str]) -> None:
    """Add `p_reference_holm`: the p values corrected for the number of systems compared."""
    largest = 0.0
    for rank, name in enumerate(sorted(names, key=lambda n: systems[n]["p_reference"])):
        largest = max(largest, min(1.0, systems[name]["p_reference"] * (len(names) - rank)))
        systems[name]["p_reference_holm"] = largest


def _verdict(scores: dict[str, Any], numeric: bool) -> dict[str, Any]:
    """Whether a control found nothing; None where there is nothing to compare it with."""
    key = "difference_to_floor" if numeric else "auc"
    low, high = scores.get(f"{key}_interval") or (np.nan, np.nan)
    if numeric:
        passes = bool(high >= 0) if np.isfinite(high) else None
    else:
        passes = bool(low <= 0.5) if np.isfinite(low) else None
    return {"passes": passes, "figure": key, key: scores.get(key), f"{key}_interval": [low, high]}


def _number_calibration(mine: Answers) -> dict[str, Any]:
    """Mean truth in bins of like size of the prediction, and the slope of truth on prediction."""
    y = np.repeat(mine.y, mine.y_hat.shape[1])
    y_hat = mine.y_hat.ravel()
    slope = float(np.polyfit(y_hat, y, 1)[0]) if np.ptp(y_hat) > 1e-9 else float("nan")
    order = np.argsort(y_hat, kind="stable")
    bins = [rows for rows in np.array_split(order, CALIBRATION_BINS) if len(rows)]
    return {
        "slope": slope,
        "predicted": [float(y_hat[rows].mean()) for rows in bins],
        "true": [float(y[rows].mean()) for rows in bins],
    }


def _class_calibration(mine: Answers, positive: np.ndarray) -> dict[str, Any] | None:
    """Share of the class in bins of its probability, and the Brier score; None without any."""
    if not np.isfinite(mine.probability).all():
        return None
    truth = np.repeat(positive, mine.probability.shape[1])
    probability = mine.probability.ravel()
    order = np.argsort(probability, kind="stable")
    bins = [rows for rows in np.array_split(order, CALIBRATION_BINS) if len(rows)]
    return {
        "brier": float(((probability - truth) ** 2).mean()),
        "predicted": [float(probability[rows].mean()) for rows in bins],
        "true": [float(truth[rows].mean()) for rows in bins],
    }
