"""A scan as an image: what stands where, the same bytes always, and what is refused."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from cortexicon.evaluation import EvaluationError, render_scan
from cortexicon.evaluation.scan_images import KINDS, PALETTES, networks_of, region_order

SCRIPT = """
import hashlib, numpy as np
from cortexicon.evaluation import render_scan
g = np.random.default_rng(3)
values, places = g.normal(size=(50, 17)).astype("float32"), g.uniform(-60, 60, (17, 3))
image = render_scan(values, places, ["b", "a", None] * 5 + ["a", "b"], size=(61, 83))
print(hashlib.sha256(image.tobytes()).hexdigest())
"""


@pytest.fixture
def scan():
    generator = np.random.default_rng(0)
    return generator.normal(size=(40, 6)), generator.uniform(-60, 60, (6, 3))


def test_another_process_draws_the_same_bytes(repository):
    generator = np.random.default_rng(3)
    values = generator.normal(size=(50, 17)).astype("float32")
    places = generator.uniform(-60, 60, (17, 3))
    here = render_scan(values, places, ["b", "a", None] * 5 + ["a", "b"], size=(61, 83))
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
        env={"OMP_NUM_THREADS": "2", "PATH": ""},
    ).stdout.strip()
    assert hashlib.sha256(here.tobytes()).hexdigest() == there


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("palette", PALETTES)
def test_every_kind_has_the_size_asked_for(scan, kind, palette):
    image = render_scan(*scan, kind=kind, palette=palette, size=(30, 50))
    assert image.shape == (30, 50, 3)
    assert image.dtype == np.uint8
    assert (len(np.unique(image.reshape(-1, 3), axis=0)) == 1) == (kind == "blank")


def test_regions_stand_by_network_then_hemisphere_then_back_to_front():
    places = np.array([[5, 0, 0], [-5, 9, 0], [-5, -9, 0], [-5, 0, 0], [5, 0, 0.0]])
    order = region_order(places, ["Visual", "Default", "Default", None, "Default"])
    assert order.tolist() == [2, 1, 4, 0, 3]


def test_a_carpet_at_its_own_size_shows_the_values(scan):
    values, places = scan
    image = render_scan(values, places, kind="carpet", size=(6, 40))
    z = ((values - values.mean(0)) / values.std(0))[:, region_order(places)].T
    expected = np.floor((np.clip(z / 2.5, -1, 1) + 1) * 128).clip(0, 255)
    np.testing.assert_allclose(image[:, :, 0], expected, atol=1)


def test_a_matrix_is_symmetric_and_white_on_its_diagonal(scan):
    image = render_scan(*scan, kind="connectivity", size=(6, 6))[:, :, 0].astype(int)
    np.testing.assert_array_equal(image, image.T)
    assert (np.diag(image) == 255).all()
    order = region_order(scan[1])
    expected = np.corrcoef(scan[0].T)[np.ix_(order, order)]
    np.testing.assert_allclose(image / 128 - 1, expected, atol=0.01)


def test_shrinking_averages_and_growing_repeats(scan):
    values, places = scan
    big = render_scan(values, places, kind="connectivity", size=(12, 12)).astype(int)
    small = render_scan(values, places, kind="connectivity", size=(6, 6)).astype(int)
    np.testing.assert_array_equal(big[::2, ::2], small)
    tiny = render_scan(values, places, kind="connectivity", size=(3, 3)).astype(float)
    blocks = small.reshape(3, 2, 3, 2, 3).mean((1, 3))
    np.testing.assert_allclose(tiny, blocks, atol=1.01)


def test_unit_and_later_samples_change_nothing(scan):
    values, places = scan
    first = render_scan(values, places, num_samples=30)
    longer = np.r_[values[:30] * 1000 + 7, values[:9] * 50]
    np.testing.assert_array_equal(first, render_scan(longer, places, num_samples=30))


def test_a_region_without_a_signal_is_drawn_as_zero(scan):
    values, places = scan
    values[:, 2] = np.nan
    values[:, 4] = 3.5
    image = render_scan(values, places, kind="carpet", size=(6, 40))
    rows = [int(np.flatnonzero(region_order(places) == region)[0]) for region in (2, 4)]
    assert (image[rows] == 128).all()


def test_a_blank_image_says_nothing_about_the_scan(scan):
    values, places = scan
    np.testing.assert_array_equal(
        render_scan(values, places, kind="blank"), render_scan(values[:9] * 3, places, kind="blank")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "movie"}, "kind of carpet"),
        ({"palette": "jet"}, "found 'both', 'jet'"),
        ({"size": (0, 10)}, "size of at least"),
        ({"size": (10, 5)}, "size of at least"),
        ({"num_samples": 41}, "found 40"),
        ({"networks": ["a"]}, "each of 6 regions"),
        ({"coordinates": np.zeros((5, 3))}, r"\(regions, 3\)"),
        ({"values": np.zeros(6)}, r"values \(time, regions\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(scan, change, message):
    arguments = {"values": scan[0], "coordinates": scan[1], **change}
    with pytest.raises(EvaluationError, match=message):
        render_scan(**arguments)


def test_networks_are_found_in_the_regions_table(regions):
    assert networks_of(regions)[0] == "Visual"
    assert networks_of(regions.rename(columns={"network": "yeo7"}))[-1] == "Default"
    assert networks_of(regions[["label"]]) is None
