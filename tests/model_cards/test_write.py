"""Cards hold what was measured, and refuse to be written otherwise."""

import copy
import json
import re

import pytest
from huggingface_hub import ModelCard

from cortexicon.model_cards import CardError, write_model_card
from cortexicon.modeling import AVQConfig

FACTS = {
    "title": "Toy codec",
    "license": "apache-2.0",
    "cohort": {
        "name": "simulated",
        "simulated": True,
        "num_training_scans": 12,
        "content_hash": "0123456789abcdef0123",
    },
    "training": {
        "command": "cortexicon train avq training/configs/demo_avq.yaml",
        "seconds": 61.5,
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "commit": None,
    },
    "scores": [
        {
            "metric": "r2",
            "value": 0.4567,
            "unit": None,
            "part": "test",
            "num_subjects": 5,
            "command": "cortexicon evaluate avq cohort --json scores.json",
        }
    ],
}


@pytest.fixture
def folder(tmp_path):
    AVQConfig(atlas="toy").save_pretrained(tmp_path)
    return tmp_path


def test_a_card_holds_the_facts_and_a_readable_header(folder):
    path = write_model_card(folder, FACTS)
    text = path.read_text(encoding="utf-8")
    assert "| r2 | **this checkpoint** | **0.457** | test | 5 |" in text
    assert "cortexicon evaluate avq cohort" in text
    assert "simulated data only" in text
    assert "each one of 8192 codes (`latent` layout" in text
    card = ModelCard.load(path)
    assert card.data.license == "apache-2.0"
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(0.4567)
    assert [path.name for path in folder.iterdir() if path.name.endswith(".tmp")] == []


def test_a_card_without_scores_says_so(folder):
    text = write_model_card(folder, {**FACTS, "scores": []}).read_text(encoding="utf-8")
    assert "has not been scored" in text
    assert "model-index" not in text


@pytest.mark.parametrize(
    "gone",
    [
        ("title",),
        ("license",),
        ("cohort", "name"),
        ("training", "command"),
        ("training", "seconds"),
    ],
)
def test_a_missing_fact_is_an_error_and_leaves_no_card(folder, gone):
    facts = copy.deepcopy(FACTS)
    inner = facts
    for key in gone[:-1]:
        inner = inner[key]
    del inner[gone[-1]]
    with pytest.raises(CardError, match=gone[-1]):
        write_model_card(folder, facts)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"value": float("nan")}, "finite"), ({"command": ""}, "command that measured")],
)
def test_a_score_that_was_not_measured_is_refused(folder, change, message):
    facts = {**FACTS, "scores": [{**FACTS["scores"][0], **change}]}
    with pytest.raises(CardError, match=message):
        write_model_card(folder, facts)


def test_only_checkpoints_of_ours_get_a_card(tmp_path):
    with pytest.raises(CardError, match="expected a checkpoint folder"):
        write_model_card(tmp_path, FACTS)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(CardError, match="found 'gpt2'"):
        write_model_card(tmp_path, FACTS)


@pytest.mark.parametrize("name", ["avq", "lm"])
def test_the_code_on_a_card_runs(checkpoints, series, name, capsys):
    text = write_model_card(checkpoints / name, FACTS).read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    scope = {"series": series}
    exec(code.replace("FOLDER_OR_REPOSITORY", str(checkpoints / name)), scope)
    if name == "avq":
        assert scope["codes"].shape == (3, scope["model"].config.tokens_per_window)
        assert scope["decoded"].shape == (3, 20, series.shape[1])
    else:
        tokens = scope["model"].avq.config.tokens_per_window
        pads = scope["inputs"]["input_ids"] == scope["processor"].tokenizer.fmri_token_id
        assert int(pads.sum()) == 2 * tokens  # as many windows as in training, not all of the scan
        assert scope["answer"].shape[1] > scope["inputs"]["input_ids"].shape[1]
        assert capsys.readouterr().out


def test_a_card_of_a_language_model_says_what_it_was_asked(checkpoints):
    text = write_model_card(checkpoints / "lm", FACTS).read_text(encoding="utf-8")
    assert "A causal language model" in text
    assert "| prompt | 2 windows of a scan, then a question |" in text
    assert '| answers on age | to "Age?": 15 to 85 |' in text
    assert '| answers on sex | to "Sex?": F, M |' in text
    assert "4 tokens a window, each one of 16 codes (`latent` layout, patches of 10" in text
    codec = write_model_card(checkpoints / "avq", FACTS).read_text(encoding="utf-8")
    assert "autoencoder (AVQ) of parcellated fMRI: it turns windows" in codec
    assert "answers on" not in codec
