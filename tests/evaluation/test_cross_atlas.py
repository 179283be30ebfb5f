"""Ways from one parcellation to another, on data whose answer is known."""

import numpy as np
import pytest

from cortexicon.evaluation import CrossAtlas, EvaluationError, PairedR2, ScanPair, cross_atlas
from cortexicon.evaluation.cross_atlas import PairMoments, fit_interpolation, fit_ridge

SOURCE, TARGET, TIME = 10, 6, 60
GENERATOR = np.random.default_rng(4)
PLACES = GENERATOR.uniform(-60, 60, (SOURCE, 3))
MAP = GENERATOR.normal(size=(SOURCE, TARGET))


def make_pair(seed, noise=0.2, mask=None, places=None):
    """A scan whose target is a linear map of its source, plus noise; decoded = source + noise."""
    generator = np.random.default_rng(seed)
    source = generator.normal(size=(TIME, SOURCE)).astype(np.float32)
    target = source @ MAP + noise * generator.normal(size=(TIME, TARGET))
    mask = np.ones(TARGET, bool) if mask is None else mask
    decoded = source + 0.5 * generator.normal(size=source.shape)
    return ScanPair(
        f"s{seed}",
        source,
        np.where(mask, target, 0.0).astype(np.float32),
        decoded.astype(np.float32),
        np.ones(SOURCE, bool),
        mask,
    )


def moments_of(pairs):
    moments = PairMoments(SOURCE, TARGET)
    for pair in pairs:
        moments.add(pair.source, pair.target, pair.target_mask)
    return moments


def holed(seed):
    """Every third scan lacks a target region: not noise of mean 0, but nothing at all."""
    mask = np.ones(TARGET, bool)
    mask[seed % TARGET] = seed % 3 > 0
    return make_pair(seed, mask=mask)


def test_moments_say_what_the_series_say():
    pairs = [holed(seed) for seed in range(6)]
    weights = np.random.default_rng(0).normal(size=(SOURCE, TARGET))
    error = total = 0.0
    for pair in pairs:
        known = pair.target_mask
        error += ((pair.target - pair.source @ weights)[:, known] ** 2).sum()
        total += (pair.target[:, known] ** 2).sum()
    assert moments_of(pairs).r2(weights) == pytest.approx(1 - error / total, rel=1e-6)


def test_ridge_is_ridge_without_the_scans_that_lack_a_region():
    training = [holed(seed) for seed in range(12)]
    fit = fit_ridge(moments_of(training), moments_of([make_pair(99)]))
    stacked = np.concatenate([pair.source for pair in training]).astype(float)
    scale = (stacked**2).sum() / SOURCE
    for region in range(TARGET):
        have = [pair for pair in training if pair.target_mask[region]]
        assert len(have) < 12 or region not in {0, 3}
        x = np.concatenate([pair.source for pair in have]).astype(float)
        y = np.concatenate([pair.target[:, region] for pair in have]).astype(float)
        expected = np.linalg.solve(x.T @ x + fit.penalty * scale * np.eye(SOURCE), x.T @ y)
        np.testing.assert_allclose(fit.weights[:, region], expected, rtol=1e-5, atol=1e-8)
    assert fit.validation_r2 > 0.98


def test_the_penalty_is_what_validation_asks_for():
    few = [make_pair(seed, noise=30.0) for seed in range(2)]
    weak = fit_ridge(moments_of(few), moments_of([make_pair(50)]))
    much = fit_ridge(
        moments_of([make_pair(seed) for seed in range(20)]), moments_of([make_pair(50)])
    )
    assert weak.penalty > much.penalty


def test_interpolation_finds_regions_that_are_the_same():
    order = np.random.default_rng(0).permutation(SOURCE)[:TARGET]
    moments = PairMoments(SOURCE, TARGET)
    for seed in range(3):
        pair = make_pair(seed)
        moments.add(pair.source, 2 * pair.source[:, order], pair.target_mask)
    fit = fit_interpolation(moments, PLACES, PLACES[order])
    assert fit.training_r2 == pytest.approx(1, abs=1e-3)
    assert fit.gain == pytest.approx(2, rel=1e-2)


@pytest.mark.parametrize("kernel", [("gaussian", 20.0), ("inverse distance", 2.0)])
def test_interpolation_weights(kernel):
    target = np.random.default_rng(1).uniform(-60, 60, (TARGET, 3))
    weights = cross_atlas.interpolation_weights(PLACES, target, *kernel)
    np.testing.assert_allclose(weights.sum(0), 1)
    distance = np.linalg.norm(PLACES[:, None] - target, axis=2)
    assert (np.argsort(-weights, axis=0) == np.argsort(distance, axis=0)).all()
    mask = np.arange(SOURCE) != 3
    without = cross_atlas.interpolation_weights(PLACES, target, *kernel, mask)
    assert (without[3] == 0).all()
    np.testing.assert_allclose(without[mask], weights[mask] / weights[mask].sum(0))


