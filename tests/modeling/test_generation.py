"""Constrained generation: codes only, valid answers only, option scores."""

import pytest
import torch

from cortexicon.modeling import AnswersOnly, CodesOnly, ConfigurationError

QUESTION = "How old is this person?"


def answer_ids(processor, answers):
    return [processor.answer_ids(answer) for answer in answers]


@pytest.mark.parametrize("mode", ["codes", "features"])
@pytest.mark.parametrize("answers", [["4", "42", "23", "23.5"], ["patient", "control"]])
def test_only_valid_answers_are_written(make_avq_lm, two_streams, scan, answers, mode):
    model = make_avq_lm(streams=2, fmri_input=mode)
    inputs = two_streams(text=[QUESTION, "Age?"], fmri=[scan, scan[:20]], tr=2.0)
    ids, pad = answer_ids(two_streams, answers), two_streams.tokenizer.pad_token_id
    seen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        found = model.generate_answer(ids, pad, **inputs, do_sample=True, temperature=5.0)
        for row in found.tolist():
            text = two_streams.tokenizer.decode(row, skip_special_tokens=True).strip()
            assert text in answers
            seen.add(text)
    assert len(seen) > 1
    # Free answers of an untrained model are none of them.
    free = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]
    assert not set(two_streams.tokenizer.batch_decode(free, skip_special_tokens=True)) & set(
        answers
    )


@pytest.mark.parametrize("stream", ["fmri", "fc"])
def test_only_codes_of_the_stream_are_written_and_they_decode(make_avq_lm, two_streams, stream):
    model = make_avq_lm(streams=2)
    inputs = two_streams(text=["A scan of a young person.", "Of an old one:"])
    torch.manual_seed(0)
    # Two rows of this tiny codebook are four times as long as the others: flatter, all are drawn.
    codes = model.generate_codes(**inputs, stream=stream, do_sample=True, temperature=3.0)
    first, count = model.block(stream)
    assert codes.shape == (2, 6 if stream == "fmri" else 3)
    assert codes.min() >= 0
    assert codes.max() < count
    assert len(codes.unique()) > 2
    found = model.decode_fmri_tokens(codes + first, stream=stream)
    assert found.shape == ((2, 20, 10) if stream == "fmri" else (2, 10, 10))
    assert torch.isfinite(found).all()
    # The prompt matters, and a prompt that ends in the marker gets no second one.
    marker = two_streams.tokenizer.bof_token_id
    if stream == "fc":
        marker = two_streams.tokenizer.bofc_token_id
    ids = torch.cat([inputs["input_ids"], torch.full((2, 1), marker)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    greedy = {"stream": stream, "do_sample": False}
    once = model.generate_codes(**inputs, **greedy)
    again = model.generate_codes(input_ids=ids, attention_mask=mask, **greedy)
    assert torch.equal(once, again)


def test_every_code_can_be_drawn_unless_top_k_is_asked_for(make_avq_lm, two_streams, monkeypatch):
    model = make_avq_lm(streams=2)
    inputs = two_streams(text=["A scan of a young person."])
    given = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda **kw: given.append(kw) or real(**kw))
    model.generate_codes(**inputs, do_sample=True)
    model.generate_codes(**inputs, do_sample=True, top_k=3)
    model.generate_codes(**inputs, do_sample=False)
    assert [options.get("top_k") for options in given] == [0, 3, None]


def test_scores_of_options_are_their_log_probabilities(make_avq_lm, two_streams, scan):
    model = make_avq_lm(streams=2)
    options = answer_ids(two_streams, ["4", "42", "control"])
    questions = [QUESTION, "Age?"]
    inputs = two_streams(text=questions, fmri=[scan, scan[::-1][:20].copy()], tr=2.0)
    scores = model.score_options(options, **inputs)
    assert scores.shape == (2, 3)
    assert (scores.exp().sum(1) <= 1).all()
    alone = two_streams(text="Age?", fmri=scan[::-1][:20].copy(), tr=2.0)
    for column, option in enumerate(options):
        ids = torch.cat([alone["input_ids"], torch.tensor([option])], 1)
        with torch.no_grad():
            inputs = {**alone, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**inputs).logits[0, -len(option) - 1 : -1]
        wanted = logits.log_softmax(-1)[range(len(option)), option].sum()
        torch.testing.assert_close(scores[1, column], wanted, rtol=0, atol=1e-4)


def test_the_processors_say_what_they_cannot_do():
    with pytest.raises(ConfigurationError, match="at least one token"):
        AnswersOnly([[1], []], 3, 0)
    scores = CodesOnly(2, 3)(torch.zeros(1, 1), torch.zeros(1, 8))
    assert scores.isfinite().nonzero()[:, 1].tolist() == [2, 3, 4]
    only = AnswersOnly([[5, 6], [5, 7, 6]], 2, 0)
    written = torch.tensor([[9, 9, 5], [9, 9, 4]])
    allowed = only(written, torch.zeros(2, 8)).isfinite()
    assert allowed.nonzero().tolist() == [[0, 6], [0, 7], [1, 0]]
