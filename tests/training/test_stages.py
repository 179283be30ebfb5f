"""Data of the stages: next and hidden codes, perplexities, descriptions, wordings."""

import numpy as np
import pytest
import torch

from cortexicon.cohorts import load_cohort
from cortexicon.inference.predict import load_language_model
from cortexicon.tokenization import AVQProcessor
from cortexicon.training import TrainingError
from cortexicon.training.leaks import refuse_telling_texts, refuse_template
from cortexicon.training.stages import (
    IGNORED,
    best_unigram_perplexity,
    code_loss,
    code_perplexity,
    describe_scan,
    masked_code_rows,
    next_code_rows,
    paired_text_rows,
    unigram_perplexity,
    wordings_of,
)

CODES = [np.arange(16).reshape(2, 8), np.arange(16, 32).reshape(2, 8)]


@pytest.fixture(scope="module")
def processor(run):
    return AVQProcessor.from_pretrained(run / "lm")


def test_every_code_and_nothing_else_is_a_next_code(processor):
    batch = next_code_rows(processor, CODES, [np.arange(4), np.arange(4, 8)])
    tokenizer = processor.tokenizer
    for row, (windows, more) in enumerate(zip(CODES, (range(4), range(4, 8)), strict=True)):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        asked = labels[labels != IGNORED].tolist()
        assert asked == (
            tokenizer.codes_to_ids(windows.ravel().tolist())
            + tokenizer.codes_to_ids(list(more), "fc")
        )
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_hidden_codes_are_hidden_before_they_are_asked_for(processor):
    batch = masked_code_rows(processor, CODES, share=0.25, seed=1)
    ids, labels = batch["input_ids"], batch["labels"]
    half = ids.shape[1] // 2
    hidden = ids[:, :half] == processor.tokenizer.fmri_token_id
    assert hidden.sum(1).tolist() == [4, 4]
    assert not (labels[:, :half] != IGNORED).any()
    assert torch.equal(labels[:, half:] != IGNORED, hidden)
    whole = next_code_rows(processor, CODES)["input_ids"]
    assert torch.equal(ids[:, half:], whole)
    assert torch.equal(ids[:, :half][~hidden], whole[~hidden])
    other = masked_code_rows(processor, CODES, share=0.25, seed=2)
    assert not torch.equal(other["labels"], labels)
    with pytest.raises(TrainingError, match="between 0 and 1"):
        masked_code_rows(processor, CODES, share=1.0)
    with pytest.raises(TrainingError, match="as many windows"):
        next_code_rows(processor, [CODES[0], CODES[1][:1]])


def test_perplexities_are_what_they_say(run):
    rng = np.random.default_rng(0)
    uniform = rng.integers(0, 32, 4000)
    assert unigram_perplexity(uniform, uniform, 32) == pytest.approx(32, rel=0.02)
    skewed = rng.choice(4, 4000, p=[0.7, 0.1, 0.1, 0.1])
    share = np.array([0.7, 0.1, 0.1, 0.1])
    entropy = np.exp(-(share * np.log(share)).sum())
    assert unigram_perplexity(skewed, skewed, 32) == pytest.approx(entropy, rel=0.05)
    few = rng.integers(0, 32, 40)
    assert best_unigram_perplexity(few, uniform, 32) <= unigram_perplexity(few, uniform, 32)
    loaded = load_language_model(run / "lm")
    batches = [next_code_rows(loaded.processor, CODES), masked_code_rows(loaded.processor, CODES)]
    found = code_perplexity(loaded.model, batches)
    assert 20 < found < 50  # untrained on codes: near the 32 of chance
    empty = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORED)}
    with pytest.raises(TrainingError, match="found none"):
        code_perplexity(loaded.model, [empty])


def test_a_model_learns_the_next_code_below_unigram(run):
    loaded = load_language_model(run / "lm")
    model = loaded.model.train()
    rng = np.random.default_rng(0)
    # Codes follow one another: a unigram model cannot know.
    starts = rng.integers(0, 32, 24)
    codes = [((start + 5 * np.arange(16)) % 32).reshape(2, 8) for start in starts]
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=1e-2)
    batch = next_code_rows(loaded.processor, codes[:16])
    for _ in range(30):
        loss = code_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    held_out = np.stack(codes[16:])
    found = code_perplexity(model, [next_code_rows(loaded.processor, codes[16:])])
    assert found < 0.8 * best_unigram_perplexity(np.stack(codes[:16]), held_out, 32)


def test_descriptions_come_from_the_scan_and_tell_nothing_of_the_person(run):
    cohort = load_cohort(run / "cohort")
    networks = cohort.regions["network"].tolist()
    texts = {
        subject: " ".join(describe_scan(cohort.series(subject).values, networks))
        for subject in cohort.subject_ids
    }
    assert len(set(texts.values())) > 5
    refuse_telling_texts(texts, cohort.participants)
    # Known answers: two networks in step, a third against them.
    rng = np.random.default_rng(0)
    wave = np.cumsum(rng.normal(size=200))
    noise = rng.normal(size=(200, 6))
    series = np.stack([wave, wave, wave, wave, -wave, -wave], 1) + 0.1 * noise
    names = ["Visual", "Visual", "DorsalAttention", "DorsalAttention", "Default", "Default"]
    found = describe_scan(series, names)
    # Seven of fifteen pairs of regions in step, eight against each other.
    assert found[0] == "Regions are loosely coupled throughout the brain."
    assert found[1] == "The dorsal attention and visual networks rise and fall together."
    assert "default" in found[2]
    assert "slow" in found[4]
    assert "fast" in describe_scan(noise, names)[4]
    for weight, coupled in ((1.5, "closely"), (0.54, "moderately"), (0.2, "loosely")):
        common = weight * rng.normal(size=(4000, 1)) + rng.normal(size=(4000, 6))
        assert describe_scan(common, names)[0].split()[2] == coupled
    with pytest.raises(TrainingError, match="two networks"):
        describe_scan(noise, ["Visual"] * 6)
    with pytest.raises(TrainingError, match="each of 6 regions"):
        describe_scan(noise, ["Visual"])


@pytest.mark.parametrize("text_first", [False, True])
def test_of_a_pair_the_second_part_is_learned(processor, text_first):
    texts = ["The visual network holds together.", "Short <fmri_3>."]
    batch = paired_text_rows(processor, CODES, texts, text_first=text_first)
    tokenizer = processor.tokenizer
    for row in range(2):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        asked = labels[labels != IGNORED]
        kept = ids[batch["attention_mask"][row].bool()]
        assert torch.equal(kept[-len(asked) :], asked)
        is_code = (asked >= tokenizer.fmri_offset).any()
        assert bool(is_code) == text_first
        if not text_first:
            assert tokenizer.decode(asked, skip_special_tokens=True) == texts[row]


@pytest.mark.parametrize("name", ["age", "sex", "diagnosis", "fiq"])
def test_wordings_are_held_out_and_the_same_for_everybody(name):
    trained, held_out = wordings_of({"name": name, "question": "Own?"})
    assert trained[0] == "Own?"
    assert len(trained) >= 4
    assert len(held_out) == 2
    assert not set(trained) & set(held_out)
    for text in trained + held_out:
        refuse_template(text)
