"""Files of predictions: what is accepted, and what they score."""

import numpy as np
import pandas as pd
import pytest

from cortexicon.evaluation import (
    EvaluationError,
    read_predictions,
    score_clinical,
    write_predictions,
)
from cortexicon.evaluation.clinical import (
    CLASS_REFERENCE,
    NUMERIC_FLOOR,
    NUMERIC_REFERENCE,
)

IDS = [f"s{i}" for i in range(8)]
AGES = np.array([10.0, 12, 14, 16, 20, 24, 30, 34])


def write(folder, system, y_hat, y=AGES, target="age", part="test", ids=IDS, **more):
    name = "".join(c for c in system if c.isalnum())
    return write_predictions(
        folder / f"{name}_{target}_{part}.csv",
        ids,
        y,
        y_hat,
        system=system,
        target=target,
        fold=0,
        part=part,
        **more,
    )


def test_scores_gain_share_and_differences_by_hand(tmp_path):
    files = [
        write(tmp_path, NUMERIC_FLOOR, np.full(8, 18.0)),  # MAE 7
        write(tmp_path, NUMERIC_REFERENCE, AGES + np.array([1, -1] * 4)),  # MAE 1
        write(tmp_path, "ours", AGES + np.array([4, -4] * 4)),  # MAE 4
    ]
    found = score_clinical(files, num_resamples=200)["age"]
    assert found["kind"] == "number"
    part = found["parts"]["test"]
    systems = part["systems"]
    mae = {name: scores["mae"] for name, scores in systems.items()}
    assert mae == {NUMERIC_FLOOR: 7.0, NUMERIC_REFERENCE: 1.0, "ours": 4.0}
    assert part["ranking"] == [NUMERIC_REFERENCE, "ours", NUMERIC_FLOOR]
    assert systems["ours"]["gain_share"] == pytest.approx(0.5)
    assert systems["ours"]["difference_to_reference"] == pytest.approx(3.0)
    assert systems["ours"]["difference_to_reference_interval"] == [3.0, 3.0]
    assert systems["ours"]["difference_to_floor"] == pytest.approx(-3.0)
    assert part["sd"] == pytest.approx(AGES.std(ddof=1))
    assert systems[NUMERIC_FLOOR]["predicted_sd"] == 0.0
    assert np.isnan(systems[NUMERIC_FLOOR]["r"])
    assert "difference_to_reference" not in systems[NUMERIC_REFERENCE]


def test_bias_correction_makes_the_constant_perfect_and_does_not_rank(tmp_path):
    files = [
        write(tmp_path, NUMERIC_FLOOR, np.full(8, 18.0)),
        write(tmp_path, "ours", AGES + np.array([1, -1, -1, 1, 1, -1, -1, 1])),
    ]
    part = score_clinical(files, num_resamples=50)["age"]["parts"]["test"]
    assert part["systems"][NUMERIC_FLOOR]["mae_bias_corrected"] == pytest.approx(0, abs=1e-9)
    assert part["ranking"][0] == "ours"


def test_an_invalid_answer_counts_as_the_median(tmp_path):
    answers = AGES.copy()
    answers[[0, 7]] = np.nan
    files = [
        write(tmp_path, NUMERIC_FLOOR, np.full(8, 18.0)),
        write(tmp_path, "ours", answers),
    ]
    scores = score_clinical(files, num_resamples=50)["age"]["parts"]["test"]["systems"]["ours"]
    assert scores["num_invalid"] == 2
    assert scores["num_subjects"] == 8
    assert scores["mae"] == pytest.approx((8 + 16) / 8)
    alone = score_clinical(files[1:], num_resamples=50)["age"]["parts"]["test"]["systems"]["ours"]
    assert (alone["num_invalid"], alone["num_subjects"], alone["mae"]) == (2, 6, 0.0)


def test_the_rate_of_valid_free_answers_is_reported(tmp_path):
    path = write(tmp_path, "ours", AGES)
    table = pd.read_csv(path)
    table["free_answer_valid"] = [1.0, 0.5] * 4
    table.to_csv(path, index=False)
    scores = score_clinical([path], num_resamples=5)["age"]["parts"]["test"]["systems"]["ours"]
    assert scores["free_answers_valid"] == 0.75
    assert scores["num_invalid"] == 0


