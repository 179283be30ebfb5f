"""From one parcellation to another: a codec's decoder against interpolation and against ridge.

The same scans exist in two atlases, *source* and *target*. A codec encodes the source regions and
decodes its codes at the target's coordinates. Two plain ways of getting there stand beside it:
weights that depend on the distance between centres (kernel, width and one gain chosen on training
scans), and a linear map between all regions, fitted by ridge on training scans with its penalty
chosen on validation scans. Both start from the source series, which no codec can afford, and, on
equal footing, from the series that the codec decodes at the source; each is fitted on what it is
applied to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .errors import EvaluationError
from .paired_r2 import PairedR2

#: Widths (SD) of the Gaussian kernel, mm, and powers of inverse distance that are tried.
GAUSSIAN_WIDTHS_MM = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 20.0, 30.0)
INVERSE_POWERS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
#: Ridge penalties, as shares of the mean eigenvalue of the source's second moments.
PENALTIES = tuple(10.0**exponent for exponent in np.arange(-4.0, 2.25, 0.5))

CROSSED = "codes of the source, decoded at the target"
DIRECT = "codes of the target, decoded at the target"
DECODED_INTERPOLATED = "codes of the source, decoded there, interpolated"
DECODED_RIDGE = "codes of the source, decoded there, ridge map"
RAW_INTERPOLATED = "series of the source, interpolated"
RAW_RIDGE = "series of the source, ridge map"


class ScanPair(NamedTuple):
    """One scan in both atlases, its windows joined in time.

    Attributes
    ----------
    subject_id : str
    source, target : float32, (time, source regions) and (time, target regions)
        The z-scored series; sample by sample the same moments.
    decoded : float32, (time, source regions)
        What the codec decodes at the source from its codes.
    source_mask, target_mask : bool, (source regions,) and (target regions,)
        False for regions without a signal.
    """

    subject_id: str
    source: np.ndarray
    target: np.ndarray
    decoded: np.ndarray
    source_mask: np.ndarray
    target_mask: np.ndarray


class PairMoments:
    """Second moments of source and target series, summed over scans: all that a fit needs.

    A target region without a signal counts for nothing in that scan; a source region without one is
    0 there, the mean of a z-scored series.
    """

    def __init__(self, num_source: int, num_target: int) -> None:
        self.gram = np.zeros((num_source, num_source))
        self.cross = np.zeros((num_source, num_target))
        self.power = np.zeros(num_target)
        self.missing: dict[int, np.ndarray] = {}  # target region -> gram of scans without it

    def add(self, source: np.ndarray, target: np.ndarray, target_mask: np.ndarray) -> None:
        """Take in one scan, (time, source regions) and (time, target regions)."""
        values = np.asarray(source, np.float64)
        wanted = np.where(target_mask, target, 0.0).astype(np.float64)
        gram = values.T @ values
        self.gram += gram
        self.cross += values.T @ wanted
        self.power += (wanted**2).sum(axis=0)
        for region in np.flatnonzero(~np.asarray(target_mask, bool)):
            self.missing[int(region)] = self.missing.get(int(region), 0.0) + gram

    def gram_of(self, region: int) -> np.ndarray:
        """Second moments of the source over the scans that have a target region."""
        return self.gram - self.missing[region] if region in self.missing else self.gram

    def predicted_power(self, weights: np.ndarray) -> np.ndarray:
        """Sum of squares of each target region's prediction, (target regions,)."""
        power = (weights * (self.gram @ weights)).sum(axis=0)
        for region, gram in self.missing.items():
            power[region] -= weights[:, region] @ gram @ weights[:, region]
        return power

    def r2(self, weights: np.ndarray) -> float:
        """R2, around 0, of predicting target = source @ weights; (source, target regions)."""
        error = self.power - 2 * (weights * self.cross).sum(axis=0) + self.predicted_power(weights)
        return float(1.0 - error.sum() / self.power.sum())


