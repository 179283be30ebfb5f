"""The table of reconstructions: which rows, kept rows, the share of the gap, text and figure."""

import json

import numpy as np
import pytest

from cortexicon.evaluation import EvaluationError, gaussian_reference, reconstruction_table
from cortexicon.evaluation.json_files import json_safe
from cortexicon.evaluation.rate_distortion import rate_distortion_r2, separable_spectrum
from cortexicon.evaluation.reconstruction_table import (
    PlainTokenizer,
    counterpart,
    plain_rows,
    section,
    share_of_gap,
    standard_tokenizers,
    table_markdown,
)
from cortexicon.evaluation.rendering_rate import draw_rate_distortion, render_rate_distortion

GRID = PlainTokenizer("grid", 20, 24, 64)
LATENT = PlainTokenizer("latent", 20, 8, 64)


@pytest.fixture(scope="module")
def parts():
    """Training and held-out windows: 80 samples of 6 smooth regions."""
    generator = np.random.default_rng(0)
    scans = []
    for number in range(12):
        noise = generator.normal(size=(3, 89, 6))
        smooth = sum(noise[:, shift : shift + 80] for shift in range(10)) / np.sqrt(10)
        scans.append((f"s{number}", smooth.astype(np.float32)))
    return scans[:9], scans[9:]


@pytest.fixture(scope="module")
def plain(parts, tmp_path_factory):
    return plain_rows([LATENT, GRID], *parts, 160.0, tmp_path_factory.mktemp("rows"))


def codec_row(**changed):
    """What a command knows of a checkpoint before it is compared with anything."""
    return {
        "system": "runs/ours",
        "layout": "latent",
        "r2": 0.3,
        "r2_interval": [0.25, 0.35],
        "tokens_per_window": 8,
        "window_seconds": 160.0,
        "bits_per_second": 8 * 6 / 160,
        "num_subjects": 3,
        "num_windows": 9,
        "connectivity": {"full": 0.7, "deviation": 0.5},
        "codebook": {"usage": 0.9, "num_codes": 64},
        "cost": {"parameters": 1_500_000, "training_seconds": 600.4, "windows_per_second": 99.6},
        **changed,
    }


def test_rows_of_the_published_table_and_of_smaller_parcellations():
    tokens = [row.tokens_per_window for row in standard_tokenizers(80, 200)]
    assert tokens == [128, 256, 512, 800, 1600]
    assert [row.layout for row in standard_tokenizers(80, 40)] == ["latent", "grid", "grid"]
    assert standard_tokenizers(50, 200) == [PlainTokenizer("grid", 10, 1000)]


def test_a_codec_stands_beside_the_same_number_of_tokens():
    assert counterpart("latent", 128, 8192, 80, 200) == PlainTokenizer("latent", 20, 128)
    assert counterpart("grid", 800, 8192, 80, 200) == PlainTokenizer("grid", 20, 800)
    assert counterpart("grid", 1600, 512, 80, 200) == PlainTokenizer("grid", 10, 1600, 512)
    assert counterpart("latent", 128, 8192, 80, 30) is None  # 32 components of 30 regions
    assert counterpart("latent", 126, 8192, 80, 200) is None
    assert counterpart("grid", 700, 8192, 80, 200) is None


def test_water_is_filled_by_hand():
    variances = np.array([4.0, 1.0])
    assert rate_distortion_r2(variances, 0.0) == pytest.approx(0.0)
    assert rate_distortion_r2(variances, 0.5) == pytest.approx(1 - (2 + 1) / 5)
    assert rate_distortion_r2(variances, 1.0) == pytest.approx(1 - (1 + 1) / 5)
    assert rate_distortion_r2(variances, 2.0) == pytest.approx(1 - (0.5 + 0.5) / 5)
    with pytest.raises(EvaluationError, match="must not be negative; found -1"):
        rate_distortion_r2(variances, -1.0)


def test_the_reference_of_any_window_rises_and_flattens_with_the_bits(parts):
    for length in (10, 40, 80):
        windows = [w[:, :length] for _, w in parts[0]]
        variances = separable_spectrum(windows)
        curve = [rate_distortion_r2(variances, bits) for bits in range(0, 200, 20)]
        assert curve[0] == pytest.approx(0.0, abs=1e-12)
        assert (np.diff(curve) > 0).all()
        assert (np.diff(curve, 2) < 0).all()
        assert curve[3] == pytest.approx(gaussian_reference(windows, 60.0))


