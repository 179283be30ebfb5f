"""The simulated cohort: layout, determinism, and what is planted where."""

import numpy as np
import pytest

from cortexicon.cohorts import CohortError, load_cohort, save_cohort, simulate_cohort
from cortexicon.cohorts.simulate import EFFECTS, SITES, Site
from cortexicon.cohorts.template import (
    network_modes,
    structural_coupling,
    template_regions,
)


@pytest.fixture(scope="module")
def simulated():
    return simulate_cohort(24, seed=3, progress=False)


def test_layout(simulated):
    assert len(simulated) == 24
    assert len(simulated.labels) == 100
    assert set(simulated.participants["site"]) == {site.name for site in SITES}
    assert (simulated.quality()["problem"] == "").all()
    for scan in simulated:
        assert scan.values.dtype == np.float32
        assert len(scan.values) * scan.tr > 320  # two windows of 160 s after resampling
        network, side, number = scan.labels[0].split("_")
        assert (network, side, number) == ("Default", "L", "01")
    assert simulated.participants["age"].between(18, 80).all()
    assert set(simulated.participants["sex"]) == {"F", "M"}
    assert set(simulated.participants["diagnosis"]) == {"patient", "control"}


def test_regions_are_where_their_names_say(simulated):
    regions = simulated.regions
    assert ((regions["x"] < 0) == (regions["hemisphere"] == "L")).all()
    assert regions["network"].nunique() == 7
    assert regions["network"].value_counts().max() <= 15
    gaps = np.linalg.norm(simulated.coordinates[:, None] - simulated.coordinates, axis=-1)
    assert gaps[~np.eye(100, dtype=bool)].min() > 5.0


def test_same_seed_same_bits_and_other_seed_other_scans(simulated):
    assert simulate_cohort(24, seed=3, progress=False).content_hash == simulated.content_hash
    assert simulate_cohort(24, seed=4, progress=False).content_hash != simulated.content_hash


def test_round_trip(simulated, tmp_path):
    back = load_cohort(save_cohort(simulated, tmp_path / "cohort"))
    assert back.content_hash == simulated.content_hash
    assert back.regions["network"].tolist() == simulated.regions["network"].tolist()


def test_phenotypes_are_balanced_within_every_site():
    table = simulate_cohort(240, num_regions=28, duration=60, progress=False).participants
    by_site = table.groupby("site")
    assert np.ptp(by_site["age"].mean()) < 1.0
    for column, level in (("sex", "F"), ("diagnosis", "patient")):
        assert ((table[column] == level).groupby(table["site"]).sum() == 20).all()


def pattern(trait):
    names = sorted(
        {network for listed in EFFECTS.values() for edge in listed for network in edge[:2]}
    )
    matrix = np.zeros((len(names), len(names)))
    for one, other, sign in EFFECTS[trait]:
        i, j = names.index(one), names.index(other)
        matrix[i, j] = matrix[j, i] = sign
    return matrix


@pytest.mark.parametrize("trait", EFFECTS)
def test_effects_are_balanced_and_bipartite(trait):
    assert sum(sign for _, _, sign in EFFECTS[trait]) == 0
    walk = np.eye(7)
    for length in range(1, 8):
        walk = walk @ np.abs(pattern(trait))
        if length % 2:
            assert np.trace(walk) == 0, f"closed walk of odd length {length}"


@pytest.mark.parametrize("other", ["sex", "diagnosis"])
def test_no_other_trait_closes_a_triangle_with_age(other):
    squared = pattern(other) @ pattern(other)
    assert np.abs(squared * pattern("age")).sum() == 0


def test_effects_change_no_regional_spectrum_to_first_order():
    regions = template_regions(100)
    base, modes = structural_coupling(regions), network_modes(regions["network"])
    change = np.zeros((7, 7))
    change[0, 1] = change[1, 0] = 1e-4
    for power in (1, 2, 8):
        shifted = np.linalg.matrix_power(base + modes @ change @ modes.T, power)
        moved = np.diag(shifted) - np.diag(np.linalg.matrix_power(base, power))
        assert np.abs(moved).max() < 1e-7


def test_traits_share_no_connection():
    edges = [frozenset(edge[:2]) for listed in EFFECTS.values() for edge in listed]
    assert len(edges) == len(set(edges))


def test_shared_coupling_is_symmetric_and_stable():
    coupling = structural_coupling(template_regions(100))
    np.testing.assert_allclose(coupling, coupling.T)
    assert np.linalg.eigvalsh(coupling)[-1] < 0.8


def test_network_modes_are_orthonormal():
    modes = network_modes(["a", "a", "b", "c", "c", "c"])
    np.testing.assert_allclose(modes.T @ modes, np.eye(3), atol=1e-12)


def network_couplings(cohort):
    """Mean Fisher-z connectivity between networks, (subjects, networks, networks)."""
    names = list(dict.fromkeys(cohort.regions["network"]))
    member = np.array(
        [[network == name for name in names] for network in cohort.regions["network"]]
    )
    weights = member / member.sum(0)
    result = []
    for scan in cohort:
        correlation = np.corrcoef(scan.values.T)
        np.fill_diagonal(correlation, 0.0)
        result.append(weights.T @ np.arctanh(correlation) @ weights)
    return np.stack(result), names


def test_age_moves_the_named_connections_in_the_named_direction():
    cohort = simulate_cohort(240, seed=1, progress=False)
    couplings, names = network_couplings(cohort)
    age = cohort.participants["age"].to_numpy()
    slope = {}
    for i, one in enumerate(names):
        for j, other in enumerate(names[:i]):
            slope[frozenset((one, other))] = np.corrcoef(couplings[:, i, j], age)[0, 1]
    planted = {frozenset(edge[:2]): edge[2] for edge in EFFECTS["age"]}
    for edge, sign in planted.items():
        assert sign * slope[edge] > 0.25, (edge, slope[edge])
    others = [abs(value) for edge, value in slope.items() if edge not in planted]
    assert np.median(others) < 0.15


def test_homeostasis_keeps_the_variance_of_every_region(simulated):
    scaled = np.stack(
        [
            scan.values.std(0) / np.median(scan.values.std(0))
            for scan in simulated
            if scan.site == "ALPHA"
        ]
    )
    assert np.abs(scaled.mean(0) - 1).max() < 0.3  # what is left is the noise of 165 samples


def test_sites_differ_in_tr_and_gain(simulated):
    table = simulated.participants
    assert table.groupby("site")["tr"].first().to_dict() == {s.name: s.tr for s in SITES}
    spread = {s: np.mean([x.values.std() for x in simulated if x.site == s]) for s in table["site"]}
    assert spread["BRAVO"] > 1.4 * spread["CARMEL"]


WRONG = {
    "no subjects": ({"num_subjects": 0}, "found 0 subjects"),
    "effect": ({"effect": 2.0}, "effect 2"),
    "duration": ({"duration": 5.0}, "5 s"),
    "no sites": ({"sites": ()}, "0 sites"),
    "regions": ({"num_regions": 1000}, "expected 28 to 193 regions, found 1000"),
    "TR": ({"sites": (Site("X", 2.05, 0.3, 1.0),)}, "site X: expected a TR that is a multiple"),
}


@pytest.mark.parametrize("name", WRONG)
def test_impossible_requests(name):
    arguments, pattern = WRONG[name]
    with pytest.raises(CohortError, match=pattern):
        simulate_cohort(**({"num_subjects": 6, "progress": False} | arguments))


def test_without_nilearn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CohortError, match=r'pip install "cortexicon\[io\]"'):
        template_regions(100)
