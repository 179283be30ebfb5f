"""How well a classifier tells two domains apart: codes from text, one site from another."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cortexicon.evaluation.errors import EvaluationError
from cortexicon.evaluation.metric_inputs import finite_numbers, known_labels
from cortexicon.evaluation.scores import area_under_curve, balanced_accuracy

DESCRIPTION = """
predictions, references: the domain of each vector as answered and as it is, two domains in all;
scores (to compute(), optional): higher the more likely the domain that sorts last. Score vectors of
types that the classifier has not seen: one that learned them by heart knows nothing of domains."""


class DomainConfusion(evaluate.Metric):
    """How well a classifier tells two domains apart: codes from text, one site from another."""

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
        """The domains' confusion.

        Returns
        -------
        dict
            `balanced_accuracy`; `separability`, max(accuracy, 1 - accuracy) of it, 0.5 where the
            domains are confused; `confusion`, 2 - 2 x separability, 1 where they are; `counts`,
            true domain -> answered domain -> vectors; with scores `auc`.
        """
        y = known_labels("references", references)
        y_hat = known_labels("predictions", predictions, len(y))
        names = np.unique(np.r_[y, y_hat])
        if len(names) > 2 or len(np.unique(y)) != 2:
            raise EvaluationError(
                f"expected two domains, both among the references; found {', '.join(np.unique(y))} "
                f"there and {', '.join(names)} in all."
            )
        accuracy = balanced_accuracy(y, y_hat)
        separability = max(accuracy, 1.0 - accuracy)
        found: dict[str, Any] = {
            "balanced_accuracy": accuracy,
            "separability": separability,
            "confusion": 2.0 - 2.0 * separability,
            "counts": {
                str(a): {str(b): int(((y == a) & (y_hat == b)).sum()) for b in names} for a in names
            },
        }
        if scores is not None:
            values = finite_numbers("scores", scores, len(y))
            found["auc"] = area_under_curve(y == names[-1], values)
        return found
