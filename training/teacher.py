"""What regressions on a scan's tokens would answer: soft labels for a language model.

A few hundred people's true answers are too noisy for a language model to learn from by gradient:
it learns people by heart instead. A closed-form regression is not tempted. Its answer about a
person that it was fitted without, with as much doubt as it deserves, is a label with the noise
taken out (knowledge distillation, Hinton et al. 2015, with `fit_patterns` as the teacher).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from .scan_patterns import columns_of


class AnswerTeacher:
    """Distributions over the valid answers of each question about each training scan.

    Numbers: Gaussian around a line through the leave-one-out scores (of logarithms, where all
    values are positive), its SD that of the line's errors. Classes: logistic regression on the
    scores of the target's own patterns.

    Parameters
    ----------
    scores : float array, (scans, patterns)
        Of each person by patterns that were fitted without that person (`PatternFit.scores`).
    people : DataFrame
        A row for each scan.
    targets : list of dict
        As in `AVQLMConfig.targets`; the patterns are theirs, in this order.
    balanced : bool
        Classes count the same in all, as for the patterns; else as often as they occur.
    """

    def __init__(
        self,
        scores: np.ndarray,
        people: pd.DataFrame,
        targets: Sequence[dict[str, Any]],
        balanced: bool,
    ):
        self._shares: dict[str, np.ndarray] = {}
        for target, mine in columns_of(people, targets):
            read, known = scores[:, mine], people[target["name"]].notna().to_numpy()
            told = people[target["name"]][known]
            make = _numbers if target["kind"] == "number" else _classes
            self._shares[target["name"]] = make(read, known, told, target, balanced)

    def shares(self, scan: int, target: dict[str, Any]) -> np.ndarray:
        """Probability of each valid answer, float64 (answers,), in the order of `answers_of`."""
        return self._shares[target["name"]][scan]


def _numbers(read, known, told, target, _balanced) -> np.ndarray:
    grid = np.arange(target["minimum"], target["maximum"] + 1, dtype=float)
    values = told.to_numpy(float)
    positive = (values > 0).all() and target["minimum"] > 0
    scale = np.log if positive else np.asarray
    slope, centre = np.polyfit(read[known, 0], scale(values), 1)
    doubt = float(np.std(scale(values) - centre - slope * read[known, 0]))
    away = (scale(grid)[None] - centre - slope * read[:, :1]) / max(doubt, 1e-6)
    # Whole numbers lie closer together the larger they are, on a scale of logarithms.
    width = 1.0 / grid if positive else np.ones_like(grid)
    density = np.exp(-0.5 * (away**2 - (away**2).min(1, keepdims=True))) * width
    return density / density.sum(1, keepdims=True)


def _classes(read, known, told, target, balanced) -> np.ndarray:
    model = LogisticRegression(
        C=100.0, class_weight="balanced" if balanced else None, max_iter=1000
    )
    model.fit(read[known], told.astype(str).to_numpy())
    found = np.zeros((len(read), len(target["classes"])))
    places = [target["classes"].index(name) for name in model.classes_]
    found[:, places] = model.predict_proba(read)
    return found
