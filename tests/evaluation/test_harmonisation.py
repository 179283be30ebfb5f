"""Site harmonisation: takes off what scanners add, keeps what people differ by, learns no test."""

import numpy as np
import pandas as pd
import pytest

from cortexicon.evaluation.harmonisation import SiteHarmonisation, training_covariates


@pytest.fixture
def people():
    """Three sites that shift and stretch forty features; age moves half of them, and the sites."""
    generator = np.random.default_rng(0)
    site = np.repeat(["a", "b", "c"], [40, 30, 20])
    age = np.select([site == "a", site == "b"], [12.0, 20.0], 28.0) + generator.normal(0, 4, 90)
    slope = np.r_[np.full(20, 0.2), np.zeros(20)]
    clean = age[:, None] * slope + generator.normal(size=(90, 40))
    shift = {name: generator.normal(0, 2, 40) for name in "abc"}
    stretch = {"a": 0.6, "b": 1.0, "c": 1.7}
    # What a scanner adds does not depend on whom it scans.
    noise = clean - age[:, None] * slope
    scanned = np.stack(
        [
            row + shift[s] + (stretch[s] - 1) * e
            for row, e, s in zip(clean, noise, site, strict=True)
        ]
    )
    return scanned, site, age, clean, slope


def slopes(features, age):
    centred = age - age.mean()
    return centred @ (features - features.mean(0)) / (centred @ centred)


def test_sites_become_alike_and_the_effect_of_age_stays(people):
    scanned, site, age, clean, slope = people
    combat = SiteHarmonisation(scanned, site, age[:, None])
    found = combat.apply(scanned, site)
    left = found - age[:, None] * slope
    means = np.array([left[site == name].mean(0) for name in "abc"])
    before = scanned - age[:, None] * slope
    raw_means = np.array([before[site == name].mean(0) for name in "abc"])
    assert means.std(0).mean() < 0.25 * raw_means.std(0).mean()
    deviations = np.array([left[site == name].std() / left[site == "b"].std() for name in "ac"])
    assert np.abs(np.log(deviations)).max() < 0.25
    # Without the covariate the sites' ages are taken for the scanners' doing.
    naive = SiteHarmonisation(scanned, site).apply(scanned, site)
    kept = slopes(found, age)[:20].mean(), slopes(naive, age)[:20].mean()
    assert kept[0] == pytest.approx(slopes(clean, age)[:20].mean(), abs=0.06)
    assert kept[1] < 0.75 * kept[0]


def test_a_site_that_training_has_not_seen_stays_as_it_is(people):
    scanned, site, age, _, _ = people
    combat = SiteHarmonisation(scanned, site, age[:, None])
    new = scanned[:3]
    np.testing.assert_allclose(combat.apply(new, ["z"] * 3), new, rtol=1e-5)


def test_what_is_applied_does_not_depend_on_who_else_is_tested(people):
    scanned, site, age, _, _ = people
    combat = SiteHarmonisation(scanned[:60], site[:60], age[:60, None])
    alone = combat.apply(scanned[60:61], site[60:61])
    together = combat.apply(scanned[60:], site[60:])
    np.testing.assert_array_equal(alone[0], together[0])


def test_missing_values_stay_missing_and_harm_nobody(people):
    scanned, site, age, _, _ = people
    holes = scanned.copy()
    holes[3, 5] = np.nan
    found = SiteHarmonisation(holes, site, age[:, None]).apply(holes, site)
    assert np.isnan(found[3, 5])
    assert np.isfinite(np.delete(found.ravel(), 3 * 40 + 5)).all()


def test_a_site_of_one_subject_and_a_constant_feature():
    generator = np.random.default_rng(1)
    features = generator.normal(size=(12, 4))
    features[:, 2] = 7.0
    site = ["a"] * 11 + ["b"]
    found = SiteHarmonisation(features, site).apply(features, site)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 2], 7.0)


def test_covariates_are_numbers_of_training_people():
    table = pd.DataFrame(
        {"age": [10.0, np.nan, 20.0], "sex": ["F", "M", None], "smoker": [True, False, True]}
    )
    found = training_covariates(table, ["age", "sex", "smoker"])
    np.testing.assert_allclose(found, [[10, 0, 1], [15, 1, 0], [20, 0.5, 1]])
    assert training_covariates(table, []).shape == (3, 0)
