"""What the numbers are: scores predictions and reconstructions; trains nothing but baselines.

Names are imported on first use: scikit-learn and Matplotlib load only where they are needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines import run_baselines
    from .clinical import score_clinical
    from .code_geometry import geometry
    from .cohort_report import write_cohort_report
    from .cross_atlas import CrossAtlas, ScanPair
    from .errors import EvaluationError
    from .json_files import write_json
    from .paired_r2 import PairedR2
    from .patch_kmeans import region_patch_baseline, tokenizer_baseline
    from .predictions import read_predictions, write_predictions
    from .probes import control_rows, gap_closed, probe_alignment
    from .rate_distortion import gaussian_reference
    from .reconstruction import ReconstructionScores, evaluate_reconstruction
    from .report import write_report
    from .results import collect_results
    from .scan_images import networks_of, render_scan

_HOME = {
    "CrossAtlas": "cross_atlas",
    "EvaluationError": "errors",
    "PairedR2": "paired_r2",
    "ReconstructionScores": "reconstruction",
    "ScanPair": "cross_atlas",
    "collect_results": "results",
    "control_rows": "probes",
    "evaluate_reconstruction": "reconstruction",
    "gap_closed": "probes",
    "gaussian_reference": "rate_distortion",
    "geometry": "code_geometry",
    "networks_of": "scan_images",
    "probe_alignment": "probes",
    "read_predictions": "predictions",
    "region_patch_baseline": "patch_kmeans",
    "render_scan": "scan_images",
    "run_baselines": "baselines",
    "score_clinical": "clinical",
    "tokenizer_baseline": "patch_kmeans",
    "write_cohort_report": "cohort_report",
    "write_json": "json_files",
    "write_predictions": "predictions",
    "write_report": "report",
}

__all__ = [
    "CrossAtlas",
    "EvaluationError",
    "PairedR2",
    "ReconstructionScores",
    "ScanPair",
    "collect_results",
    "control_rows",
    "evaluate_reconstruction",
    "gap_closed",
    "gaussian_reference",
    "geometry",
    "networks_of",
    "probe_alignment",
    "read_predictions",
    "region_patch_baseline",
    "render_scan",
    "run_baselines",
    "score_clinical",
    "tokenizer_baseline",
    "write_cohort_report",
    "write_json",
    "write_predictions",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
