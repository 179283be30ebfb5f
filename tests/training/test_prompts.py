"""Rows of several questions, soft labels, targets, and the batches of both scripts."""

import numpy as np
import pandas as pd
import pytest
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQProcessor
from cortexicon.training import TrainingError
from cortexicon.training.collators import PreparedScans, TextDomain, draw_windows
from cortexicon.training.prompts import Answer, RowBuilder, answer_loss, checked_targets

AGE = {"name": "age", "kind": "number", "minimum": 15, "maximum": 85, "question": "Age?"}
SEX = {"name": "sex", "kind": "class", "classes": ["F", "M"], "question": "Sex?"}
SCAN = np.arange(16).reshape(2, 8)  # codes of two windows


@pytest.fixture(scope="module")
def processor(run):
    return AVQProcessor.from_pretrained(run / "lm")


@pytest.fixture(scope="module")
def model(run):
    return AVQLMForConditionalGeneration.from_pretrained(run / "lm").eval()


@torch.no_grad()
def test_packed_questions_give_the_logits_of_single_prompts(model, processor):
    asked = [
        Answer("Age?", AGE, 42.0),
        Answer("Is this person female or male?", SEX, "F"),
        Answer("Age?", AGE, 63.0),
    ]
    other = [Answer("Sex?", SEX, "M")]  # a shorter row: padding must not matter either
    batch = RowBuilder(processor, 3.0).batch([SCAN, SCAN[::-1] + 3], [asked, other])
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch["attention_mask"],
    ).logits
    packed = logits[batch["places"][:, 0], batch["places"][:, 1]]
    single = []
    for codes, answers in ((SCAN, asked), (SCAN[::-1] + 3, other)):
        for answer in answers:
            value = answer.value if answer.target is SEX else str(round(answer.value))
            reply = processor.answer_ids(value)
            ids = processor.prompt_ids(codes, answer.question) + reply[:-1]
            out = model(input_ids=torch.tensor([ids])).logits[0]
            single.append(out[len(ids) - len(reply) :])
    single = torch.cat(single)
    assert packed.shape == single.shape
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=0)
    # The logits do tell the rows apart, so that their being equal says something.
    assert (single[0] - single[-2]).abs().max() > 1e-4


def test_positions_restart_after_the_scan_and_questions_do_not_see_each_other(processor):
    batch = RowBuilder(processor, 3.0).batch(
        [SCAN], [[Answer("Age?", AGE, 42.0), Answer("Age?", AGE, 42.0)]]
    )
    scan = 16 + 1 + 2  # codes, one separator, two markers
    ids, positions = batch["input_ids"][0], batch["position_ids"][0]
    half = (len(ids) - scan) // 2
    first, second = slice(scan, scan + half), slice(scan + half, None)
    assert torch.equal(ids[first], ids[second])
    assert positions[first].tolist() == list(range(scan, scan + half))
    assert torch.equal(positions[first], positions[second])
    visible = batch["attention_mask"][0, 0]
    assert visible[second, :scan].all()
    assert not visible[second, first].any()
    assert not visible[:scan, scan:].any()
    assert torch.equal(visible[second, second], visible[first, first])
    assert torch.equal(visible[first, first], torch.ones(half, half, dtype=torch.bool).tril())


@pytest.mark.parametrize("value", [15.0, 42.0, 42.3, 84.9])
def test_soft_labels_of_a_number_sum_to_one_and_peak_there(processor, value):
    labels = RowBuilder(processor, 3.0).batch([SCAN], [[Answer("Age?", AGE, value)]])["labels"]
    number, end = labels
    ids, shares = number
    assert sum(shares) == pytest.approx(1)
    by_token = dict(zip(ids, shares, strict=True))
    assert len(by_token) == len(ids)
    written = {n: processor.answer_ids(str(n))[0] for n in range(15, 86)}
    assert set(by_token) <= set(written.values())
    assert max(by_token, key=by_token.get) == written[round(value)]
    near, far = round(value) - 1 if value > 16 else 16, round(value) - 6 if value > 30 else 21
    assert by_token[written[round(value)]] > by_token[written[near]] > by_token[written[far]]
    assert end == ([processor.tokenizer.eos_token_id], [1.0])


def test_without_spread_the_written_number_takes_all(processor):
    labels = RowBuilder(processor, 0.0).batch([SCAN], [[Answer("Age?", AGE, 42.4)]])["labels"]
    assert labels == [([token], [1.0]) for token in processor.answer_ids("42")]


def test_labels_of_a_class_are_its_tokens(processor):
    labels = RowBuilder(processor, 3.0).batch([SCAN], [[Answer("Sex?", SEX, "M")]])["labels"]
    assert labels == [([token], [1.0]) for token in processor.answer_ids("M")]


