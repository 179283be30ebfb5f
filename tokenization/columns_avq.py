"""Which region each column of an array is, and whether the model expects it there."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .input_checks_avq import region_name
from .tokenization_errors import TokenizationError

# Coordinates that differ by less than this (mm) name the same region: tables are rounded.
_COORDINATE_TOLERANCE = 1.0
# Farther than this (mm) from the origin of MNI space there is no head.
_LARGEST_COORDINATE = 200.0


class Columns(NamedTuple):
    """What is known about the columns of an array; None: not given."""

    atlas: str | None
    labels: Sequence[str] | None
    coordinates: Any  # array-like (regions, 3), mm MNI


def match_columns(
    shape: tuple[int, ...], expected: Columns, num_expected: int | None, found: Columns, where: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Compare the columns of a (time, regions) array with what the model expects.

    Parameters
    ----------
    shape : (int, int)
        Of the array.
    expected : Columns
        Of the feature extractor.
    num_expected : int, optional
        Number of regions; None for an extractor that takes any atlas.
    found : Columns
        What came with the array.
    where : str
        Put in front of messages.

    Returns
    -------
    order : ndarray int (regions,) or None
        Columns in the expected order; None: they are.
    coordinates : ndarray float64 (regions, 3) or None
        mm MNI, in the expected order; None when nobody knows them.

    Raises
    ------
    TokenizationError
        Another atlas, other regions, another number of them, a transposed array.
    """
    if None not in (found.atlas, expected.atlas) and found.atlas != expected.atlas:
        raise TokenizationError(
            f"{where}expected regions of atlas {expected.atlas!r}, found atlas {found.atlas!r}; "
            f"extract the time series with {expected.atlas!r}, or prepare them with "
            f"feature_extractor.for_atlas({found.atlas!r}, region_labels, region_coordinates)"
        )
    labels = None if found.labels is None else checked_labels(found.labels, where)
    places = None
    if found.coordinates is not None:
        places = checked_coordinates(found.coordinates, where)
    for name, given in (("region_labels", labels), ("region_coordinates", places)):
        if given is not None and len(given) != shape[1]:
            hint = "; the array looks like (regions, time): pass it transposed"
            raise TokenizationError(
                f"{where}expected one of {name} per column, found {len(given)} for an array "
                f"{shape} (time, regions){hint if len(given) == shape[0] else ''}"
            )
    order = _region_order(expected.labels, labels, expected.atlas, where)
    if num_expected is not None:
        named = labels is not None or places is not None
        _check_count(shape, num_expected, expected.atlas, named, where)
    if places is not None and order is not None:
        places = places[order]
    if expected.coordinates is None:
        return order, places
    own_places = np.asarray(expected.coordinates)
    if places is not None:
        _check_same_places(own_places, places, expected.labels, where)
    return order, own_places


def checked_labels(labels: Sequence[str], where: str = "") -> list[str]:
    """Region labels as strings, none of them twice."""
    names = [str(label) for label in labels]
    seen: set[str] = set()
    for column, name in enumerate(names):
        if name in seen:
            raise TokenizationError(
                f"{where}every region needs its own label, found {name!r} twice (columns "
                f"{names.index(name)} and {column})"
            )
        seen.add(name)
    return names


def checked_coordinates(coordinates: Any, where: str = "") -> np.ndarray:
    """Region centres float64 (regions, 3) in mm, finite and inside a head."""
    if isinstance(coordinates, torch.Tensor):
        coordinates = coordinates.detach().cpu().numpy()
    array = np.asarray(coordinates, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 3:
        raise TokenizationError(
            f"{where}expected region_coordinates of shape (regions, 3), found {array.shape}"
        )
    bad = np.flatnonzero(~(np.abs(array) <= _LARGEST_COORDINATE).all(axis=1))
    if len(bad):
        raise TokenizationError(
            f"{where}region_coordinates must be mm in MNI space (at most {_LARGEST_COORDINATE:g} "
            f"from the origin), found {array[bad[0]].tolist()} in row {bad[0]}"
        )
    return array


def _check_count(
    shape: tuple[int, ...], expected: int, atlas: str | None, named: bool, where: str
) -> None:
    """The second axis must be the regions; a transposed or square array is never guessed at.

    `named` says that labels or coordinates came with the columns.
    """
    name = "the atlas" if atlas is None else f"atlas {atlas!r}"
    if shape[1] == expected:
        if shape[0] == expected and not named:
            raise TokenizationError(
                f"{where}expected (time, {expected} regions of {name}), found a square array "
                f"{shape} "
                f"whose axes cannot be told apart; pass region_labels for its columns"
            )
        return
    if shape[0] == expected:
        raise TokenizationError(
            f"{where}expected (time, {expected} regions of {name}), found shape {shape}, which "
            f"looks like (regions, time); pass the transposed array"
        )
    raise TokenizationError(
        f"{where}expected {expected} regions of {name}, found {shape[1]} columns; extract the time "
        f"series with this atlas, without a background column"
    )


def _region_order(
    expected: Sequence[str] | None, labels: Sequence[str] | None, atlas: str | None, where: str
) -> np.ndarray | None:
    """Columns (regions,) that bring `labels` into the order of `expected`; None: already so."""
    if expected is None or labels is None or labels == expected:
        return None
    missing = [label for label in expected if label not in set(labels)]
    extra = [label for label in labels if label not in set(expected)]
    if missing or extra:
        differences = [
            f"column {column}: expected {wanted!r}, found {found!r}"
            for column, (wanted, found) in enumerate(zip(expected, labels, strict=False))
            if wanted != found
        ]
        raise TokenizationError(
            f"{where}expected the {len(expected)} regions of "
            f"{'the model' if atlas is None else f'atlas {atlas!r}'}, found {len(labels)} "
            "labels; not "
            f"in the atlas: {_few(extra)}; missing: {_few(missing)}; first differences: "
            f"{'; '.join(differences[:3]) or 'none'}. Extract the time series with this atlas"
        )
    position = {label: column for column, label in enumerate(labels)}
    return np.asarray([position[label] for label in expected])


def _check_same_places(
    expected: np.ndarray, found: np.ndarray, labels: Sequence[str] | None, where: str
) -> None:
    """Coordinates that come with a scan, in the model's order, must be those of the model."""
    distance = np.sqrt(np.sum((expected - found) ** 2, axis=1))  # (regions,) mm
    bad = np.flatnonzero(distance > _COORDINATE_TOLERANCE)
    if len(bad):
        region = bad[0]
        raise TokenizationError(
            f"{where}expected region {region_name(labels, region)} at "
            f"{np.round(expected[region], 2).tolist()} mm, found "
            f"{np.round(found[region], 2).tolist()} "
            f"({len(bad)} of {len(distance)} regions differ by more than "
            f"{_COORDINATE_TOLERANCE:g} mm); "
            f"the columns have another order or another atlas: pass region_labels, or build the "
            f"feature extractor for that atlas with for_atlas"
        )


def _few(names: list[str]) -> str:
    return (", ".join(names[:3]) + (", ..." if len(names) > 3 else "")) or "none"
