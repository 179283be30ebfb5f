"""A file of predictions scored by the metric modules, as an `evaluate.EvaluationSuite`.

`EvaluationSuite.load("evaluation/suites/clinical.py").run("predictions.csv")`. NOTE: evaluate's own
evaluators run text and image pipelines on data sets of the Hub; they know no task for a scan and no
regression. So the sub-tasks here are the systems and targets of a file in our format, and `run`
takes that file in place of a model; what comes back has the form that `evaluate` gives.
"""

from typing import Any

import evaluate
import pandas as pd

from cortexicon.evaluation.metrics.clinical_classification.clinical_classification import (
    ClinicalClassification,
)
from cortexicon.evaluation.metrics.clinical_regression.clinical_regression import (
    ClinicalRegression,
)
from cortexicon.evaluation.predictions import read_predictions


class Suite(evaluate.EvaluationSuite):
    """Every system, target and part of a file of predictions."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.suite: list = []

    def run(self, predictions: str, num_resamples: int = 1000) -> list[dict[str, Any]]:
        """Score a file.

        Parameters
        ----------
        predictions : path
            See `cortexicon.evaluation.predictions`.
        num_resamples : int
            Of the bootstrap over subjects.

        Returns
        -------
        list of dict
            `task_name` (system/target/part), `num_subjects`, and the metric's scores.

        Raises
        ------
        EvaluationError
            The file is refused, or holds an invalid answer.
        """
        rows = read_predictions([predictions])
        found = []
        for (system, target, part), mine in rows.groupby(["system", "target", "part"], sort=False):
            y = pd.to_numeric(mine["y"], errors="coerce")
            if y.notna().all():
                y_hat = pd.to_numeric(mine["y_hat"], errors="coerce")
                scores = ClinicalRegression().compute(
                    predictions=y_hat, references=y, num_resamples=num_resamples
                )
            else:
                known = mine["score"].notna().all()
                scores = ClinicalClassification().compute(
                    predictions=mine["y_hat"],
                    references=mine["y"],
                    scores=mine["score"].tolist() if known else None,
                    num_resamples=num_resamples,
                )
            name = f"{system}/{target}/{part}"
            found.append({"task_name": name, "num_subjects": len(mine), **scores})
        return found