def test_systems_are_paired_on_common_subjects_and_parts_kept_apart(tmp_path):
    files = [
        write(tmp_path, NUMERIC_FLOOR, np.full(8, 18.0)),
        write(tmp_path, NUMERIC_REFERENCE, AGES + 1.0),
        write(tmp_path, "ours", AGES[:4] + 2.0, AGES[:4], ids=IDS[:4]),
        write(tmp_path, "ours", AGES[4:] + 9.0, AGES[4:], ids=IDS[4:], part="test_sites"),
        write(tmp_path, "ours", AGES, part="validation", ids=[f"v{i}" for i in range(8)]),
    ]
    parts = score_clinical(files, num_resamples=50)["age"]["parts"]
    ours = parts["test"]["systems"]["ours"]
    assert ours["difference_to_reference"] == pytest.approx(1.0)
    # On these four subjects the median errs by 5 and the reference by 1.
    assert ours["gain_share"] == pytest.approx((5 - 2) / (5 - 1))
    assert parts["test_sites"]["systems"]["ours"]["mae"] == 9.0
    assert "gain_share" not in parts["test_sites"]["systems"]["ours"]
    assert set(parts) == {"test", "test_sites"}


def test_classes_and_sites(tmp_path):
    y = np.array(["F", "M"] * 4)
    files = [
        write(
            tmp_path,
            CLASS_REFERENCE,
            y,
            y,
            target="sex",
            score=(y == "M") * 2.0 - 1,
            site=np.array(["A"] * 4 + ["B"] * 4),
        ),
        write(tmp_path, "ours", np.full(8, "F"), y, target="sex", score=np.zeros(8)),
    ]
    found = score_clinical(files, num_resamples=100)["sex"]
    assert found["kind"] == "classes"
    systems = found["parts"]["test"]["systems"]
    assert systems[CLASS_REFERENCE]["auc"] == 1.0
    assert systems["ours"]["auc"] == 0.5
    assert systems["ours"]["balanced_accuracy"] == 0.5
    assert systems["ours"]["difference_to_reference"] == -0.5
    assert found["parts"]["test"]["ranking"][0] == CLASS_REFERENCE
    # The sites named in one file serve the other as well.
    assert systems["ours"]["by_site"]["A"] == {
        "num_subjects": 4,
        "balanced_accuracy": 0.5,
        "auc": 0.5,
    }


def test_subject_ids_that_look_like_numbers_keep_their_zeros(tmp_path):
    path = write(tmp_path, "ours", AGES, ids=[f"00{i}" for i in range(8)])
    assert read_predictions([path])["subject_id"][0] == "000"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["subject_id,y,y_hat,system,target,fold", "a,1,1,x,age,0"], "missing part"),
        (["subject_id,y,y_hat,system,target,fold,part", "a,1,1,x,age,0,train"], "found train"),
        (["subject_id,y,y_hat,system,target,fold,part", "a,,1,x,age,0,test"], "subject a"),
        (
            ["subject_id,y,y_hat,system,target,fold,part", *["a,1,1,x,age,0,test"] * 2],
            "more than once",
        ),
        (
            [
                "subject_id,y,y_hat,system,target,fold,part",
                "a,1,1,x,age,0,test",
                "a,2,1,z,age,0,test",
            ],
            "disagree on the true age of subject a",
        ),
        (
            [
                "subject_id,y,y_hat,system,target,fold,part",
                "a,1,1,x,age,0,test",
                "b,old,1,x,age,0,test",
            ],
            "both numbers and labels",
        ),
        ([""], "could not read"),
    ],
)
def test_bad_files_are_refused_with_the_reason(tmp_path, lines, message):
    path = tmp_path / "bad.csv"
    path.write_text("\n".join(lines) + "\n" if lines != [""] else "")
    with pytest.raises(EvaluationError, match=message):
        score_clinical([path])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"absent\.csv"):
        read_predictions([tmp_path / "absent.csv"])
    with pytest.raises(EvaluationError, match="at least one"):
        read_predictions([])
