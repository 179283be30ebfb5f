"""Balanced accuracy, accuracy of each class, and AUC over subjects."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cortexicon.evaluation.metric_inputs import finite_numbers, known_labels
from cortexicon.evaluation.scores import (
    area_under_curve,
    balanced_accuracy,
    interval_of,
)

DESCRIPTION = """
predictions, references: one label per subject; scores (to compute(), optional): one number per
subject, higher the more likely the class that sorts last; the AUC of two classes needs them.
compute(num_resamples=, seed=) sets the bootstrap of the 95 % intervals; 0 resamples: none."""


class ClinicalClassification(evaluate.Metric):
    """Balanced accuracy, accuracy of each class, and AUC over subjects."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        scores: list | None = None,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        """`balanced_accuracy`, `recall` by class, and `auc` where scores are given."""
        y = known_labels("references", references)
        y_hat = known_labels("predictions", predictions, len(y))
        _, coded = np.unique(np.r_[y, y_hat], return_inverse=True)
        truth, answer = coded[: len(y)], coded[len(y) :]
        found: dict[str, Any] = {
            "balanced_accuracy": balanced_accuracy(truth, answer),
            "recall": {
                str(name): float((y_hat[y == name] == name).mean()) for name in np.unique(y)
            },
        }
        columns: dict[str, Any] = {"balanced_accuracy": (balanced_accuracy, (truth, answer))}
        if scores is not None:
            values = finite_numbers("scores", scores, len(y))
            positive = y == np.unique(y)[-1]
            found["auc"] = area_under_curve(positive, values)
            columns["auc"] = area_under_curve, (positive, values)
        for name, (formula, arrays) in columns.items():
            if num_resamples:
                found[f"{name}_interval"] = interval_of(formula, arrays, num_resamples, seed)
        return found