class Interpolation(NamedTuple):
    """A kernel of the distance between centres, chosen on training scans.

    Attributes
    ----------
    kernel : {"gaussian", "inverse distance"}
    parameter : float
        Width in mm, or power.
    gain : float
        One factor for all regions: an average varies less than what it is an average of.
    training_r2 : float
    """

    kernel: str
    parameter: float
    gain: float
    training_r2: float


class RidgeMap(NamedTuple):
    """A linear map between all regions.

    Attributes
    ----------
    penalty : float
        As a share of the mean eigenvalue of the source's second moments.
    weights : float64, (source regions, target regions)
    validation_r2 : float
    """

    penalty: float
    weights: np.ndarray
    validation_r2: float


def interpolation_weights(
    source: np.ndarray,
    target: np.ndarray,
    kernel: str,
    parameter: float,
    source_mask: np.ndarray | None = None,
) -> np.ndarray:
    """Weights of the source regions for every target region, each column summing to 1.

    Parameters
    ----------
    source, target : float, (regions, 3)
        Centres, mm.
    kernel : {"gaussian", "inverse distance"}
    parameter : float
        SD in mm, or power of the distance.
    source_mask : bool, (source regions,), optional
        Regions without a signal get no weight, and the others make up for it.

    Returns
    -------
    float64, (source regions, target regions)
    """
    distance = np.linalg.norm(
        np.asarray(source, np.float64)[:, None] - np.asarray(target, np.float64), axis=2
    )
    if kernel == "gaussian":
        score = -(distance**2) / (2 * parameter**2)
    else:
        score = -parameter * np.log(np.maximum(distance, 0.1))
    if source_mask is not None:
        score[~np.asarray(source_mask, bool)] = -np.inf
    weights = np.exp(score - score.max(axis=0))
    return weights / weights.sum(axis=0)


def fit_interpolation(
    moments: PairMoments, source: np.ndarray, target: np.ndarray
) -> Interpolation:
    """The kernel, parameter and gain with the highest R2 on the scans of `moments`."""
    tried = [("gaussian", width) for width in GAUSSIAN_WIDTHS_MM]
    tried += [("inverse distance", power) for power in INVERSE_POWERS]
    found = []
    for kernel, parameter in tried:
        weights = interpolation_weights(source, target, kernel, parameter)
        gain = float((weights * moments.cross).sum() / moments.predicted_power(weights).sum())
        found.append(Interpolation(kernel, parameter, gain, moments.r2(gain * weights)))
    return max(found, key=lambda fit: fit.training_r2)


def fit_ridge(training: PairMoments, validation: PairMoments) -> RidgeMap:
    """Least squares with a penalty on the weights, the penalty with the highest validation R2."""
    scale = np.trace(training.gram) / len(training.gram)
    weights = np.empty((len(PENALTIES), *training.cross.shape))
    complete = [region for region in range(len(training.power)) if region not in training.missing]
    for regions in [complete, *([region] for region in training.missing)]:
        if not regions:
            continue
        values, vectors = np.linalg.eigh(training.gram_of(regions[0]))
        rotated = vectors.T @ training.cross[:, regions]
        for row, penalty in enumerate(PENALTIES):
            weights[row][:, regions] = vectors @ (rotated / (values + penalty * scale)[:, None])
    scores = [validation.r2(one) for one in weights]
    best = int(np.argmax(scores))
    return RidgeMap(PENALTIES[best], weights[best], scores[best])


