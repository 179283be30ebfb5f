"""Prompts that give something away are refused; those that do not pass."""

import numpy as np
import pandas as pd
import pytest

from cortexicon.tokenization import AVQProcessor
from cortexicon.training import TrainingError, lm
from cortexicon.training.leaks import LeakError, refuse_leaks, refuse_telling_texts, refuse_template

from .conftest import lm_values, write_yaml

PEOPLE = 60


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    site = rng.choice(["NYU", "Leuven", "Ulm"], PEOPLE)
    return pd.DataFrame(
        {
            "age": rng.integers(18, 80, PEOPLE).astype(float),
            "sex": rng.choice(["F", "M"], PEOPLE),
            "diagnosis": rng.choice(["ASD", "control"], PEOPLE),
            "site": site,
            "scanner": [{"NYU": "Allegra", "Leuven": "Intera", "Ulm": "Prisma"}[s] for s in site],
            "tr": [{"NYU": 2.0, "Leuven": 1.6667, "Ulm": 1.5}[s] for s in site],
            "n_timepoints": [{"NYU": 176, "Leuven": 246, "Ulm": 296}[s] for s in site],
        },
        index=[f"sub-{number:04d}" for number in range(PEOPLE)],
    )


@pytest.fixture(scope="module")
def processor(run):
    return AVQProcessor.from_pretrained(run / "lm")


def prompts(
    processor, people, question, windows=lambda row: 2, text=lambda row, question: question
):
    rng = np.random.default_rng(1)
    rows = {}
    for subject, row in people.iterrows():
        codes = rng.integers(0, 32, (windows(row), 8))
        rows[subject] = processor.prompt_ids(codes, text(row, question))
    return {question: rows}


def test_prompts_that_differ_in_codes_alone_pass(processor, people):
    for question in ("Age?", "Is this person male or female?", "Is it NYU or Ulm?"):
        refuse_leaks(prompts(processor, people, question), processor.tokenizer, people)


@pytest.mark.parametrize(
    ("column", "write"),
    [
        ("age", lambda row, question: f"{row['age']:.0f} years. {question}"),
        ("sex", lambda row, question: f"This is {row['sex']}. {question}"),
        ("diagnosis", lambda row, question: f"{question} ({row['diagnosis']})"),
        ("site", lambda row, question: f"Scanned in {row['site']}. {question}"),
        ("scanner", lambda row, question: f"{row['scanner']}: {question}"),
        ("tr", lambda row, question: f"TR {row['tr']:.2f} s. {question}"),
        ("n_timepoints", lambda row, question: f"{row['n_timepoints']} volumes. {question}"),
    ],
)
def test_a_value_of_the_person_is_refused_by_its_column(processor, people, column, write):
    found = prompts(processor, people, "Age?", text=write)
    padded = {"Age?": {}}
    longest = max(len(ids) for ids in found["Age?"].values())
    for subject, ids in found["Age?"].items():  # the same length, so that the words alone tell
        padded["Age?"][subject] = [*ids, *[ids[-1]] * (longest - len(ids))]
    with pytest.raises(LeakError, match=f"the person's own {column}"):
        refuse_leaks(padded, processor.tokenizer, people)


def test_wording_that_goes_with_a_column_is_refused_and_random_wording_is_not(processor, people):
    secret = {"NYU": "Age?", "Leuven": "Age!", "Ulm": "Age:"}
    found = prompts(processor, people, "Age?", text=lambda row, _: secret[row["site"]])
    with pytest.raises(LeakError, match="goes with site"):
        refuse_leaks(found, processor.tokenizer, people)
    drawn = iter(np.random.default_rng(5).choice(list(secret.values()), PEOPLE))
    found = prompts(processor, people, "Age?", text=lambda row, _: next(drawn))
    refuse_leaks(found, processor.tokenizer, people)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (lambda row: int(row["n_timepoints"] // 80), "number of tokens: .* give every prompt"),
        (lambda row: 3 if row.name == "sub-0007" else 2, "sub-0007"),
    ],
)
def test_a_varying_number_of_windows_is_refused(processor, people, windows, message):
    found = prompts(processor, people, "Age?", windows=windows)
    with pytest.raises(LeakError, match=message):
        refuse_leaks(found, processor.tokenizer, people)


def test_hidden_codes_must_be_as_many_for_each(processor, people):
    found = prompts(processor, people, "Age?")
    found["Age?"]["sub-0003"][4] = processor.tokenizer.fmri_token_id
    with pytest.raises(LeakError, match=r"number of hidden codes: 0 for .* 1 for sub-0003"):
        refuse_leaks(found, processor.tokenizer, people)


@pytest.mark.parametrize("question", ["How old is {subject_id}?", "TR ${tr}: age?", "%(site)s?"])
def test_templates_are_refused(question):
    with pytest.raises(LeakError, match="Ask everybody in the same words"):
        refuse_template(question)


def test_names_and_allowed_columns(people):
    texts = {subject: f"This is {subject}." for subject in people.index}
    with pytest.raises(LeakError, match="the subject's name"):
        refuse_telling_texts(texts, people)
    motion = people.assign(fd=np.linspace(0.1, 0.9, PEOPLE).round(2))
    texts = {s: f"Mean motion was {motion.at[s, 'fd']:.2f} mm." for s in motion.index}
    with pytest.raises(LeakError, match="own fd"):
        refuse_telling_texts(texts, motion)
    refuse_telling_texts(texts, motion, allowed=["fd"])


def test_training_refuses_a_leaking_question_before_it_starts(run, tmp_path):
    values = {**lm_values(run), "output": str(tmp_path / "lm")}
    values["targets"] = [{**values["targets"][0], "question": "At {site}, age?"}]
    with pytest.raises(TrainingError, match="holds the field"):
        lm.main([write_yaml(tmp_path / "lm.yaml", values)])
    assert not (tmp_path / "lm" / "training_log.jsonl").exists()
