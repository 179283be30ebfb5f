"""Scores of a benchmark's table: seeds, pairs, controls, calibration, what is not ranked."""

import numpy as np
import pandas as pd
import pytest

from cortexicon.evaluation.benchmark_scores import score_view, sign_flip_p

MEDIAN, RIDGE = "cohort median", "kernel ridge on connectivity"
MAJORITY, SVM = "majority class", "SVM on connectivity"


def facts(*names, **changes):
    plain = {"ranked": True, "control": ""}
    return {name: {**plain, **changes.get(name.replace(" ", "_"), {})} for name in names}


def table(target, y, systems, sites=None):
    """Rows of systems: name -> list of (y_hat, score, probability), one per seed."""
    parts = []
    for name, seeds in systems.items():
        for seed, (y_hat, score, probability) in enumerate(seeds):
            part = pd.DataFrame({"subject_id": [f"s{i}" for i in range(len(y))]})
            part["site"] = "A" if sites is None else sites
            part = part.assign(target=target, system=name, seed=seed)
            part["y"], part["y_hat"] = np.asarray(y).astype(str), np.asarray(y_hat).astype(str)
            parts.append(part.assign(score=score, probability=probability))
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def numbers():
    generator = np.random.default_rng(0)
    y = generator.uniform(10, 40, 80)
    good = [y + generator.normal(0, 2, 80) for _ in range(3)]
    systems = {
        MEDIAN: [(np.full(80, 25.0), np.nan, np.nan)],
        RIDGE: [(y + generator.normal(0, 5, 80), np.nan, np.nan)],
        "good": [(y_hat, np.nan, np.nan) for y_hat in good],
        "toy": [(y, np.nan, np.nan)],
        "noise": [(generator.permutation(y), np.nan, np.nan)],
        "leak": [(y + generator.normal(0, 3, 80), np.nan, np.nan)],
    }
    told = facts(*systems, toy={"ranked": False}, noise={"control": "x"}, leak={"control": "x"})
    return y, good, table("age", y, systems, np.resize(["A", "B"], 80)), told


def test_seeds_are_averaged_and_drawn_together(numbers):
    y, good, rows, told = numbers
    found = score_view(rows, told, 200)["age"]
    scores = found["systems"]["good"]
    errors = [np.abs(y_hat - y).mean() for y_hat in good]
    assert scores["num_seeds"] == 3
    assert scores["seeds"] == pytest.approx(errors)
    assert scores["mae"] == pytest.approx(np.mean(errors))
    assert scores["r"] == pytest.approx(np.mean([np.corrcoef(y, g)[0, 1] for g in good]))
    assert scores["mae_interval"][0] < scores["mae"] < scores["mae_interval"][1]
    ridge = found["systems"][RIDGE]
    assert scores["difference_to_reference"] == pytest.approx(scores["mae"] - ridge["mae"])
    assert scores["difference_to_reference_interval"][1] < 0
    assert scores["p_reference"] < 0.001
    assert scores["p_reference_holm"] >= scores["p_reference"]
    assert scores["calibration"]["slope"] == pytest.approx(1.0, abs=0.1)
    assert set(scores["by_site"]) == {"A", "B"}
    assert "difference_to_reference" not in ridge


def test_ranking_controls_and_what_is_never_ranked(numbers):
    _, _, rows, told = numbers
    found = score_view(rows, told, 200)["age"]
    assert found["ranking"] == ["good", RIDGE, MEDIAN]
    assert found["unranked"] == ["toy"]  # exact, and still not the first
    assert found["controls"]["noise"]["passes"] is True
    assert found["controls"]["leak"]["passes"] is False
    assert found["kind"] == "number"


def test_a_subject_that_one_seed_lacks_does_not_count_and_an_invalid_answer_is_the_median(numbers):
    _, _, rows, told = numbers
    of_good = rows["system"] == "good"
    lacking = rows[~(of_good & (rows["seed"] == 1) & (rows["subject_id"] == "s7"))].copy()
    lacking.loc[of_good & (lacking["subject_id"] == "s9"), "y_hat"] = ""
    scores = score_view(lacking, told, 20)["age"]["systems"]["good"]
    assert scores["num_subjects"] == 79
    assert scores["num_invalid"] == 3
    assert scores["mae"] > score_view(rows, told, 20)["age"]["systems"]["good"]["mae"]


