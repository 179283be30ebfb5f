"""MAE, Pearson r and R2 over subjects, each with a bootstrap interval."""

from typing import Any

import datasets
import evaluate

from cortexicon.evaluation.metric_inputs import finite_numbers
from cortexicon.evaluation.scores import (
    interval_of,
    mean_absolute_error,
    pearson,
    prediction_r2,
)

DESCRIPTION = """
predictions, references: one finite number per subject. compute(num_resamples=, seed=) sets the
bootstrap of the 95 % intervals, which draws subjects with replacement; 0 resamples: none."""


class ClinicalRegression(evaluate.Metric):
    """MAE, Pearson r and R2 over subjects, each with a bootstrap interval."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self, predictions: list, references: list, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        """`mae`, `r`, `r2`, and each with `_interval`."""
        y = finite_numbers("references", references)
        y_hat = finite_numbers("predictions", predictions, len(y))
        found: dict[str, Any] = {}
        for name, formula in (("mae", mean_absolute_error), ("r", pearson), ("r2", prediction_r2)):
            found[name] = formula(y, y_hat)
            if num_resamples:
                found[f"{name}_interval"] = interval_of(formula, (y, y_hat), num_resamples, seed)
        return found
