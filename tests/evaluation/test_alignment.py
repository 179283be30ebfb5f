"""The table of alignment: its rows, its text, its picture and the training classifier's score."""

import numpy as np
import pytest
import torch

from cortexicon.evaluation import EvaluationError, probes
from cortexicon.evaluation.alignment import (
    ROWS,
    CodecRows,
    alignment_table,
    classifier_accuracy,
    render_alignment,
    table_text,
)


@pytest.fixture
def text():
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.normal(size=(400, 8))).float(), torch.full((400,), 9)


def codec(shift):
    """Sixty codes in five dimensions, projected to where text lies, or beside it."""
    generator = np.random.default_rng(1)
    codebook = torch.nn.functional.normalize(torch.from_numpy(generator.normal(size=(60, 5))))
    rows = torch.from_numpy(generator.normal(size=(60, 8))).float() + shift
    return CodecRows(codebook.float(), rows, np.arange(1, 61), 0.5)


def test_sides_of_the_classifier_weigh_the_same_and_codes_by_frequency():
    codes = np.array([-1.0, 2.0, -3.0])  # the second is taken for text
    types = np.array([1.0] * 300 + [-1.0] * 100)
    found = classifier_accuracy(codes, [6, 3, 1], types, [10] * 400)
    assert found == pytest.approx(0.5 * (0.7 + 0.75))
    # A type that fills half of all text has 0.5 % of the mass.
    found = classifier_accuracy(codes, [6, 3, 1], np.r_[-1.0, np.ones(399)], [399] + [1] * 399)
    assert found == pytest.approx(0.5 * (0.7 + 0.995))


def test_the_table_and_its_picture(text, tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "STEPS", 40)
    codecs = {"codes": codec(1.5), "adversary_off": codec(9.0), "not_reversed": codec(9.0)}
    result = alignment_table(codecs, *text, splits=2, progress=False)
    assert list(result["rows"]) == list(ROWS)
    off, floor = result["rows"]["adversary_off"], result["rows"]["text_against_text"]
    assert off["mlp"]["accuracy"] > 0.95 > 0.75 > floor["mlp"]["accuracy"]
    closed = result["gap_closed"]["logistic"]
    judged = result["rows"]["codes"]["logistic"]["accuracy"]
    gap = off["logistic"]["accuracy"] - floor["logistic"]["accuracy"]
    assert closed == pytest.approx((off["logistic"]["accuracy"] - judged) / gap)
    printed = table_text(result)
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == 2 + len(ROWS)
    assert f"closed: logistic {closed:.0%}," in printed
    # Copies of 400 rows for 60 codes: the probes cannot complain, the neighbourhoods are gone.
    assert result["rows"]["copied"]["geometry"]["neighbour_overlap"] < 0.4
    for shown in (codecs, {"codes": codecs["codes"]}):
        path = render_alignment(shown, *text, result, tmp_path / "figures" / "alignment.png")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_row_that_there_is_not(text):
    with pytest.raises(EvaluationError, match="Expected the codec 'codes'"):
        alignment_table({"adversary_off": codec(0.0)}, *text)
    with pytest.raises(EvaluationError, match="found \\['codes', 'cods'\\]"):
        alignment_table({"codes": codec(0.0), "cods": codec(0.0)}, *text)