def test_a_control_drawn_once_may_fail_by_chance_and_the_interval_over_draws_knows_it():
    """Every draw tells the classes by luck, each its own way: no draw is news about the system."""
    generator = np.random.default_rng(4)
    y = np.where(generator.random(300) < 0.4, "F", "M")
    truth = (y == "M").astype(float)
    luck = np.array([0.7, -0.8, 0.6, -0.5, 0.9, -0.7, 0.4, -0.6])
    scores = [strength * truth + generator.normal(size=300) for strength in luck]
    answers = [(np.full(300, "M"), score, np.nan) for score in scores]
    leaking = [(np.full(300, "M"), np.abs(s) * truth, np.nan) for s in scores]
    systems = {
        MAJORITY: [(np.full(300, "M"), 0.0, np.nan)] * 8,
        "once": answers[:1],
        "often": answers,
        "leak": leaking,
    }
    told = facts(*systems, once={"control": "x"}, often={"control": "x"}, leak={"control": "x"})
    controls = score_view(table("sex", y, systems), told, 300)["sex"]["controls"]
    assert controls["once"]["passes"] is False
    assert controls["often"]["passes"] is True
    low, high = controls["often"]["auc_interval"]
    by_draw = [
        score_view(table("sex", y, {MAJORITY: systems[MAJORITY], "often": [a]}), told, 20)["sex"][
            "systems"
        ]["often"]["auc"]
        for a in answers
    ]
    error = np.std(by_draw, ddof=1) / np.sqrt(len(by_draw))
    assert 2.5 * error < high - low < 6 * error
    assert controls["leak"]["passes"] is False


def test_classes():
    generator = np.random.default_rng(1)
    y = np.where(generator.random(90) < 0.4, "ASD", "control")
    truth = (y == "control").astype(float)
    strong = truth + generator.normal(0, 0.4, 90)
    probability = 1 / (1 + np.exp(-4 * (strong - 0.5)))
    weak = truth + generator.normal(0, 1.5, 90)
    answer = {name: np.where(s > 0.5, "control", "ASD") for name, s in (("s", strong), ("w", weak))}
    chance = generator.normal(size=90)
    systems = {
        MAJORITY: [(np.full(90, "control"), 0.0, np.nan)],
        SVM: [(answer["w"], weak, np.nan)],
        "strong": [(answer["s"], strong, probability)],
        "chance": [(answer["w"], chance, np.nan)],
        "leak": [(answer["s"], strong, np.nan)],
    }
    told = facts(*systems, chance={"control": "x"}, leak={"control": "x"})
    found = score_view(table("diagnosis", y, systems), told, 200)["diagnosis"]
    assert found["ranking"] == ["strong", SVM, MAJORITY]
    scores = found["systems"]["strong"]
    assert scores["difference_to_reference_interval"][0] > 0
    assert scores["p_reference"] < 0.05
    assert scores["calibration"]["brier"] == pytest.approx(((probability - truth) ** 2).mean())
    assert "calibration" not in found["systems"][SVM]
    assert found["controls"]["chance"]["passes"] is True
    assert found["controls"]["leak"]["passes"] is False
    assert found["class_counts"] == {"ASD": int((1 - truth).sum()), "control": int(truth.sum())}


def test_random_signs_agree_with_scipy():
    from scipy.stats import permutation_test

    generator = np.random.default_rng(2)
    gap = generator.normal(0.25, 1, 40)
    theirs = permutation_test(
        (gap, np.zeros(40)),
        lambda a, b: np.mean(a - b),
        permutation_type="samples",
        n_resamples=9999,
        rng=generator,
    )
    assert sign_flip_p(gap) == pytest.approx(theirs.pvalue, abs=0.02)
    assert sign_flip_p(np.zeros(10)) == 1.0
