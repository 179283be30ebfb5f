"""What a scan's own check finds and leaves alone."""

import numpy as np
import pytest

from cortexicon.cohorts import CohortError, ParcelSeries


@pytest.fixture
def scan():
    values = np.random.default_rng(0).standard_normal((40, 20)).astype(np.float32)
    coordinates = np.arange(60, dtype=np.float32).reshape(20, 3)
    return ParcelSeries(values, [f"r{i}" for i in range(20)], coordinates, "toy", 2.0, "s1")


def test_healthy_scan(scan):
    health = scan.validate()
    assert health.region_mask.all()
    assert health.region_mask.shape == (20,)
    assert health[1:] == ((), (), ())


def test_up_to_a_tenth_of_the_regions_is_masked_and_named(scan):
    scan.values[:, 4] = 7.0
    scan.values[11, 9] = np.nan
    health = scan.validate()
    assert health.constant_regions == ("r4",)
    assert health.missing_regions == ("r9",)
    assert np.flatnonzero(~health.region_mask).tolist() == [4, 9]
    scan.values[:, 5] = 0.0
    with pytest.raises(CohortError, match=r"found 3 \(2 constant, 1 with NaN\): r4, r5, r9"):
        scan.validate()


def test_infinity_beside_nan_is_found(scan):
    scan.values[3, 9], scan.values[5, 9] = np.nan, -np.inf
    with pytest.raises(CohortError, match="found -inf at time point 5, region r9"):
        scan.validate()


def test_spike_is_a_warning_with_its_place(scan):
    scan.values[17, 6] = 1e5
    health = scan.validate()
    assert health.region_mask.all()
    assert len(health.warnings) == 1
    assert "100000 at time point 17, region r6" in health.warnings[0]


def test_offset_does_not_make_a_region_constant(scan):
    scan.values += 1000.0
    assert scan.validate().region_mask.all()


def test_reorder_moves_values_and_coordinates_together(scan):
    order = scan.labels[::-1]
    moved = scan.reorder(order)
    np.testing.assert_array_equal(moved.values, scan.values[:, ::-1])
    np.testing.assert_array_equal(moved.coordinates, scan.coordinates[::-1])
    with pytest.raises(CohortError, match="Missing: elsewhere; extra: r19"):
        scan.reorder([*scan.labels[:19], "elsewhere"])


def test_transposed_array_with_its_axis_named(scan):
    facts = (scan.labels, scan.coordinates, "toy", 2.0, "s1")
    turned = ParcelSeries.from_array(scan.values.T, *facts, time_axis=1)
    np.testing.assert_array_equal(turned.values, scan.values)
