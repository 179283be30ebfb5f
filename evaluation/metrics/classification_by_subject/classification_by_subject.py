"""Balanced accuracy and AUC over subjects."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cortexicon.evaluation.scores import area_under_curve, balanced_accuracy

DESCRIPTION = """
predictions, references: one label per subject; scores (to compute(), optional): one number per
subject, higher the more likely the class that sorts last; the AUC needs them."""


class ClassificationBySubject(evaluate.Metric):
    """Balanced accuracy and AUC over subjects."""

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
        self, predictions: list, references: list, scores: list | None = None
    ) -> dict[str, Any]:
        """`balanced_accuracy`, and `auc` where scores are given."""
        y, y_hat = np.asarray(references, str), np.asarray(predictions, str)
        found = {"balanced_accuracy": balanced_accuracy(y, y_hat)}
        if scores is not None:
            found["auc"] = area_under_curve(y == np.unique(y)[-1], np.asarray(scores, float))
        return found
