"""R2 of reconstructed region series, never clipped, and how much of their connectivity is kept."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cortexicon.evaluation.metric_inputs import paired_scans
from cortexicon.evaluation.scores import (
    fisher_z,
    pearson,
    r2_from_sums,
    squared_error_sums,
    valid_regions,
)

DESCRIPTION = """
predictions, references: one (time, regions) series per scan, reconstructed and raw. SST is taken
around each scan's own mean of each region; regions constant in the reference are left out. Give
compute() the training scans' mean Fisher-z vectors (training_raw, training_decoded; upper triangle)
to get the connectivity's deviation from the group as well: the group's mean alone scores high on
the full matrix."""


class FmriReconstruction(evaluate.Metric):
    """R2 of reconstructed region series, and how much of their connectivity is kept."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
                    "references": datasets.Sequence(datasets.Sequence(datasets.Value("float64"))),
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
        """Scores of all scans together.

        Returns
        -------
        dict
            `r2` pooled over scans and regions; `r2_per_scan` in the order given;
            `connectivity_full`, median over scans of the correlation of Fisher-z connectivity
            before and after; `connectivity_deviation`, the same after each side's training mean
            is taken off, where both means are given.
        """
        pairs = paired_scans(predictions, references)
        sums = [squared_error_sums(raw, decoded) for raw, decoded in pairs]
        sse = np.array([np.nansum(errors) for errors, _ in sums])
        sst = np.array([np.nansum(squares) for _, squares in sums])
        z = [
            (fisher_z(raw, valid_regions(raw)), fisher_z(decoded, valid_regions(raw)))
            for raw, decoded in pairs
        ]
        found = {
            "r2": float(r2_from_sums(sse.sum(), sst.sum())),
            "r2_per_scan": r2_from_sums(sse, sst).tolist(),
            "connectivity_full": float(np.median([pearson(a, b) for a, b in z])),
        }
        if training_raw is not None and training_decoded is not None:
            means = np.asarray(training_raw), np.asarray(training_decoded)
            found["connectivity_deviation"] = float(
                np.median([pearson(a - means[0], b - means[1]) for a, b in z])
            )
        return found