def fitted():
    ways = CrossAtlas(PLACES, PLACES[:TARGET] + 3.0)
    ways.fit([make_pair(seed) for seed in range(20)], [make_pair(seed) for seed in range(20, 24)])
    return ways


def test_all_ways_are_scored_on_the_same_scans():
    ways = fitted()
    for seed in range(30, 38):
        pair = holed(seed)
        noise = np.random.default_rng(seed).normal(size=pair.target.shape)
        ways.add(pair, pair.target + 0.1 * noise, pair.target)
    scores = ways.results()
    r2 = {row["system"]: row["r2"] for row in scores["systems"]}
    assert next(iter(r2)) == cross_atlas.CROSSED
    assert r2[cross_atlas.DIRECT] == 1
    assert r2[cross_atlas.RAW_RIDGE] > 0.98
    # Each plain way is worse from what the codec decoded, and interpolation knows no map.
    assert r2[cross_atlas.DECODED_RIDGE] < r2[cross_atlas.RAW_RIDGE] - 0.05
    assert r2[cross_atlas.DECODED_RIDGE] > r2[cross_atlas.DECODED_INTERPOLATED]
    assert scores["num_subjects"] == 8
    assert 0.7 < scores["source_r2"] < 0.8  # noise of variance 1/4
    for row in scores["differences"]:
        assert row["difference"] == pytest.approx(r2[cross_atlas.CROSSED] - r2[row["other"]])
        low, high = row["interval"]
        assert low <= row["difference"] <= high
    assert scores["fits"][cross_atlas.RAW_RIDGE]["penalty"] in cross_atlas.PENALTIES


def test_ridge_from_decoded_series_is_fitted_on_decoded_series():
    ways = fitted()
    # Decoded = source + noise of variance 1/4: least squares shrinks by 1 / 1.25.
    shrunk = np.vdot(ways.decoded_ridge.weights, MAP) / np.vdot(MAP, MAP)
    assert shrunk == pytest.approx(0.8, abs=0.03)
    assert np.vdot(ways.raw_ridge.weights, MAP) / np.vdot(MAP, MAP) == pytest.approx(1, abs=0.01)


def test_what_does_not_fit_is_refused():
    ways = fitted()
    pair = make_pair(1)
    with pytest.raises(EvaluationError, match=r"s1.*\(60, 10\).*\(59, 10\)"):
        ways.add(pair._replace(source=pair.source[:-1]), pair.target, pair.target)
    with pytest.raises(EvaluationError, match="No training scan"):
        CrossAtlas(PLACES, PLACES[:TARGET]).fit([], [pair])


def test_paired_scores():
    scores = PairedR2()
    pairs = [make_pair(seed) for seed in range(5)]
    for pair in pairs:
        scores.add("good", pair.subject_id, pair.target, pair.target + 0.1, pair.target_mask)
        flat = np.broadcast_to(pair.target.mean(0), pair.target.shape)
        scores.add("flat", pair.subject_id, pair.target, flat)
    error = 5 * TIME * TARGET * 0.01
    total = sum(((pair.target - pair.target.mean(0)).astype(float) ** 2).sum() for pair in pairs)
    good, flat = scores.results()
    assert good["r2"] == pytest.approx(1 - error / total, rel=1e-4)
    assert flat["r2"] == pytest.approx(0, abs=1e-6)
    assert good["r2_interval"][0] < good["r2"] < good["r2_interval"][1]
    gap = scores.difference("good", "flat")
    assert gap["difference"] == pytest.approx(good["r2"], abs=1e-6)
    one = scores.r2("good", ["s2"])
    assert one == pytest.approx(good["r2_per_subject"]["s2"])


def test_other_windows_or_subjects_are_not_compared():
    scores = PairedR2()
    one, two = make_pair(1), make_pair(2)
    scores.add("a", "s1", one.target, one.target)
    with pytest.raises(EvaluationError, match="same windows as for a"):
        scores.add("b", "s1", one.target[: TIME // 2], one.target[: TIME // 2])
    with pytest.raises(EvaluationError, match="scored already"):
        scores.add("a", "s1", one.target, one.target)
    scores.add("a", "s2", two.target, two.target)
    scores.add("b", "s2", two.target, two.target)
    with pytest.raises(EvaluationError, match="1 lacking"):
        scores.results()
    with pytest.raises(EvaluationError, match="No scan was scored"):
        PairedR2().results()
