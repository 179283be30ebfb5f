"""Cards of checkpoints, cohorts and metrics, and the way of these to the Hub."""

from .checks import check_folder
from .clean_load import check_clean_load
from .errors import CardError, PublishError
from .facts import check_licenses, read_data_facts, weights_license
from .push import push_folder
from .stage import (
    stage_adapter,
    stage_checkpoint,
    stage_cohort,
    stage_metric,
    without_places,
    without_subjects,
    write_license,
)
from .write import write_eval_results, write_model_card

__all__ = [
    "CardError",
    "PublishError",
    "check_clean_load",
    "check_folder",
    "check_licenses",
    "push_folder",
    "read_data_facts",
    "stage_adapter",
    "stage_checkpoint",
    "stage_cohort",
    "stage_metric",
    "weights_license",
    "without_places",
    "without_subjects",
    "write_eval_results",
    "write_license",
    "write_model_card",
]
