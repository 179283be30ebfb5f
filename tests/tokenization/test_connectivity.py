"""Connectivity in prompts: the same Fisher z as the model's, masks, order, refusals."""

import numpy as np
import pytest
import torch

from cortexicon.modeling import fisher_z_matrices
from cortexicon.tokenization import AVQProcessor, TokenizationError


@pytest.fixture
def processor(extractor, tokenizer):
    return AVQProcessor(extractor, tokenizer, tokens_per_window=16, connectivity_tokens=5)


def test_the_matrix_is_the_one_that_the_codec_was_trained_on(processor, scan):
    scan[:, 7] = 3.0  # does not vary
    found = processor(fmri=scan, tr=2.0)
    wanted, mask = fisher_z_matrices(torch.tensor(scan)[None])
    torch.testing.assert_close(found["connectivity"], wanted, rtol=0, atol=1e-6)
    assert torch.equal(found["connectivity_mask"], mask)
    assert mask.sum() == 29
    scan[3, 7] = np.nan
    again = processor(fmri=scan, tr=2.0)["connectivity"]
    assert torch.equal(again, found["connectivity"])


def test_columns_are_brought_into_order_and_matrices_too(processor, scan):
    names = processor.feature_extractor.region_labels
    order = np.random.default_rng(0).permutation(30)
    shuffled = [names[place] for place in order]
    plain = processor(text="Age?", fmri=scan, tr=2.0)
    found = processor(text="Age?", fmri=scan[:, order], tr=2.0, region_labels=shuffled)
    torch.testing.assert_close(found["connectivity"], plain["connectivity"])
    matrix = plain["connectivity"][0].numpy()[order][:, order]
    given = processor(text="Age?", connectivity=matrix, region_labels=shuffled)
    torch.testing.assert_close(given["connectivity"], plain["connectivity"])
    assert "input_values" not in given
    assert given["region_coordinates"].shape == (1, 30, 3)


def test_a_prompt_holds_windows_then_connectivity_then_text(processor, tokenizer, scan):
    row = processor(text="Age?", fmri=scan, tr=2.0)["input_ids"][0].tolist()
    pad = tokenizer.fmri_token_id
    connectivity = [tokenizer.bofc_token_id, *[pad] * 5, tokenizer.eofc_token_id]
    text = processor._text_ids(processor.prompt_template("Age?"))
    assert row[-len(text) - 7 :] == connectivity + text
    assert row[0] == tokenizer.bof_token_id
    assert row[len(row) - len(text) - 8] == tokenizer.eof_token_id
    codes, more = np.arange(48).reshape(3, 16), np.arange(5)
    ids = processor.prompt_ids(codes, "Age?", more)
    assert len(ids) == len(row)
    assert (
        ids == processor(text="Age?", codes=codes, connectivity_codes=more)["input_ids"][0].tolist()
    )
    first = ids.index(tokenizer.bofc_token_id)
    assert tokenizer.ids_to_codes(ids[first + 1 : first + 6], "fc") == more.tolist()
    only = processor.prompt_ids(None, "Age?", more)
    assert only == ids[first:]


def test_streams_are_those_of_the_checkpoint_unless_asked(processor, extractor, tokenizer, scan):
    assert processor.streams == ("fmri", "fc")
    assert AVQProcessor(extractor, tokenizer, tokens_per_window=16).streams == ("fmri",)
    alone = AVQProcessor(extractor, tokenizer, connectivity_tokens=5)
    assert alone.streams == ("fc",)
    inputs = alone(text="Age?", fmri=scan)  # no window, so no TR
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "connectivity",
        "connectivity_mask",
        "region_coordinates",
    }


def test_saving_keeps_the_stream(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert AVQProcessor.from_pretrained(tmp_path).connectivity_tokens == 5
    assert (tmp_path / "connectivity_avq.py").is_file()


def square(**changes):
    matrix = np.zeros((30, 30))
    for (row, column), value in changes.get("entries", {}).items():
        matrix[row, column] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((30, 29)), r"\(scans, regions, regions\), found shape \(1, 30, 29\)"),
        (np.zeros((12, 12)), "between 30 regions, found 12"),
        (np.eye(30), "look like correlations"),
        (square(entries={(0, 1): 1.0}), "symmetric"),
        (square(entries={(0, 1): np.inf, (1, 0): np.inf}), "infinite entries"),
    ],
)
def test_matrices_that_cannot_be_right_are_refused(processor, matrix, message):
    with pytest.raises(TokenizationError, match=message):
        processor(text="Age?", connectivity=matrix)


def test_missing_regions_of_a_matrix_are_masked(processor):
    matrix = np.full((30, 30), 0.2)
    matrix[4], matrix[:, 4] = np.nan, np.nan
    found = processor(text="Age?", connectivity=matrix)
    assert found["connectivity_mask"][0].tolist() == [region != 4 for region in range(30)]
    assert torch.isfinite(found["connectivity"]).all()
    assert (found["connectivity"][0].diagonal() == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"streams": ("fmri", "dti")}, "streams must be some of"),
        ({"connectivity_codes": np.zeros((1, 4), int)}, r"shape \(scans, 5\)"),
        ({"connectivity_codes": np.full((1, 5), 64)}, "fc codes must lie in 0..63"),
        ({"connectivity_codes": np.zeros((2, 5), int)}, "the same scans, found 1 and 2 scans"),
    ],
)
def test_bad_calls_are_refused(processor, scan, call, message):
    with pytest.raises(TokenizationError, match=message):
        processor(text="Age?", fmri=scan, tr=2.0, **call)


def test_short_scans_and_lost_regions_are_refused(processor, scan):
    with pytest.raises(TokenizationError, match="at least 10 samples"):
        processor(fmri=scan[:5], streams=["fc"])
    scan[:, :4] = 0
    with pytest.raises(TokenizationError, match="found 4 of 30"):
        processor(fmri=scan, streams=["fc"])


def test_a_processor_that_does_not_read_connectivity_says_so(extractor, tokenizer, scan):
    plain = AVQProcessor(extractor, tokenizer, tokens_per_window=16)
    with pytest.raises(TokenizationError, match="does not read connectivity"):
        plain(text="Age?", fmri=scan, tr=2.0, streams=("fmri", "fc"))
