"""`cortexicon reconstruction` on a tiny codec, and its numbers on the real cohort."""

import json

import numpy as np
import pytest

from cortexicon._reconstruction import Signal, _scored
from cortexicon.cli import main
from cortexicon.cohorts import Split, load_cohort, make_split, save_cohort
from cortexicon.evaluation import gaussian_reference
from cortexicon.evaluation.patch_kmeans import tokenizer_baseline
from cortexicon.inference import cohort_windows, load_checkpoint
from cortexicon.tokenization import AVQFeatureExtractor


@pytest.fixture
def folders(checkpoint_folder, cohort, tmp_path):
    """A cohort folder, a split, and two checkpoints: unfiltered, and of a pass band."""
    save_cohort(cohort, tmp_path / "cohort")
    parts = {"train": ["a", "c"], "validation": ["b"], "test": ["e", "f"]}
    split = Split("holdout", [parts], cohort.content_hash)
    split.save(tmp_path / "split.json")
    checkpoint = load_checkpoint(checkpoint_folder)
    extractor = checkpoint.processor.feature_extractor
    checkpoint.processor.feature_extractor = AVQFeatureExtractor(
        **{name: getattr(extractor, name) for name in ("window_length", "patch_length", "atlas")},
        region_labels=extractor.region_labels,
        region_coordinates=extractor.region_coordinates,
        band_pass=[0.01, 0.1],
    )
    checkpoint.codec.save_pretrained(tmp_path / "filtered")
    checkpoint.processor.save_pretrained(tmp_path / "filtered")
    facts = {"stage": "avq", "split_hash": split.hash, "arguments": {"fold": 0}, "seconds": 12.0}
    (tmp_path / "filtered" / "run.json").write_text(json.dumps(facts))
    facts["split_hash"] = "of other people"
    (checkpoint_folder / "run.json").write_text(json.dumps(facts))
    return tmp_path


def table_of(folders, *options):
    out = folders / "out" / "table.json"
    code = main(
        [
            *("reconstruction", f"{folders}/cohort", "--split", f"{folders}/split.json"),
            *("--json", str(out), *options),
        ]
    )
    return code, out


def test_plain_rows_alone_and_the_band_beside_them(folders, capsys):
    markdown = folders / "out" / "table.md"
    code, out = table_of(folders, "--markdown", str(markdown), "--band-pass", "0.02", "0.2")
    assert code == 0
    table = json.loads(out.read_text())
    assert [part["signal"] for part in table["sections"]] == ["unfiltered", "band-pass 0.02-0.2 Hz"]
    for part in table["sections"]:
        # 12 regions cannot supply 32 components; scan c has another TR.
        assert [row["tokens_per_window"] for row in part["rows"]] == [48, 96]
        assert {row["num_subjects"] for row in part["rows"]} == {2}
        assert {row["connectivity"]["num_training_scans"] for row in part["rows"]} == {2}
    unfiltered, filtered = table["sections"]
    assert filtered["rows"][0]["r2"] != unfiltered["rows"][0]["r2"]
    assert markdown.read_text() in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert len(list((out.parent / "rows").glob("*.json"))) == 4


def test_each_checkpoint_stands_beside_plain_rows_of_its_own_windows(folders, capsys):
    code, out = table_of(folders, "--checkpoints", f"{folders}/checkpoint", f"{folders}/filtered")
    assert code == 0
    table = json.loads(out.read_text())
    names = {part["signal"]: part["rows"] for part in table["sections"]}
    # The codecs read windows of 40 samples, the published rows stand for windows of 80.
    assert len(table["sections"]) == 3
    assert [part["rows"][0]["window_seconds"] for part in table["sections"]] == [160.0, 80.0, 80.0]
    codecs = [row for part in table["sections"] for row in part["rows"] if row["learned"]]
    assert [row["split"] for row in codecs] == ["another", "same"]
    assert "it may know these scans" in capsys.readouterr().out
    (ours,) = [row for row in names["band-pass 0.01-0.1 Hz"] if row["learned"]]
    (below,) = [
        row
        for row in names["band-pass 0.01-0.1 Hz"]
        if row["tokens_per_window"] == ours["tokens_per_window"] and not row["learned"]
    ]
    assert below["layout"] == "latent"
    assert ours["plain_r2"] == below["r2"]
    assert ours["share_of_gap"] == pytest.approx(
        (ours["r2"] - below["r2"]) / (ours["gaussian_reference_r2"] - below["r2"])
    )
    assert ours["r2"] != codecs[0]["r2"]
    assert ours["connectivity"]["num_training_scans"] == 2
    assert 0 < ours["codebook"]["usage"] <= 1
    assert ours["cost"]["training_seconds"] == 12.0
    assert ours["cost"]["windows_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--band-pass", "0.1", "0.3"], "0 < low < high < 0.25 Hz"),
        (["--fold", "2"], "--fold in 0..0, found 2"),
        (["--checkpoints", "nowhere"], "expected a checkpoint folder, found nothing"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(folders, capsys, options, message):
    code, out = table_of(folders, *options)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.parent.exists()


def test_a_split_without_scans_of_the_interval_is_refused(folders, cohort, capsys):
    parts = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    Split("holdout", [parts], cohort.content_hash).save(folders / "split.json")
    assert table_of(folders)[0] == 2
    assert "needs scans of TR 2 s in the training and the test part; found 2 and 0" in (
        capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def real_signals(data_folder):
    """The split of the published table, unfiltered and band-passed; skips without the data."""
    cohort = load_cohort(data_folder / "abide1_cc200")
    train, test = _scored(cohort, make_split(cohort, "hash")[0], 2.0)
    atlas = {
        "atlas": cohort.atlas,
        "region_labels": cohort.labels,
        "region_coordinates": cohort.coordinates,
    }
    extractors = [AVQFeatureExtractor(**atlas, band_pass=band) for band in (None, [0.01, 0.1])]
    return [
        Signal(e, *(list(cohort_windows(e, cohort, part, False)) for part in (train, test)))
        for e in extractors
    ]


@pytest.mark.data
@pytest.mark.slow
def test_the_published_table_is_found_again(real_signals):
    unfiltered, filtered = real_signals
    assert len(unfiltered.train) + len(unfiltered.test) == 465
    published = (
        (unfiltered, (0.540, 0.642, 0.753, 0.826, 0.930)),
        (filtered, (0.706, 0.809, 0.907, 0.954, 0.992)),
    )
    tokens = (128, 256, 512, 800, 1600)
    for signal, references in published:
        windows = [w for _, w in signal.train]
        found = [gaussian_reference(windows, 13 * count) for count in tokens]
        np.testing.assert_allclose(found, references, atol=0.01)
    # The same tokenizer, fitted better than it was for the published table, never worse.
    for signal, r2 in ((unfiltered, 0.380), (filtered, 0.588)):
        found = tokenizer_baseline(signal.train, signal.test)
        assert r2 - 0.01 < found["r2"] < r2 + 0.04
        assert found["r2"] < found["gaussian_reference_r2"]
