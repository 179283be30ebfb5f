"""What keeps a folder from being published: people's ids, secrets, other code, bad cards."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import cortexicon.modeling
from cortexicon.model_cards import CardError, PublishError, check_licenses, weights_license
from cortexicon.model_cards.checks import (
    card_complaints,
    code_complaints,
    secret_complaints,
    subject_id_complaints,
)
from cortexicon.model_cards.facts import read_data_facts
from cortexicon.model_cards.stage import without_places, without_subjects

IDS = ["CMU_a_0050642", "50642", "7"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"refused": {"CMU_a_0050642": "too short"}}'),
        ("README.md", "of CMU_a_0050642."),
        ("scores.csv", "subject_id,y\n7,30\n"),
        ("people.tsv", "id\tage\n50642\t12\n"),
        ("log.jsonl", '{"left_out": ["50642"]}'),
        ("short.json", '{"7": 0.3}'),
        ("CMU_a_0050642.txt", "nothing"),
        ("trainer_state.json", "{}"),
        ("optimizer.pt", ""),
    ],
)
def test_a_file_that_names_a_subject_is_found(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (complaint,) = subject_id_complaints(tmp_path, IDS)
    assert complaint.startswith(name)


def test_metadata_and_names_of_weights_are_read(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "a.safetensors", metadata={"from": "50642"})
    save_file({"latent.50642.x": np.zeros(1)}, tmp_path / "b.safetensors")
    assert len(subject_id_complaints(tmp_path, ["50642"])) >= 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"num_codes": 7, "x": 150642, "y": 0.50642, "z": "sub-50642x"}'),
        ("tokenizer.json", '{"model": {"vocab": {"50642": 3, "7": 1}, "merges": []}}'),
        ("README.md", "7 of 10; region CC200_007"),
        ("weights.bin", "50642"),
    ],
)
def test_numbers_that_name_nobody_pass(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert subject_id_complaints(tmp_path, IDS) == []


def test_secrets_are_found_and_not_repeated(tmp_path):
    token = "hf_" + "a1B2" * 8
    (tmp_path / "run.json").write_text(json.dumps({"command": f"HF_TOKEN={token} x"}))
    (tmp_path / "config.json").write_text(json.dumps({"text_model_id": "/ho" + "me/ann/lm"}))
    found = " ".join(secret_complaints(tmp_path))
    assert "run.json: holds an access token" in found
    assert "config.json: holds a path of one machine" in found
    assert token not in found


def test_code_that_is_not_ours_is_found(tmp_path):
    text = (Path(cortexicon.modeling.__path__[0]) / "losses_avq.py").read_text()
    (tmp_path / "losses_avq.py").write_text(text)
    assert code_complaints(tmp_path) == []
    (tmp_path / "losses_avq.py").write_text(text + "# changed\n")
    (tmp_path / "other.py").write_text("")
    assert [one.partition(":")[0] for one in code_complaints(tmp_path)] == [
        "losses_avq.py",
        "other.py",
    ]


CARD = """---
license: mit
model-index:
- name: x
  results:
  - task: {type: other}
    dataset: {type: x, name: x}
    metrics:
    - {type: r2, value: 0.5}
---

# X

## Use

## Data and consent

## Not for

## Licence

## Cite

"""


def test_a_card_that_holds_what_it_must_passes(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    assert card_complaints(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("license: mit\n", ""), "names no licence"),
        (("value: 0.5", "value: .nan"), "no plain finite number"),
        (("# X", "# {{ title }}"), "not filled in"),
        (("# X", "# None"), "not filled in"),
        (("## Not for\n", ""), "'Not for' is missing"),
        (("license: mit", "license: [mit"), "cannot be read"),
    ],
)
def test_a_bad_card_is_found(tmp_path, change, message):
    (tmp_path / "README.md").write_text(CARD.replace(*change))
    assert message in " ".join(card_complaints(tmp_path))


def test_a_folder_without_a_card_is_found(tmp_path):
    assert card_complaints(tmp_path) == ["README.md: there is no card."]


@pytest.mark.parametrize(
    ("data", "weights", "allowed"),
    [
        ("cc-by-4.0", "apache-2.0", True),
        ("cc-by-nc-sa-3.0", "cc-by-nc-sa-3.0", True),
        ("cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", True),
        ("cc-by-nc-sa-4.0", "cc-by-nc-sa-3.0", False),
        ("cc-by-nc-sa-3.0", "cc-by-nc-4.0", False),
        ("cc-by-nc-sa-3.0", "apache-2.0", False),
        ("cc-by-sa-4.0", "mit", False),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", True),
        ("cc-by-nc-4.0", "cc-by-4.0", False),
        ("cc-by-nc-nd-4.0", "cc-by-nc-4.0", False),
        ("other", "other", True),
        ("other", "mit", False),
    ],
)
def test_terms_of_the_data_bind_the_weights(data, weights, allowed):
    if allowed:
        check_licenses(data, weights)
    else:
        with pytest.raises(PublishError, match=f"under '{data}' cannot carry"):
            check_licenses(data, weights)


def test_the_default_licence_is_one_that_the_data_allow():
    for data in ("cc0-1.0", "cc-by-nc-sa-3.0", "cc-by-nc-4.0", "other"):
        check_licenses(data, weights_license(data))


def test_the_facts_that_come_along_are_whole():
    for name in ("simulated", "abide1"):
        facts = read_data_facts(name)
        assert facts.consent
        check_licenses(facts.license, weights_license(facts.license))
    assert read_data_facts("abide1").license == "cc-by-nc-sa-3.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "missing: people, consent"),
        ("name: x\nlicence: mit", "unknown: licence"),
        ("- a", "expected keys with values"),
        ("name: [", "not valid YAML"),
    ],
)
def test_facts_with_gaps_are_refused(tmp_path, text, message):
    path = tmp_path / "facts.yaml"
    path.write_text(text)
    with pytest.raises(PublishError, match=message):
        read_data_facts(path)


def test_what_is_told_of_single_people_becomes_a_count():
    value = {"r2": 0.5, "r2_per_subject": {"a": 1, "b": 2}, "left_out": ["a"], "sites": ["X"]}
    assert without_subjects(value, ["a", "b"]) == {
        "r2": 0.5,
        "r2_per_subject": {"count": 2},
        "left_out": {"count": 1},
        "sites": ["X"],
    }


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("/data/me/runs/demo/text", "demo/text"),
        ("cortexicon train avq a.yaml --set cohort=/data/x/cohort out=runs/y", None),
        ("../shared/data/abide1", "../shared/data/abide1"),
        ("runs/demo/avq", "runs/demo/avq"),
        ("https://example.org/a/b/c", "https://example.org/a/b/c"),
        ("R2 / max and 3/4/5", "R2 / max and 3/4/5"),
    ],
)
def test_places_on_one_machine_are_shortened(text, wanted):
    if wanted is None:
        wanted = text.replace("/data/x/cohort", "x/cohort")
    assert without_places({"a": [text, 1]}) == {"a": [wanted, 1]}


def test_card_errors_and_publish_errors_are_the_users():
    assert issubclass(CardError, ValueError)
    assert issubclass(PublishError, ValueError)