def test_the_loss_is_cross_entropy_to_the_shares():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    labels = [([0, 2], [0.25, 0.75]), ([1], [1.0])]
    target = torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])
    expected = torch.nn.functional.cross_entropy(logits, target)
    assert answer_loss(logits, labels).item() == pytest.approx(expected.item(), abs=1e-6)


PEOPLE = pd.DataFrame(
    {"age": [20.0, None, 60.4], "sex": ["M", "F", None]}, index=["one", "two", "three"]
)


def test_targets_are_completed():
    number, classes = checked_targets(
        [{**AGE, "maximum": 60}, {"name": "sex", "kind": "class"}], PEOPLE
    )
    assert number["readout"] == "expectation"
    assert classes["classes"] == ["F", "M"]
    assert classes["question"] == "What is the sex of this person?"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"name": "height"}, ["'height'", "age, sex"]),
        ({"kind": "date"}, ["age", "'number' or 'class'", "'date'"]),
        ({"kind": None}, ["'number' or 'class'", "None"]),
        ({"minimum": None}, ["age", "`minimum` and `maximum`"]),
        ({"maximum": 80.5}, ["age", "`minimum` and `maximum`"]),
        ({"minimum": 21}, ["1 values of age", "21..85", "20.0 of one"]),
        ({"maximum": 59}, ["1 values of age", "15..59", "60.4 of three"]),
    ],
)
def test_bad_targets_are_named(change, parts):
    with pytest.raises(TrainingError) as error:
        checked_targets([{**AGE, **change}], PEOPLE)
    for part in parts:
        assert part in str(error.value)


def numbered_scans(count, length=50):
    """Scans whose every sample is the scan's number plus a fraction that tells the time."""
    series = [
        (scan + np.arange(length + scan)[:, None] / 1000 + np.zeros((1, 3))).astype(np.float32)
        for scan in range(count)
    ]
    names = [f"s{scan}" for scan in range(count)]
    places = np.zeros((3, 3), dtype=np.float32)
    return PreparedScans(names, series, [np.ones(3, dtype=bool)] * count, {}, places)


def test_a_batch_holds_one_window_of_each_of_different_scans():
    scans = numbered_scans(20)
    values = draw_windows(scans, 40, 16, [0, 0, 5])["input_values"]
    assert values.shape == (16, 40, 3)
    who = values[:, 0, 0].floor()
    assert len(who.unique()) == 16
    steps = values[:, 1:] - values[:, :-1]  # whole windows: samples follow one another
    torch.testing.assert_close(steps, torch.full_like(steps, 1e-3), atol=1e-5, rtol=0)
    starts = ((values[:, 0, 0] - who) * 1000).round()
    assert len(starts.unique()) > 3
    assert (starts + 40 <= 50 + who).all()


def test_a_batch_follows_from_its_seed_alone():
    scans = numbered_scans(20)
    one, two, other = (draw_windows(scans, 40, 8, [3, 0, step]) for step in (7, 7, 8))
    assert torch.equal(one["input_values"], two["input_values"])
    assert not torch.equal(one["input_values"], other["input_values"])


def test_two_processes_draw_disjoint_subjects():
    scans = numbered_scans(20)
    parts = [draw_windows(scans, 40, 8, [0, 0, 1], rank, 2)["input_values"] for rank in (0, 1)]
    who = torch.cat(parts)[:, 0, 0].floor()
    assert len(who.unique()) == 16
    both = draw_windows(scans, 40, 16, [0, 0, 1])["input_values"]
    assert torch.equal(torch.cat(parts), both), "one common draw, shared out"


def test_no_word_has_more_than_half_a_percent_of_the_text_domain():
    tokens = 5000
    counts = (1e6 / torch.arange(1, tokens + 1)).long()  # Zipf: the first alone has 11 %
    assert counts[0] / counts.sum() > 0.1
    table = torch.arange(tokens, dtype=torch.float32)[:, None]
    domain = TextDomain(table, counts)
    shares = np.diff(domain.cumulative, prepend=0.0)
    assert shares.max() <= 0.005 * (1 + 1e-6)
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 1e-12).all(), "commoner words stay at least as likely"
    drawn = domain.draw(20000, [0])
    assert torch.equal(drawn, domain.draw(20000, [0]))
    frequency = np.bincount(drawn[:, 0].long().numpy(), minlength=tokens) / 20000
    assert 0.003 < frequency[0] < 0.007
    assert frequency[:20].sum() == pytest.approx(shares[:20].sum(), abs=0.01)


def test_counts_of_another_vocabulary_are_refused():
    with pytest.raises(TrainingError, match=r"5 tokens.*table 6"):
        TextDomain(torch.zeros(6, 2), torch.ones(5))
