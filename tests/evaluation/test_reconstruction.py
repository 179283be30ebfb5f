"""The streaming scores of a codec and the tokenizer that learns nothing."""

import numpy as np
import pytest

from cortexicon.evaluation import (
    EvaluationError,
    ReconstructionScores,
    evaluate_reconstruction,
    region_patch_baseline,
    tokenizer_baseline,
)
from cortexicon.evaluation.patch_kmeans import k_means, nearest_centre


def test_perfect_and_mean_reconstructions(make_scan):
    perfect = ReconstructionScores(16, 40.0, 4)
    flat = ReconstructionScores(16, 40.0, 4)
    for number in range(5):
        scan = make_scan(f"s{number}", number, noise=0.0)
        perfect.add_training(scan)
        perfect.add(scan)
        scan.reconstruction = np.broadcast_to(scan.raw.mean(0), scan.raw.shape)
        flat.add(scan)
    best, worst = perfect.results(50), flat.results(50)
    assert best["r2"] == 1.0
    assert best["connectivity"]["full"] == pytest.approx(1.0)
    assert best["connectivity"]["deviation"] == pytest.approx(1.0)
    assert best["spectrum_error_db"] == pytest.approx(0.0)
    assert best["power_kept"] == pytest.approx(1.0)
    assert worst["r2"] == pytest.approx(0.0, abs=1e-6)
    assert worst["power_kept"] == pytest.approx(0.0, abs=1e-9)
    assert "deviation" not in worst["connectivity"]  # no training scans were given
    assert best["bits_per_second"] == pytest.approx(4 * 4 / 40)


def test_streaming_equals_one_big_sum(make_scan, regions):
    scans = [make_scan(f"s{i}", i) for i in range(6)]
    result = evaluate_reconstruction(scans[:2], scans[2:], 16, 40.0, 4, regions)
    held_out = scans[2:]
    sse = sum(((s.raw.astype(float) - s.reconstruction) ** 2).sum(0) for s in held_out)
    sst = sum(((s.raw.astype(float) - s.raw.mean(0)) ** 2).sum(0) for s in held_out)
    assert result["r2"] == pytest.approx(1 - sse.sum() / sst.sum(), rel=1e-5)
    np.testing.assert_allclose(result["r2_per_region"], 1 - sse / sst, rtol=1e-5)
    assert list(result["r2_per_subject"]) == ["s2", "s3", "s4", "s5"]
    low, high = result["r2_interval"]
    assert low < result["r2"] < high
    counts = np.bincount(np.concatenate([s.codes.ravel() for s in held_out]), minlength=16)
    assert result["codebook"]["usage"] == (counts > 0).mean()


def test_r2_within_groups_of_subjects(make_scan, regions):
    scans = [make_scan(f"s{i}", i, noise=0.1 + 0.3 * (i % 2)) for i in range(6)]
    groups = {f"s{i}": f"TR {2 + i % 2} s" for i in range(5)}
    found = evaluate_reconstruction([], scans, 16, 40.0, 4, regions, groups=groups)
    alone = evaluate_reconstruction([], scans[::2], 16, 40.0, 4, regions)
    assert set(found["r2_by_group"]) == {"TR 2 s", "TR 3 s"}
    assert found["r2_by_group"]["TR 2 s"]["r2"] == pytest.approx(alone["r2"])
    assert found["r2_by_group"]["TR 2 s"]["num_subjects"] == 3
    assert found["r2_by_group"]["TR 3 s"]["num_subjects"] == 2  # s5 has no group
    assert "r2_by_group" not in alone


def test_the_training_mean_alone_says_nothing_about_the_person(make_scan):
    """Every scan decoded to one and the same series: full correlation high, deviation none."""
    scores = ReconstructionScores(16, 40.0, 4)
    group = np.concatenate([make_scan("g", i).raw for i in range(30)])
    for number in range(20):
        scan = make_scan(f"s{number}", number)
        scan.reconstruction = group[:40] + 0.01 * scan.reconstruction
        scores.add_training(scan)
    for number in range(20, 40):
        scan = make_scan(f"s{number}", number)
        scan.reconstruction = group[:40].copy()
        scores.add(scan)
    found = scores.results(20)["connectivity"]
    assert found["full"] > 0.5
    assert found["training_mean_alone"] > 0.5
    assert abs(found["deviation"]) < 0.3


def test_sites_apart_and_the_examples_file(make_scan, regions, tmp_path):
    scans = [make_scan(f"s{i}", i) for i in range(6)]
    scans[2].region_mask[3] = False
    path = tmp_path / "evaluation" / "examples.npz"
    result = evaluate_reconstruction(
        scans[:2], scans[2:4], 16, 40.0, 4, regions, scans[4:], examples_path=path
    )
    assert result["test_sites"]["num_subjects"] == 2
    assert result["test_sites"]["connectivity"]["num_training_scans"] == 2
    with np.load(path, allow_pickle=False) as saved:
        np.testing.assert_allclose(saved["raw_0"], scans[2].raw, atol=2e-3)
        assert saved["networks"].tolist() == ["Visual"] * 6 + ["Default"] * 6
        assert saved["seconds_per_sample"] == 2.0
        assert saved["code_counts"].sum() == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": np.full((2, 4), 16)}, r"0\.\.15"),
        ({"codes": np.zeros((2, 3), int)}, r"\(windows, 4\)"),
        ({"codes": np.zeros((3, 4), int)}, "40 samples do not divide into 3"),
        ({"reconstruction": np.zeros((40, 11))}, "one shape"),
        ({"reconstruction": np.full((40, 12), np.nan)}, "not finite"),
        ({"region_mask": np.zeros(12, bool)}, "no region with a signal"),
    ],
)
def test_a_scan_that_cannot_be_scored_is_named(make_scan, change, message):
    scan = make_scan("sub-7")
    vars(scan).update(change)
    with pytest.raises(EvaluationError, match=message) as caught:
        ReconstructionScores(16, 40.0, 4).add(scan)
    assert "sub-7" in str(caught.value)


