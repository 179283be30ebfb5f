"""A small cohort of tables, written the way a user would have it, for tests to damage."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cortexicon.cohorts import Cohort, build_cohort

NUM_REGIONS = 20
NUM_SUBJECTS = 12
NUM_TIMEPOINTS = 30


class Tables:
    """The three tables of a cohort folder; change them, then `write`."""

    def __init__(self):
        rng = np.random.default_rng(0)
        names = [f"{1000 + i}" for i in range(NUM_SUBJECTS)]
        self.participants = pd.DataFrame(
            {
                "participant_id": names,
                "age": [f"{20 + i}.5" for i in range(NUM_SUBJECTS)],
                "sex": ["F", "M"] * (NUM_SUBJECTS // 2),
                "site": ["A", "A", "B", "B"] * (NUM_SUBJECTS // 4),
                "tr": ["2.0"] * NUM_SUBJECTS,
            }
        )
        self.regions = pd.DataFrame(
            {
                "column": [f"r{i:03d}" for i in range(NUM_REGIONS)],
                "label": [f"region{i}" for i in range(NUM_REGIONS)],
                "x": [f"{i}.0" for i in range(-10, NUM_REGIONS - 10)],
                "y": "3.5",
                "z": "-7.25",
            }
        )
        values = rng.standard_normal((NUM_SUBJECTS * NUM_TIMEPOINTS, NUM_REGIONS), np.float32)
        self.series = pd.DataFrame(values, columns=self.regions["column"])
        self.series.insert(0, "participant_id", np.repeat(names, NUM_TIMEPOINTS))
        self.series.insert(1, "t", np.tile(np.arange(NUM_TIMEPOINTS), NUM_SUBJECTS))

    def write(self, folder: Path) -> Path:
        """Write the tables; returns the cohort folder."""
        (folder / "timeseries").mkdir(parents=True, exist_ok=True)
        for name in ("participants", "regions"):
            getattr(self, name).to_csv(folder / f"{name}.tsv", sep="\t", index=False)
        self.series.to_parquet(folder / "timeseries" / "bold.parquet", index=False)
        return folder


@pytest.fixture
def tables() -> Tables:
    """Fresh tables of twelve scans, thirty volumes, twenty regions, two sites."""
    return Tables()


@pytest.fixture
def cohort() -> Cohort:
    """Sixty scans of four sites (TR 2, 2, 1.5 and 3 s) with lengths that differ."""
    rng = np.random.default_rng(1)
    site = np.array(["A", "B", "C", "D"])[np.arange(60) % 4]
    lengths = 20 + np.arange(60) % 5
    table = pd.DataFrame(
        {
            "subject_id": [f"s{i:02d}" for i in range(60)],
            "session": "",
            "site": site,
            "tr": [{"A": 2.0, "B": 2.0, "C": 1.5, "D": 3.0}[name] for name in site],
            "n_timepoints": lengths,
            "sub_id": np.arange(50000, 50060),
            "age": rng.uniform(20, 60, 60),
            "iq": [None if i % 7 == 0 else 100.0 + i for i in range(60)],
            "diagnosis": ["control", "patient", None] * 20,
            "recommended": np.arange(60) % 10 != 9,
        }
    )
    regions = pd.DataFrame(rng.uniform(-70, 70, (6, 3)), columns=["x", "y", "z"])
    regions.insert(0, "label", [f"region{i}" for i in range(6)])
    values = rng.standard_normal((lengths.sum(), 6)).astype(np.float32)
    return build_cohort(values, table, regions, "toy")