class CrossAtlas:
    """Fits the plain ways on training and validation scans, then scores all ways on test scans.

    Parameters
    ----------
    source_coordinates, target_coordinates : float, (regions, 3)
        Centres, mm, MNI.
    """

    def __init__(self, source_coordinates: np.ndarray, target_coordinates: np.ndarray) -> None:
        self.source_coordinates = np.asarray(source_coordinates, np.float64)
        self.target_coordinates = np.asarray(target_coordinates, np.float64)
        self.scores, self.at_source = PairedR2(), PairedR2()

    def fit(self, training: Iterable[ScanPair], validation: Iterable[ScanPair]) -> None:
        """Choose kernel and gain on training scans, and ridge's penalty on validation scans.

        Raises
        ------
        EvaluationError
            A part without a scan, or arrays that do not fit.
        """
        raw, decoded = zip(
            self._moments(training, "training"),
            self._moments(validation, "validation"),
            strict=True,
        )
        places = self.source_coordinates, self.target_coordinates
        self.raw_interpolation = fit_interpolation(raw[0], *places)
        self.decoded_interpolation = fit_interpolation(decoded[0], *places)
        self.raw_ridge, self.decoded_ridge = fit_ridge(*raw), fit_ridge(*decoded)

    def add(self, pair: ScanPair, crossed: np.ndarray, direct: np.ndarray) -> None:
        """Score one test scan.

        Parameters
        ----------
        pair : ScanPair
        crossed, direct : float32, (time, target regions)
            Decoded at the target from the codes of the source, and from the target's own codes.
        """
        self._check(pair)
        predictions = {
            CROSSED: crossed,
            DECODED_INTERPOLATED: self._interpolated(pair.decoded, self.decoded_interpolation),
            DECODED_RIDGE: pair.decoded @ self.decoded_ridge.weights,
            RAW_INTERPOLATED: self._interpolated(
                pair.source, self.raw_interpolation, pair.source_mask
            ),
            RAW_RIDGE: pair.source @ self.raw_ridge.weights,
            DIRECT: direct,
        }
        for system, predicted in predictions.items():
            self.scores.add(system, pair.subject_id, pair.target, predicted, pair.target_mask)
        self.at_source.add("source", pair.subject_id, pair.source, pair.decoded, pair.source_mask)

    def results(self) -> dict[str, Any]:
        """Rows of all systems, what was fitted, and the codec's lead over each plain way.

        Returns
        -------
        dict
            `systems` (see `PairedR2.results`), `differences` of the codec's decoding at the target
            from every other way, `fits`, `num_subjects`, and `source_r2`: what the same codes give
            at the source regions.
        """
        fits = {
            RAW_INTERPOLATED: self.raw_interpolation._asdict(),
            DECODED_INTERPOLATED: self.decoded_interpolation._asdict(),
        }
        for system, ridge in ((RAW_RIDGE, self.raw_ridge), (DECODED_RIDGE, self.decoded_ridge)):
            fits[system] = {"penalty": ridge.penalty, "validation_r2": ridge.validation_r2}
        others = [system for system in self.scores.sums if system != CROSSED]
        return {
            "systems": self.scores.results(),
            "differences": [self.scores.difference(CROSSED, other) for other in others],
            "fits": fits,
            "num_subjects": len(self.scores.subject_ids),
            "source_r2": self.at_source.r2("source"),
        }

    def _moments(self, scans: Iterable[ScanPair], part: str) -> tuple[PairMoments, PairMoments]:
        """Moments of the raw and of the decoded source series."""
        sizes = len(self.source_coordinates), len(self.target_coordinates)
        raw, decoded = PairMoments(*sizes), PairMoments(*sizes)
        for pair in scans:
            self._check(pair)
            raw.add(pair.source, pair.target, pair.target_mask)
            decoded.add(pair.decoded, pair.target, pair.target_mask)
        if not raw.power.any():
            raise EvaluationError(
                f"No {part} scan is in both cohorts; expected some to fit interpolation and ridge."
            )
        return raw, decoded

    def _check(self, pair: ScanPair) -> None:
        time, source = len(pair.target), len(self.source_coordinates)
        target = len(self.target_coordinates)
        shapes = pair.source.shape, pair.decoded.shape, pair.target.shape
        if shapes != ((time, source), (time, source), (time, target)):
            raise EvaluationError(
                f"Subject {pair.subject_id}: expected source, decoded and target of shapes "
                f"({time}, {source}), ({time}, {source}), ({time}, {target}), found {shapes}."
            )

    def _interpolated(
        self, values: np.ndarray, fit: Interpolation, mask: np.ndarray | None = None
    ) -> np.ndarray:
        weights = interpolation_weights(
            self.source_coordinates, self.target_coordinates, fit.kernel, fit.parameter, mask
        )
        return values @ (fit.gain * weights)
