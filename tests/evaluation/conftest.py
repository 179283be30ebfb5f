"""A small synthetic cohort and reconstructed scans, as plain objects: no file, no model."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest


@pytest.fixture
def regions():
    """Twelve regions in two networks."""
    generator = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "label": [f"region {i}" for i in range(12)],
            "x": generator.uniform(-60, 60, 12),
            "y": generator.uniform(-90, 60, 12),
            "z": generator.uniform(-30, 70, 12),
            "size": 100,
            "hemisphere": ["L", "R"] * 6,
            "network": ["Visual"] * 6 + ["Default"] * 6,
        }
    )


@pytest.fixture
def make_scan():
    """Build one reconstructed scan: 2 windows of 20 samples, 12 regions, 4 tokens a window."""

    def make(name, seed=0, noise=0.5):
        generator = np.random.default_rng(seed)
        mixing = np.random.default_rng(99).normal(size=(3, 12))
        raw = generator.normal(size=(40, 3)) @ mixing + generator.normal(size=(40, 12))
        raw = ((raw - raw.mean(0)) / raw.std(0)).astype(np.float32)
        noisy = raw + noise * generator.normal(size=raw.shape).astype(np.float32)
        return SimpleNamespace(
            subject_id=name,
            raw=raw,
            reconstruction=noisy,
            region_mask=np.ones(12, bool),
            codes=generator.integers(0, 16, (2, 4)),
        )

    return make


@pytest.fixture
def cohort():
    """Ninety subjects of three sites; age changes one connection, sex is a coin flip."""
    generator = np.random.default_rng(7)
    ids = [f"s{i:03d}" for i in range(90)]
    age = generator.uniform(8, 40, 90)
    participants = pd.DataFrame(
        {
            "site": np.array(["A", "B", "C"])[np.arange(90) % 3],
            "tr": 2.0,
            "n_timepoints": 150,
            "age": age,
            "sex": np.where(generator.random(90) < 0.5, "F", "M"),
            "func_mean_fd": generator.gamma(2.0, 0.05, 90),
        },
        index=pd.Index(ids, name="subject_id"),
    )
    series = {}
    for name, years in zip(ids, age, strict=True):
        values = generator.normal(size=(150, 10))
        for region in range(1, 6):  # the older, the more these regions follow the first one
            values[:, region] += values[:, 0] * (years - 8) / 20
        series[name] = SimpleNamespace(values=values.astype(np.float32))
    return SimpleNamespace(participants=participants, series=lambda name: series[name])


@pytest.fixture
def fold(cohort):
    """Train on sites A and B; test on others of them, and on site C as a whole."""
    table = cohort.participants
    known, unseen = table.index[table["site"] != "C"], table.index[table["site"] == "C"]
    return {
        "train": list(known[:35]),
        "validation": list(known[35:40]),
        "test": list(known[40:]),
        "test_sites": list(unseen),
    }
