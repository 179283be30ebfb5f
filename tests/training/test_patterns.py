"""Patterns of connections that tell variables of people apart."""

import numpy as np
import pandas as pd
import pytest

from cortexicon.training.arguments import TrainingError
from cortexicon.training.patterns import balanced_weights, ridge_patterns, target_columns

PEOPLE, PAIRS = 400, 30


@pytest.fixture(scope="module")
def cohort():
    """Connections of unequal scale; age shows in the first, sex in the second."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(PEOPLE, PAIRS)) * np.linspace(0.5, 3, PAIRS)
    age = np.exp(3 + 0.3 * rows[:, 0] + 0.01 * rng.normal(size=PEOPLE))
    sex = np.where(rows[:, 1] > 0, "m", "f").astype(object)
    table = pd.DataFrame({"age": age, "sex": sex, "three": rng.choice(list("abc"), PEOPLE)})
    return rows.astype(np.float32), table


def test_columns_are_what_a_linear_model_can_tell(cohort):
    table = cohort[1].copy()
    table.loc[3, "sex"] = None
    (name, age), (other, sex), *three = target_columns(table, ["age", "sex", "three"])
    assert (name, other) == ("age", "sex = m")
    np.testing.assert_allclose(age, np.log(table["age"]))
    assert np.isnan(sex[3])
    assert np.nansum(sex) == (table["sex"] == "m").sum()
    assert [part[0] for part in three] == ["three = a", "three = b", "three = c"]


def test_patterns_point_where_a_variable_shows(cohort):
    rows, table = cohort
    holes = rows.copy()
    holes[5, 4] = np.nan
    table = table.copy()
    table.loc[7, "age"] = np.nan
    found = ridge_patterns(holes, target_columns(table, ["age", "sex"]), penalty=0.01)
    # In units of raw connections: log(age) is 0.3 of the first alone.
    assert abs(found[0, 0]) > 8 * np.abs(found[0, 1:]).max()
    assert found[1].argmax() == 1
    told = np.isfinite(table["age"].to_numpy())
    predicted = (rows @ found[0])[told]
    assert np.corrcoef(predicted, np.log(table["age"][told]))[0, 1] > 0.98


def test_a_rare_class_counts_as_much_as_the_other():
    rare = np.array([1.0] + [0.0] * 3)
    np.testing.assert_allclose(balanced_weights(rare), [2.0, 2 / 3, 2 / 3, 2 / 3])
    np.testing.assert_array_equal(balanced_weights(np.array([0.0, 1.0, 2.0])), 1.0)
    # One class lies in the second connection's extremes on one side; what is weighed is that class.
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(PEOPLE, 5)).astype(np.float32)
    few = np.where(rows[:, 1] > 1.5, "f", "m")
    table = pd.DataFrame({"sex": few, "other": np.where(few == "f", "m", "f")})
    found = ridge_patterns(rows, target_columns(table, ["sex", "other"]), penalty=0.3)
    np.testing.assert_allclose(found[0], -found[1], atol=1e-6)
    assert np.abs(found[0]).argmax() == 1


def test_what_tells_nothing_is_refused(cohort):
    table = cohort[1].assign(same=1.0, rare=[1.0] * 3 + [np.nan] * (PEOPLE - 3))
    for target, message in (("iq", "found 'iq'"), ("same", "who differ"), ("rare", "found 3")):
        with pytest.raises(TrainingError, match=message):
            target_columns(table, [target])