def test_a_subject_twice_and_no_subject_at_all(make_scan):
    scores = ReconstructionScores(16, 40.0, 4)
    with pytest.raises(EvaluationError, match="No held-out scan"):
        scores.results()
    scores.add(make_scan("a"))
    with pytest.raises(EvaluationError, match="a was scored already"):
        scores.add(make_scan("a", 1))


def windows_of(seed, num_windows=6):
    """Low-rank windows of two possible patches per component: a small codebook holds them all."""
    generator = np.random.default_rng(seed)
    shape = np.sin(np.linspace(0, np.pi, 20))
    signs = generator.choice([-1.0, 1.0], (num_windows, 4, 2))
    courses = np.einsum("wpc,t->wptc", signs, shape).reshape(num_windows, 80, 2)
    return (courses @ np.array([[3.0, 0, 1, 0, 0], [0, 1, 0, 0.5, 0]])).astype(np.float32)


def test_tokenizer_baseline_finds_a_signal_made_of_few_patches():
    train = [(f"t{i}", windows_of(i)) for i in range(8)]
    test = [(f"h{i}", windows_of(100 + i)) for i in range(3)]
    found = tokenizer_baseline(train, test, num_codes=64, tokens_per_window=8, iterations=10)
    assert found["r2"] > 0.98
    assert found["num_components"] == 2
    assert found["tokens_per_window"] == 8
    assert found["num_subjects"] == 3
    assert found["variance_of_components"] == pytest.approx(1.0)
    assert 0 < found["gaussian_reference_r2"] <= 1
    again = tokenizer_baseline(train, test, num_codes=64, tokens_per_window=8, iterations=10)
    assert again["r2"] == found["r2"]


def test_tokenizer_baseline_on_noise_explains_next_to_nothing_and_refuses_a_misfit():
    generator = np.random.default_rng(0)
    noise = [(str(i), generator.normal(size=(4, 80, 30)).astype(np.float32)) for i in range(6)]
    found = tokenizer_baseline(
        noise[:4], noise[4:], num_codes=64, tokens_per_window=16, iterations=3
    )
    assert found["r2"] < 0.1
    with pytest.raises(EvaluationError, match="patches of 21"):
        tokenizer_baseline(noise[:4], noise[4:], patch_length=21)
    with pytest.raises(EvaluationError, match="0 held-out"):
        tokenizer_baseline(noise, [("x", np.zeros((0, 80, 30)))])


def test_region_patches_spend_a_token_for_each_region_and_patch():
    train = [(f"t{i}", windows_of(i)) for i in range(8)]
    test = [(f"h{i}", windows_of(100 + i)) for i in range(3)]
    found = region_patch_baseline(train, test, num_codes=32, iterations=10)
    assert found["r2"] > 0.98  # four amplitudes of one shape, either sign, and the flat region
    assert found["tokens_per_window"] == 4 * 5
    assert found["codebook"]["num_codes"] == 32
    assert found["connectivity"]["deviation"] > 0.9
    halves = region_patch_baseline(train, test, num_codes=32, patch_length=10, iterations=10)
    assert halves["tokens_per_window"] == 8 * 5
    assert halves["bits_per_second"] == 2 * found["bits_per_second"]
    with pytest.raises(EvaluationError, match="80 samples cannot be cut into patches of 21"):
        region_patch_baseline(train, test, patch_length=21)


def test_more_codes_and_shorter_patches_rebuild_noise_better():
    generator = np.random.default_rng(0)
    noise = [(str(i), generator.normal(size=(6, 40, 8)).astype(np.float32)) for i in range(12)]
    r2 = {
        (codes, patch): region_patch_baseline(
            noise[:9], noise[9:], codes, patch, window_seconds=80.0, iterations=5
        )["r2"]
        for codes, patch in ((16, 5), (128, 5), (128, 2))
    }
    assert 0 < r2[16, 5] < r2[128, 5] < r2[128, 2] < 1


def test_the_nearest_centre_or_its_negative_is_found_in_every_chunk():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(500, 6)).astype(np.float32)
    centres = k_means(rows, 20, 3, generator)
    both = np.concatenate([centres, -centres])
    distance = ((rows[:, None] - both) ** 2).sum(2)
    index, sign = nearest_centre(rows, centres, chunk=37)
    np.testing.assert_array_equal(index + 20 * (sign < 0), distance.argmin(1))
