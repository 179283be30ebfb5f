"""From what a neuroimager has on disk to a `datasets.Dataset`: series, cohorts, splits."""

from .build import Cohort, build_cohort, cohort_from_series
from .fetch import Fetched, fetch_cohort
from .prepare import People, Prepared, prepare_cohort
from .readers import load_cohort, read_participants, read_regions, read_series
from .scan_results import AtlasChoice, Reading
from .series import CohortError, ParcelSeries, SeriesHealth
from .simulate import simulate_cohort
from .splits import Split, load_split, make_split
from .storage import save_cohort
from .streaming import StreamedCohort, map_cohort, read_windows, series_views, stream_cohort

__all__ = [
    "AtlasChoice",
    "Cohort",
    "CohortError",
    "Fetched",
    "ParcelSeries",
    "People",
    "Prepared",
    "Reading",
    "SeriesHealth",
    "Split",
    "StreamedCohort",
    "build_cohort",
    "cohort_from_series",
    "fetch_cohort",
    "load_cohort",
    "load_split",
    "make_split",
    "map_cohort",
    "prepare_cohort",
    "read_participants",
    "read_regions",
    "read_series",
    "read_windows",
    "save_cohort",
    "series_views",
    "simulate_cohort",
    "stream_cohort",
]
