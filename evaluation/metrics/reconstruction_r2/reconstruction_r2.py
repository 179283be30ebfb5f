"""R2 of reconstructed region series, pooled over scans and regions, never clipped."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cortexicon.evaluation.scores import r2_from_sums, squared_error_sums

DESCRIPTION = """
predictions, references: one (time, regions) series per scan, reconstructed and raw. SST is taken
around each scan's own mean of each region; regions constant in the reference are left out."""


class ReconstructionR2(evaluate.Metric):
    """R2 of reconstructed region series, pooled over scans and regions, never clipped."""

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

    def _compute(self, predictions: list, references: list) -> dict[str, Any]:
        """`r2` pooled, and `r2_per_scan` in the order given."""
        sums = [
            squared_error_sums(np.asarray(raw), np.asarray(decoded))
            for raw, decoded in zip(references, predictions, strict=True)
        ]
        sse = np.array([np.nansum(errors) for errors, _ in sums])
        sst = np.array([np.nansum(squares) for _, squares in sums])
        return {
            "r2": float(r2_from_sums(sse.sum(), sst.sum())),
            "r2_per_scan": r2_from_sums(sse, sst).tolist(),
        }
