"""Usage, entropy and perplexity of a codebook."""

from typing import Any

import datasets
import evaluate
import numpy as np

from cortexicon.evaluation.metric_inputs import whole_codes
from cortexicon.evaluation.scores import code_usage

DESCRIPTION = (
    """predictions: one list of codes per window. compute(num_codes=K) names the codebook's size."""
)


class CodebookUsage(evaluate.Metric):
    """Usage, entropy and perplexity of a codebook."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int64")),
                }
            ),
        )

    def _compute(self, predictions: list, num_codes: int) -> dict[str, Any]:
        """See `cortexicon.evaluation.scores.code_usage`."""
        return code_usage(np.bincount(whole_codes(predictions, num_codes), minlength=num_codes))