def test_rows_are_kept_and_computed_again_only_for_other_inputs(parts, tmp_path, monkeypatch):
    fitted = []
    real = reconstruction_table._fit
    monkeypatch.setattr(
        reconstruction_table,
        "_fit",
        lambda plain, *rest: fitted.append(plain) or real(plain, *rest),
    )
    first = plain_rows([GRID], *parts, 160.0, tmp_path)
    assert fitted == [GRID]
    assert plain_rows([GRID], *parts, 160.0, tmp_path) == first
    assert fitted == [GRID]
    plain_rows([GRID._replace(num_codes=32)], *parts, 160.0, tmp_path)
    changed = [(name, windows * 1.01) for name, windows in parts[0]]
    plain_rows([GRID], changed, parts[1], 160.0, tmp_path)
    assert len(fitted) == len(list(tmp_path.glob("*.json"))) == 3
    saved = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert all(set(row["r2_per_subject"]) == {"s9", "s10", "s11"} for row in saved)


def test_an_interrupted_table_keeps_what_was_finished(parts, tmp_path, monkeypatch):
    real = reconstruction_table._fit

    def stop_at_grid(plain, *rest):
        if plain.layout == "grid":
            raise KeyboardInterrupt
        return real(plain, *rest)

    monkeypatch.setattr(reconstruction_table, "_fit", stop_at_grid)
    with pytest.raises(KeyboardInterrupt):
        plain_rows([LATENT, GRID], *parts, 160.0, tmp_path)
    monkeypatch.setattr(
        reconstruction_table,
        "_fit",
        lambda plain, *rest: pytest.fail("again") if plain == LATENT else real(plain, *rest),
    )
    assert list(plain_rows([LATENT, GRID], *parts, 160.0, tmp_path)) == [LATENT, GRID]


def test_the_share_of_the_gap():
    assert share_of_gap(0.5, 0.4, 0.6) == pytest.approx(0.5)
    assert share_of_gap(0.3, 0.4, 0.6) == pytest.approx(-0.5)
    assert share_of_gap(0.5, 0.6, 0.6) is None


def test_a_codec_is_measured_between_its_plain_row_and_the_reference(parts, plain):
    alone = codec_row(system="runs/alone", tokens_per_window=9, bits_per_second=9 * 6 / 160)
    found = section("unfiltered", parts[0], plain, [(LATENT, codec_row()), (None, alone)], 160.0)
    assert [row["tokens_per_window"] for row in found["rows"]] == [8, 8, 9, 24]
    below, ours, without, _ = found["rows"]
    assert (below["learned"], ours["learned"]) == (False, True)
    reference = gaussian_reference([w for _, w in parts[0]], 8 * 6)
    assert ours["gaussian_reference_r2"] == pytest.approx(reference)
    assert below["gaussian_reference_r2"] == pytest.approx(reference)
    assert ours["plain_r2"] == below["r2"]
    assert ours["share_of_gap"] == pytest.approx((0.3 - below["r2"]) / (reference - below["r2"]))
    assert "share_of_gap" not in without
    curve = found["gaussian_curve"]
    spent = [row["bits_per_second"] for row in found["rows"]]
    assert curve["bits_per_second"][0] < min(spent)
    assert curve["bits_per_second"][-1] > max(spent)
    at = np.interp(below["bits_per_second"], curve["bits_per_second"], curve["r2"])
    assert at == pytest.approx(reference, abs=0.01)


def test_the_table_for_people(parts, plain):
    rows = [(LATENT, codec_row(split="another", r2_interval=[float("nan")] * 2))]
    part = section("band-pass 0.01-0.1 Hz", parts[0], plain, rows, 160.0)
    text = table_markdown(json_safe({"sections": [part], "notes": ["\\* Another split."]}))
    lines = text.splitlines()
    assert lines[0] == "### Band-pass 0.01-0.1 Hz: 3 held-out scans, 9 windows of 160 s"
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    (ours,) = [line for line in lines if "runs/ours" in line]
    assert ours.startswith("| **runs/ours** * | 8 | 0.3 | 0.300 | ")
    assert "1.50 M parameters, 600 s training, encodes 100 windows / s" in ours
    share = 100 * part["rows"][1]["share_of_gap"]
    assert f"| {share:.0f} % ".replace("-", "−") in ours
    (pca,) = [line for line in lines if line.startswith("| spatial PCA 2 + k-means, patch 20")]
    assert " | – | " in pca
    assert "nan" not in text
    assert text.endswith("\\* Another split.\n")


def test_the_figure_shows_every_row_and_the_reference(parts, plain, tmp_path):
    sections = [
        section(name, parts[0], plain, [(LATENT, codec_row())], 160.0) for name in ("a", "b")
    ]
    table = json_safe({"sections": sections})
    axes = draw_rate_distortion(table).axes
    assert len(axes) == 2
    labels = axes[0].get_legend_handles_labels()[1]
    assert labels == [
        "Gaussian reference",
        "spatial PCA + k-means",
        "AVQ, latent layout",
        "k-means on region patches",
    ]
    (codec,) = [lines for lines in axes[0].containers if lines.get_label() == "AVQ, latent layout"]
    np.testing.assert_allclose(codec.lines[0].get_xydata(), [[0.3, 0.3]])
    path = render_rate_distortion(table, tmp_path / "deep" / "figure.png")
    assert path.read_bytes().startswith(b"\x89PNG")
