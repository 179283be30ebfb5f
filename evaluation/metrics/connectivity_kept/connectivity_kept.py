"""Correlation of Fisher-z connectivity before and after, median over scans."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cortexicon.evaluation.scores import fisher_z, pearson, valid_regions

DESCRIPTION = """
predictions, references: one (time, regions) series per scan, decoded and raw. Give compute()
the training scans' mean Fisher-z vectors (training_raw, training_decoded; upper triangle) to get
the deviation from the group as well: the group's mean alone scores high on the full matrix."""


class ConnectivityKept(evaluate.Metric):
    """Correlation of Fisher-z connectivity before and after, median over scans."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                    "references": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
                }
            ),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        training_raw: np.ndarray | None = None,
        training_decoded: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """`full`, and `deviation` where both training means are given."""
        pairs = []
        for raw, decoded in zip(references, predictions, strict=True):
            valid = valid_regions(np.asarray(raw))
            pairs.append((fisher_z(np.asarray(raw), valid), fisher_z(np.asarray(decoded), valid)))
        found = {"full": float(np.nanmedian([pearson(a, b) for a, b in pairs]))}
        if training_raw is not None and training_decoded is not None:
            means = np.asarray(training_raw), np.asarray(training_decoded)
            found["deviation"] = float(
                np.nanmedian([pearson(a - means[0], b - means[1]) for a, b in pairs])
            )
        return found
