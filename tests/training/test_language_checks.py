"""Checks of a language model: wordings, swapped scans, and scans written after a sentence."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from cortexicon.cohorts import load_cohort, load_split
from cortexicon.inference import cohort_matrices
from cortexicon.inference.answers import ScanAnswers, answers_of
from cortexicon.inference.predict import PromptCodes, encode_prompts, load_language_model
from cortexicon.training import TrainingError, language_checks
from cortexicon.training.lm_stages import descriptions_of, next_code_scores
from cortexicon.training.stages import wordings_of

TARGET = {"name": "age", "kind": "number", "minimum": 0, "maximum": 99, "question": "Age?"}


@pytest.fixture(scope="module")
def cohort(two_stream_run):
    return load_cohort(two_stream_run / "cohort")


def test_a_reader_of_scans_is_told_from_one_that_listens_to_words(cohort, monkeypatch):
    people = cohort.subject_ids[:8]
    truth = cohort.participants.loc[people, "age"].round().to_numpy(int)
    prompts = PromptCodes(list(people), truth.reshape(-1, 1, 1, 1), {})
    held_out = wordings_of(TARGET)[1]

    def answers(model, processor, prompts, target, question=None):
        # The code of a scan is its age; held-out wordings make the answer two years older.
        shares = np.zeros((len(prompts.codes), len(answers_of(target))))
        older = 2 if question in held_out else 0
        shares[np.arange(len(shares)), prompts.codes[:, 0, 0, 0] + older] = 1.0
        return ScanAnswers(shares, np.ones(len(shares)))

    monkeypatch.setattr(language_checks, "pooled_answers", answers)
    config = SimpleNamespace(targets=[TARGET])
    loaded = SimpleNamespace(model=SimpleNamespace(config=config), processor=None)
    table = cohort.participants.assign(age=cohort.participants["age"].round())
    found = language_checks.wording_scores(loaded, prompts, table)["age"]
    assert set(found["held_out"]) == set(held_out)
    assert found["trained_mean"] == 0
    assert found["held_out_mean"] == 2
    table["age"] = np.arange(len(table), dtype=float)  # nobody is as old as somebody else
    prompts.codes[:] = table.loc[people, "age"].to_numpy(int).reshape(-1, 1, 1, 1)
    found = [language_checks.swapped_scores(loaded, prompts, table, k)["age"] for k in range(20)]
    assert all(row["own"] == 0 for row in found)
    assert all(row["changed"] == 1 for row in found)  # everybody gets another's scan
    far = [row["swapped"] for row in found]
    assert np.mean(far) == pytest.approx(3.0, abs=0.5)  # (8 + 1) / 3, were the pairs all as likely
    assert len(set(far)) > 3


def test_scans_of_the_people_asked_for_are_near_them_and_noise_is_not(
    two_stream_run, cohort, monkeypatch
):
    loaded = load_language_model(two_stream_run / "lm2")
    people = cohort.subject_ids
    monkeypatch.setattr(language_checks, "_FEWEST", 2)
    told = descriptions_of(cohort, people)
    matrices, mask = cohort_matrices(cohort, people)[1:]
    codes = loaded.model.connectome.encode(matrices, region_mask=mask).codes

    def of_people(prompts, stream, **options):
        text = loaded.processor.tokenizer.decode(prompts[0])
        mine = [row for row, sentences in enumerate(told) if text in sentences]
        return codes[torch.tensor(mine)]

    monkeypatch.setattr(loaded.model, "generate_codes", of_people)
    right = language_checks.written_scans(loaded, cohort, people)
    assert right
    for row in right:
        assert row["correlation"] > 0.5
        assert all(0.5 < place < 1.5 for place in row["position"])
        assert row["sentences"][0] != row["sentences"][1]
    monkeypatch.setattr(loaded.model, "generate_codes", lambda *_, **__: codes)
    same = language_checks.written_scans(loaded, cohort, people)
    assert not any(row["correlation"] > 0 for row in same)
    # The same after both sentences: as near to one group as it is far from the other.
    assert all(sum(row["position"]) == pytest.approx(1, abs=1e-3) for row in same)


def test_a_model_that_knows_nothing_is_as_good_as_chance_at_codes(two_stream_run, cohort):
    loaded = load_language_model(two_stream_run / "lm2")
    config = loaded.model.config
    prompts = encode_prompts(
        loaded.model, loaded.processor.feature_extractor, cohort, cohort.subject_ids[:6],
        config.prompts_per_scan, config.windows_per_prompt,
    )  # fmt: skip
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.zero_()
    held, more = prompts.flat
    counted = {"fmri": held, "fc": more}
    found = next_code_scores(loaded.model, loaded.processor, counted, prompts)
    for stream, row in found.items():
        assert row["codes"] == loaded.model.block(stream)[1]
        assert row["perplexity"] == pytest.approx(row["codes"], rel=1e-4)
        # The unigram has counted the very codes that it is asked about.
        assert row["unigram"] < row["perplexity"]
        assert row["saved"] == pytest.approx(1 - row["perplexity"] / row["unigram"])


def test_text_is_scored_over_the_words_before_and_over_everything_after(two_stream_run, tmp_path):
    loaded = load_language_model(two_stream_run / "lm2")
    file = tmp_path / "a.txt"
    file.write_text("The visual network rises and falls. " * 60, encoding="utf-8")
    words = len(AutoTokenizer.from_pretrained(two_stream_run / "text"))
    model = loaded.model
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    row = language_checks.text_scores(loaded, two_stream_run / "text", [file])["a.txt"]
    everything = model.get_output_embeddings().weight.shape[0]
    assert everything > words
    assert row["after"] == pytest.approx(everything, rel=1e-4)
    assert 1 < row["before"] < everything
    assert row["ratio"] == pytest.approx(row["after"] / row["before"])
    file.write_text("Short.", encoding="utf-8")
    with pytest.raises(TrainingError, match=r"a\.txt: expected 128 tokens"):
        language_checks.text_scores(loaded, two_stream_run / "text", [file])


def test_the_command_writes_all_five(two_stream_run, tmp_path, capsys):
    split = two_stream_run / "split.json"
    text = tmp_path / "held_out.txt"
    text.write_text("A brain is no book, and yet it can be read. " * 40, encoding="utf-8")
    argv = [two_stream_run / "lm2", two_stream_run / "cohort", "--split", split, "--count", "2",
            "--text", text, "--text-model", two_stream_run / "text",
            "--json", tmp_path / "checks.json"]  # fmt: skip
    assert language_checks.main([str(word) for word in argv]) == 0
    found = json.loads((tmp_path / "checks.json").read_text(encoding="utf-8"))
    assert set(found["codes"]) == {"fmri", "fc"}
    assert set(found["text"]) == {"held_out.txt"}
    people = load_split(split)[0]["test"]
    assert found["people"] == len(people)
    assert set(found["wordings"]) == set(found["swapped"]) == {"age", "sex"}
    assert "| age | mae |" in capsys.readouterr().out
    assert all(len(row["halves"]) == 2 for row in found["written"])


def test_a_model_without_connectivity_writes_none(two_stream_run, cohort):
    loaded = load_language_model(two_stream_run / "lm2")
    loaded.model.connectome = None
    with pytest.raises(TrainingError, match="connectivity stream"):
        language_checks.written_scans(loaded, cohort, cohort.subject_ids)
