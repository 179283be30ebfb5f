"""`cortexicon report` writes the cards of the checkpoints from the run's results."""

from cortexicon._cards import scores_of, write_cards
from cortexicon.inference.predict import SYSTEM
from cortexicon.modeling import AVQConfig

RESULTS = {
    "stages": {
        "avq": {
            "run": {
                "command": "cortexicon train avq demo.yaml",
                "arguments": {"cohort": "runs/demo/cohort", "seed": 3},
                "versions": {"torch": "2.13.0"},
                "seconds": 12.0,
                "training_scans": 9,
                "cohort_hash": "ab" * 32,
            }
        },
        "lm": {"run": {"command": "cortexicon train lm demo.yaml"}},
    },
    "reconstruction": {
        "atlas": "simulated48",
        "command": "cortexicon evaluate lm cohort --json x.json",
        "r2": 0.5,
        "usage": 0.75,
        "num_subjects": 4,
        "connectivity": {"full": 0.8},
    },
    "clinical": {},
    "environment": {"commit": None},
}


def test_a_finished_stage_gets_a_card_and_an_unfinished_one_does_not(tmp_path):
    for stage in ("avq", "lm"):
        AVQConfig(atlas="simulated48").save_pretrained(tmp_path / stage)
    assert write_cards(tmp_path, RESULTS) == [tmp_path / "avq" / "README.md"]
    text = (tmp_path / "avq" / "README.md").read_text(encoding="utf-8")
    assert "R2 of the reconstruction | **this checkpoint** | **0.500** | test | 4 |" in text
    assert "simulated: no person was scanned" in text
    assert "cortexicon train avq demo.yaml" in text


def test_a_real_cohort_is_not_called_simulated_nor_licensed_for_its_owner(tmp_path):
    AVQConfig(atlas="cc200").save_pretrained(tmp_path / "avq")
    reconstruction = {**RESULTS["reconstruction"], "atlas": "cc200"}
    write_cards(tmp_path, {**RESULTS, "reconstruction": reconstruction})
    text = (tmp_path / "avq" / "README.md").read_text(encoding="utf-8")
    assert "simulated" not in text
    assert "license: other" in text


def test_unseen_sites_stand_beside_unseen_people():
    def systems(mae):
        return {"systems": {SYSTEM: {"mae": mae, "r": 0.5, "num_subjects": 3}}}

    parts = {"test": systems(3.0), "test_sites": systems(4.0), "validation": systems(9.0)}
    results = {**RESULTS, "clinical": {"age": {"parts": parts}}}
    found = {(one["metric"], one["part"]): one["value"] for one in scores_of("avq_lm", results)}
    assert found == {
        ("age: mean absolute error", "test"): 3.0,
        ("age: correlation", "test"): 0.5,
        ("age: mean absolute error", "unseen sites"): 4.0,
    }
