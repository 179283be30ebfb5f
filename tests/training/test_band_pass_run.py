"""A codec trained on a pass band: its checkpoint filters whatever it is given."""

import json

import numpy as np
import pytest

from cortexicon.cohorts import load_cohort
from cortexicon.inference import load_checkpoint
from cortexicon.tokenization import TokenizationError
from cortexicon.training import avq

from .conftest import avq_values, write_yaml


def test_the_band_of_the_configuration_goes_into_the_checkpoint(run, tmp_path):
    values = {**avq_values(run), "output": str(tmp_path / "avq"), "band_pass": [0.01, 0.1]}
    values |= {"max_steps": 2, "codebook_batches": 2, "eval_windows": 8}
    assert avq.main([write_yaml(tmp_path / "avq.yaml", values)]) == 0
    assert json.loads((tmp_path / "avq" / "run.json").read_text())["arguments"]["band_pass"] == [
        0.01,
        0.1,
    ]
    scan = next(iter(load_cohort(run / "cohort")))
    prepared = {}
    for name, folder in (("filtered", tmp_path / "avq"), ("plain", run / "avq")):
        extractor = load_checkpoint(folder).processor.feature_extractor
        prepared[name], _ = extractor.prepare_scan(scan.values, scan.tr)
    share = {}
    for name, values in prepared.items():
        tapered = values * np.hanning(len(values))[:, None]
        power = (np.abs(np.fft.rfft(tapered, axis=0)) ** 2).sum(axis=1)
        share[name] = power[np.fft.rfftfreq(len(values), 2.0) > 0.12].sum() / power.sum()
    assert share["filtered"] < 0.1 * share["plain"]


def test_a_band_beyond_the_nyquist_frequency_ends_the_run(run, tmp_path):
    values = {**avq_values(run), "output": str(tmp_path / "avq"), "band_pass": [0.01, 0.4]}
    with pytest.raises(TokenizationError, match=r"0 < low < high < 0.25 Hz"):
        avq.main([write_yaml(tmp_path / "avq.yaml", values)])
