"""What comes out of the feature extractor, and what does not get in."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoFeatureExtractor

from cortexicon.tokenization import AVQFeatureExtractor, TokenizationError

LABELS = [f"R{region:02d}" for region in range(30)]


def test_a_scan_becomes_windows_of_its_z_scores(extractor, scan, coordinates):
    out = extractor(scan, tr=2.0, return_tensors="np")
    z = (scan - scan.mean(0, dtype=float)) / scan.std(0, dtype=float)
    np.testing.assert_allclose(out["input_values"], z[:120].reshape(3, 40, 30), atol=1e-4)
    np.testing.assert_allclose(out["region_coordinates"], coordinates[None], atol=1e-5)
    assert out["region_mask"].shape == (3, 30)
    assert out["time_mask"].shape == (3, 40)
    assert out["region_mask"].all()
    assert out["time_mask"].all()
    assert out["num_windows"].tolist() == [3]
    assert {name: value.dtype.name for name, value in out.items()} == {
        "input_values": "float32",
        "region_coordinates": "float32",
        "region_mask": "bool",
        "time_mask": "bool",
        "num_windows": "int64",
    }


def test_torch_is_the_default_and_none_gives_numpy(extractor, scan):
    out = extractor(torch.from_numpy(scan), tr=2.0)
    plain = extractor(scan, tr=2.0, return_tensors=None)
    for name, value in out.items():
        assert isinstance(value, torch.Tensor)
        assert isinstance(plain[name], np.ndarray)
        np.testing.assert_array_equal(value.numpy(), plain[name])


def test_the_unit_of_the_scan_does_not_matter(extractor, scan):
    one = extractor(scan, tr=2.0).input_values
    other = extractor(scan.astype(np.float64) * 7 - 3, tr=2.0).input_values
    assert torch.allclose(one, other, atol=1e-5)
    integers = np.round(scan * 100).astype(np.int32)
    assert torch.allclose(one, extractor(integers, tr=2.0).input_values, atol=1e-2)


def test_each_row_of_a_batch_is_the_scan_alone(extractor, scan):
    scans, intervals = [scan, scan[::-1][:100], scan[:60]], [2.0, 2.5, 2.0]
    out = extractor(scans, tr=intervals, return_tensors="np")
    assert out["num_windows"].tolist() == [3, 3, 1]
    alone = [extractor(s, tr=t, return_tensors="np") for s, t in zip(scans, intervals, strict=True)]
    np.testing.assert_array_equal(
        out["input_values"], np.concatenate([one["input_values"] for one in alone])
    )
    assert out["region_coordinates"].shape == (1, 30, 3)


def test_prepare_scan_is_what_the_windows_are_cut_from(extractor, scan):
    values, mask = extractor.prepare_scan(scan, 2.5)
    assert values.shape == (162, 30)
    assert values.dtype == np.float32
    assert mask.shape == (30,)
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-5)
    out = extractor(scan, tr=2.5, return_tensors="np")
    np.testing.assert_array_equal(out["input_values"], values[:160].reshape(4, 40, 30))


def test_a_slow_wave_keeps_its_period_in_seconds_when_resampled(extractor):
    for tr in (0.72, 1.656, 2.5, 3.0):
        times = np.arange(int(260 / tr)) * tr
        wave = np.sin(2 * np.pi * 0.02 * times[:, None] + np.arange(30))
        values, _ = extractor.prepare_scan(wave, tr)
        wanted = np.sin(2 * np.pi * 0.02 * np.arange(len(values))[:, None] * 2 + np.arange(30))
        correlation = [np.corrcoef(values[:, r], wanted[:, r])[0, 1] for r in range(30)]
        assert min(correlation) > 0.999


def test_missing_and_constant_regions_are_masked_and_the_rest_is_untouched(extractor, scan):
    whole = extractor(scan, tr=2.5).input_values
    broken = scan.copy()
    broken[5, 2] = np.nan
    broken[:, 7] = 1000.1
    broken[:, 9] = 0.0
    for tr in (2.0, 2.5):
        out = extractor(broken, tr=tr)
        assert (~out.region_mask[0]).nonzero().flatten().tolist() == [2, 7, 9]
        assert not out.input_values[:, :, [2, 7, 9]].any()
        assert torch.isfinite(out.input_values).all()
    kept = [r for r in range(30) if r not in (2, 7, 9)]
    np.testing.assert_array_equal(out.input_values[:, :, kept], whole[:, :, kept])


def test_regions_in_another_order_are_reordered_by_label(extractor, scan, coordinates):
    shuffled = np.random.default_rng(3).permutation(30)
    out = extractor(
        scan[:, shuffled],
        tr=2.0,
        region_labels=[LABELS[r] for r in shuffled],
        region_coordinates=coordinates[shuffled],
        atlas="test30",
    )
    assert torch.equal(out.input_values, extractor(scan, tr=2.0).input_values)
    free = AVQFeatureExtractor(window_length=40, patch_length=10, region_labels=LABELS)
    out = free(
        scan[:, shuffled],
        tr=2.0,
        region_labels=[LABELS[r] for r in shuffled],
        region_coordinates=coordinates[shuffled],
    )
    np.testing.assert_allclose(out.region_coordinates[0], coordinates, atol=1e-5)


def test_an_extractor_without_an_atlas_takes_any(scan, coordinates):
    free = AVQFeatureExtractor(window_length=40, patch_length=10)
    assert free(scan[:, :11], tr=2.0).input_values.shape == (3, 40, 11)
    assert "region_coordinates" not in free(scan, tr=2.0)
    assert free(scan, tr=2.0, region_coordinates=coordinates).region_coordinates.shape == (1, 30, 3)
    with pytest.raises(
        TokenizationError, match="scan 1: expected 30 regions as in the scan before"
    ):
        free([scan, scan[:, :11]], tr=2.0)


def test_another_atlas_needs_an_extractor_of_its_own(extractor, scan, coordinates):
    other = extractor.for_atlas("test11", LABELS[:11], coordinates[:11])
    out = other(scan[:, :11], tr=2.0, atlas="test11")
    assert out.input_values.shape == (3, 40, 11)
    assert (other.window_length, other.patch_length) == (40, 10)


def test_padding_keeps_every_sample(extractor, scan):
    out = extractor(scan, tr=2.0, remainder="pad", return_tensors="np")
    values, _ = extractor.prepare_scan(scan, 2.0)
    assert out["time_mask"].sum(axis=1).tolist() == [40, 40, 40, 10]
    np.testing.assert_array_equal(out["input_values"][out["time_mask"]], values)
    assert not out["input_values"][~out["time_mask"]].any()
    short = extractor(scan[:25], tr=2.0, remainder="pad")
    assert short.time_mask.sum(dim=1).tolist() == [25]
    assert extractor(scan[:80], tr=2.0, remainder="pad").num_windows.tolist() == [2]


def test_windows_start_where_they_are_asked_to(extractor, scan):
    values, _ = extractor.prepare_scan(scan, 2.0)
    out = extractor(scan, tr=2.0, window_starts=[90, 0, 7], return_tensors="np")
    for window, start in zip(out["input_values"], (90, 0, 7), strict=True):
        np.testing.assert_array_equal(window, values[start : start + 40])
    out = extractor([scan, scan], tr=2.0, window_starts=[[0], [5, 6]])
    assert out.num_windows.tolist() == [1, 2]


def test_settings_survive_saving(extractor, scan, tmp_path):
    extractor.save_pretrained(tmp_path)
    again = AVQFeatureExtractor.from_pretrained(tmp_path)
    auto = AutoFeatureExtractor.from_pretrained(tmp_path, trust_remote_code=True)
    for loaded in (again, auto):
        assert loaded.region_labels == LABELS
        assert loaded.region_coordinates == extractor.region_coordinates
        assert (loaded.atlas, loaded.sampling_interval) == ("test30", 2.0)
        out = loaded(scan, tr=2.5)
        assert torch.equal(out.input_values, extractor(scan, tr=2.5).input_values)


def test_population_scaling_uses_the_training_scans_and_is_saved(extractor, scan, tmp_path):
    rng = np.random.default_rng(5)
    training = [1000 + rng.normal(size=(130, 30)) * 20 + rng.normal(size=30) for _ in range(6)]
    training[0][:, 4] = np.nan
    training[1][3, 8] += 1e5  # robust: one spike changes nothing
    extractor.fit_scaling(training, tr=2.0)
    assert extractor.scaling == "population"
    pooled = np.concatenate(training)[:, 0]
    assert extractor.scaling_center[0] == pytest.approx(np.median(pooled))
    np.testing.assert_allclose(extractor.scaling_scale, 20, rtol=0.15)
    extractor.save_pretrained(tmp_path)
    assert "scaling_center" in json.loads((tmp_path / "preprocessor_config.json").read_text())
    again = AVQFeatureExtractor.from_pretrained(tmp_path)
    values, _ = again.prepare_scan(scan, 2.0)
    wanted = (scan - np.array(extractor.scaling_center)) / np.array(extractor.scaling_scale)
    np.testing.assert_allclose(values, wanted, atol=1e-4)
    with pytest.raises(TokenizationError, match="population statistics belong to atlas 'test30'"):
        again.for_atlas("other", LABELS[:2], [[0, 0, 0], [1, 1, 1]])


def test_a_failed_fit_changes_nothing(extractor, scan):
    empty = scan.copy()
    empty[:, 4] = np.nan
    with pytest.raises(TokenizationError, match=r"region 4 \(R04\) has no signal in any of the 2"):
        extractor.fit_scaling([empty, empty], tr=2.0)
    assert (extractor.scaling, extractor.scaling_center) == ("zscore", None)


def test_a_spike_is_reported_with_its_place(extractor, scan):
    scan[17, 3] = 1e7
    with pytest.warns(UserWarning, match=r"sample 17 of region 3 \(R03\) lies more than 10000"):
        extractor(scan, tr=2.0)


def _with(scan: np.ndarray, place: object, value: float) -> np.ndarray:
    changed = scan.astype(np.float64)
    changed[place] = value
    return changed


WRONG_ORDER = [LABELS[1], LABELS[0], *LABELS[2:]]
OTHER_REGION = [*LABELS[:3], "Heschl_L", *LABELS[4:]]

# name: (change of the scan, arguments, parts of the message)
BAD_INPUTS = {
    "tr missing": (lambda x: x, {}, ["tr is missing", "seconds", "RepetitionTime"]),
    "tr zero": (lambda x: x, {"tr": 0}, ["tr must lie between 0.05 and 20 s, found 0"]),
    "tr negative": (lambda x: x, {"tr": -2.0}, ["found -2"]),
    "tr in milliseconds": (lambda x: x, {"tr": 2000}, ["2000 looks like milliseconds", "tr=2"]),
    "tr NaN": (lambda x: x, {"tr": float("nan")}, ["tr must lie between", "nan"]),
    "tr as text": (lambda x: x, {"tr": "2.0"}, ["tr must be a number of seconds, found '2.0'"]),
    "tr for two scans": (lambda x: x, {"tr": [2.0, 2.0]}, ["one tr per scan, found 2 for 1"]),
    "other tr": (lambda x: x, {"tr": 2.5, "resample": False}, ["tr of 2 s", "found 2.5 s"]),
    "one region less": (lambda x: x[:, :29], {"tr": 2}, ["30 regions of atlas 'test30'", "29"]),
    "background column": (
        lambda x: np.hstack([x[:, :1], x]),
        {"tr": 2, "region_labels": ["background", *LABELS]},
        ["30 regions of atlas 'test30'", "31 labels", "not in the atlas: background"],
    ),
    "a region of another atlas": (
        lambda x: x,
        {"tr": 2, "region_labels": OTHER_REGION},
        [
            "not in the atlas: Heschl_L",
            "missing: R03",
            "column 3: expected 'R03', found 'Heschl_L'",
        ],
    ),
    "other order, coordinates only": (
        lambda x: x,
        {"tr": 2, "region_coordinates": "reversed"},
        ["expected region 0 (R00) at", "another order", "region_labels"],
    ),
    "labels twice": (
        lambda x: x,
        {"tr": 2, "region_labels": [LABELS[0], *LABELS[:29]]},
        ["'R00' twice (columns 0 and 1)"],
    ),
    "other atlas": (
        lambda x: x,
        {"tr": 2, "atlas": "cc200"},
        ["expected regions of atlas 'test30', found atlas 'cc200'", "for_atlas('cc200'"],
    ),
    "transposed": (lambda x: x.T, {"tr": 2}, ["(30, 130)", "(regions, time)", "transposed"]),
    "transposed with labels": (
        lambda x: x.T,
        {"tr": 2, "region_labels": LABELS},
        ["found 30 for an array (30, 130)", "transposed"],
    ),
    "square without labels": (
        lambda x: x[:30],
        {"tr": 2},
        ["square array (30, 30)", "cannot be told apart", "region_labels"],
    ),
    "too short for a window": (
        lambda x: x[:39],
        {"tr": 2},
        ["one window of 40 samples (80 s)", "found 39 samples at 2 s (78 s)", "remainder='pad'"],
    ),
    "too short after resampling": (lambda x: x[:39], {"tr": 1.5}, ["found 29 samples at 2 s"]),
    "too short for a patch": (
        lambda x: x[:9],
        {"tr": 2, "remainder": "pad"},
        ["one patch of 10 samples (20 s)", "found 9 samples of 2 s (18 s)"],
    ),
    "all NaN": (lambda x: x * np.nan, {"tr": 2}, ["at most 10 %", "found 30 of 30", "0 (R00)"]),
    "a NaN volume": (lambda x: _with(x, 5, np.nan), {"tr": 2}, ["found 30 of 30 with NaN"]),
    "four constant regions": (
        lambda x: _with(x, (slice(None), slice(0, 4)), 5.0),
        {"tr": 2.5},
        ["found 4 of 30", "0 (R00), 1 (R01), 2 (R02), 3 (R03)"],
    ),
    "Inf": (lambda x: _with(x, (7, 3), np.inf), {"tr": 2}, ["inf at sample 7, region 3 (R03)"]),
    "-Inf": (lambda x: _with(x, (7, 3), -np.inf), {"tr": 2}, ["-inf at sample 7"]),
    "1e30": (lambda x: _with(x, (7, 3), 1e30), {"tr": 2}, ["1e+30 at sample 7", "damaged"]),
    "text": (lambda x: x.astype(str), {"tr": 2}, ["real numbers", "<U"]),
    "objects": (lambda x: x.astype(object), {"tr": 2}, ["real numbers", "object"]),
    "complex": (lambda x: x + 1j, {"tr": 2}, ["real numbers", "complex"]),
    "booleans": (lambda x: x > 1000, {"tr": 2}, ["real numbers", "bool"]),
    "3-D": (lambda x: x[None], {"tr": 2}, ["(1, 130, 30)", "as a list of (time, regions)"]),
    "1-D": (lambda x: x[:, 0], {"tr": 2}, ["(time, regions), found shape (130,)"]),
    "no samples": (lambda x: x[:0], {"tr": 2}, ["found shape (0, 30)"]),
    "no regions": (lambda x: x[:, :0], {"tr": 2}, ["found shape (130, 0)"]),
    "no scans": (lambda x: [], {"tr": 2}, ["at least one scan, found an empty list"]),
    "remainder": (lambda x: x, {"tr": 2, "remainder": "wrap"}, ["'drop' or 'pad', found 'wrap'"]),
    "window beyond the end": (
        lambda x: x,
        {"tr": 2, "window_starts": [0, 91]},
        ["must lie in 0..90", "found 91"],
    ),
    "window before the start": (lambda x: x, {"tr": 2, "window_starts": [-1]}, ["found -1"]),
    "half a sample": (lambda x: x, {"tr": 2, "window_starts": [0.5]}, ["must be integers"]),
    "starts of two scans": (
        lambda x: x,
        {"tr": 2, "window_starts": [[0], [1]]},
        ["one list of window_starts per scan, found 2 for 1"],
    ),
    "coordinates in metres": (
        lambda x: x,
        {"tr": 2, "region_coordinates": "huge"},
        ["mm in MNI space", "in row 0"],
    ),
    "coordinates without z": (
        lambda x: x,
        {"tr": 2, "region_coordinates": "flat"},
        ["(regions, 3), found (30, 2)"],
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused_with_a_reason(extractor, scan, coordinates, name):
    change, arguments, parts = BAD_INPUTS[name]
    places = {"reversed": coordinates[::-1], "huge": coordinates * 1e3, "flat": coordinates[:, :2]}
    given = arguments.get("region_coordinates")
    if given is not None:
        arguments = {**arguments, "region_coordinates": places[given]}
    with pytest.raises(TokenizationError) as error:
        extractor(change(scan), **arguments)
    for part in parts:
        assert part in str(error.value)


def test_the_message_names_the_scan_of_a_batch(extractor, scan):
    with pytest.raises(TokenizationError, match=r"^scan 2: at most 10 %"):
        extractor([scan, scan, scan * np.nan], tr=2.0)
    with pytest.raises(TokenizationError, match=r"^sub-07: tr is missing"):
        extractor.prepare_scan(scan, None, where="sub-07: ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_length": 0}, "window_length must be a positive integer, found 0"),
        ({"patch_length": 2.5}, "patch_length must be a positive integer, found 2.5"),
        ({"window_length": 70}, "multiple of patch_length, found 70 and 20.*window_length=60"),
        ({"sampling_interval": 2000}, "sampling_interval 2000 looks like milliseconds"),
        ({"sampling_interval": -1.0}, "sampling_interval must lie between"),
        ({"scaling": "minmax"}, "'zscore' or 'population', found 'minmax'"),
        ({"region_labels": ["a", "a"]}, "'a' twice"),
        ({"region_labels": ["a", "b"], "region_coordinates": [[0, 0, 0]]}, "labels has 2.*has 1"),
        ({"band_pass": 0.1}, r"two frequencies in Hz, \[low, high\], .* found 0.1"),
        ({"band_pass": [0.1, 0.01]}, r"0 < low < high < 0.25 Hz.*found \[0.1, 0.01\]"),
        ({"band_pass": [0, 0.1]}, r"0 < low < high < 0.25 Hz.*every 2 s; found \[0.0, 0.1\]"),
        ({"band_pass": [0.01, 0.3]}, r"0 < low < high < 0.25 Hz.*found \[0.01, 0.3\]"),
        ({"windw_length": 80}, "no setting 'windw_length'; did you mean 'window_length'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(TokenizationError, match=message):
        AVQFeatureExtractor(**settings)


def test_population_scaling_without_statistics_is_refused(scan):
    with pytest.raises(TokenizationError, match="call fit_scaling"):
        AVQFeatureExtractor(scaling="population")(scan, tr=2.0)


def test_three_hundred_volumes_of_two_hundred_regions_take_milliseconds():
    scan = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    fast = AVQFeatureExtractor()
    fast(scan, tr=2.5)  # builds the resampling matrix, once per (length, tr)
    seconds = []
    for _ in range(9):
        start = time.process_time()
        fast(scan, tr=2.5)
        seconds.append(time.process_time() - start)
    assert np.median(seconds) < 0.1


@pytest.mark.data
def test_real_scans_of_every_repetition_time():
    root = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("CORTEXICON_DATA", root)) / "abide1_cc200"
    if not folder.is_dir():
        pytest.skip(f"needs the cohort in {folder} (set CORTEXICON_DATA)")
    pd = pytest.importorskip("pandas")
    pq = pytest.importorskip("pyarrow.parquet")
    people = pd.read_csv(folder / "participants.tsv", sep="\t", na_values=["n/a"])
    people = people[people.recommended].groupby("tr").head(2).set_index("participant_id")
    table = pq.read_table(
        folder / "timeseries" / "bold.parquet",
        filters=[("participant_id", "in", list(people.index))],
    ).to_pandas()
    regions = pd.read_csv(folder / "regions.tsv", sep="\t")
    extractor = AVQFeatureExtractor(
        atlas="cc200", region_labels=regions.name, region_coordinates=regions[["x", "y", "z"]]
    )
    assert people.tr.nunique() >= 5
    for subject, rows in table.groupby("participant_id", observed=True):
        scan = rows.iloc[:, 2:].to_numpy("float32")
        tr = people.tr[subject]
        out = extractor(scan, tr=tr, region_labels=regions.name, atlas="cc200")
        assert out.num_windows.item() == int(len(scan) * tr / 2 + 1e-6) // 80
        assert torch.isfinite(out.input_values).all()
        assert out.region_mask.float().mean() >= 0.9
        # Resampling must not change who is connected with whom.
        raw = np.corrcoef(
            scan[:, ::4].T + 1e-6 * np.random.default_rng(0).normal(size=(50, len(scan)))
        )
        values, mask = extractor.prepare_scan(scan, tr, region_labels=regions.name)
        kept = mask[::4]
        new = np.corrcoef(values[:, ::4][:, kept].T)
        upper = np.triu_indices(kept.sum(), 1)
        assert np.corrcoef(raw[np.ix_(kept, kept)][upper], new[upper])[0, 1] > 0.93
