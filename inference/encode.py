"""A cohort in, codes out: scans stream through the codec, a few at a time."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cortexicon.cohorts import Cohort, CohortError, ParcelSeries
from cortexicon.modeling import AVQModel
from cortexicon.tokenization import AVQFeatureExtractor, TokenizationError

from .errors import InferenceError

logger = logging.getLogger(__name__)


class ScanCodes(NamedTuple):
    """Codes of one scan.

    Attributes
    ----------
    subject_id, session, site : str
    codes : numpy.ndarray of int64, shape (windows, tokens)
    """

    subject_id: str
    session: str
    site: str
    codes: np.ndarray


class ScanReconstruction(NamedTuple):
    """One scan before and after the codec, its windows joined in time.

    Attributes
    ----------
    subject_id, session, site : str
    raw, reconstruction : numpy.ndarray of float32, shape (time, regions), z-score units
        What entered the encoder, and what the decoder made of the codes.
    region_mask : numpy.ndarray of bool, shape (regions,)
        False for regions without usable signal.
    codes : numpy.ndarray of int64, shape (windows, tokens)
    """

    subject_id: str
    session: str
    site: str
    raw: np.ndarray
    reconstruction: np.ndarray
    region_mask: np.ndarray
    codes: np.ndarray


class SkippedScan(NamedTuple):
    """A scan that could not be encoded, and why."""

    subject_id: str
    reason: str


class _Prepared(NamedTuple):
    """One scan after the feature extractor."""

    series: ParcelSeries
    values: torch.Tensor  # (windows, time, regions)
    region_mask: torch.Tensor  # (windows, regions)
    time_mask: torch.Tensor  # (windows, time)
    coordinates: torch.Tensor  # (1, regions, 3)


def encode_cohort(
    model: AVQModel,
    feature_extractor: AVQFeatureExtractor,
    cohort: Cohort,
    subject_ids: list[str] | None = None,
    batch_size: int = 32,
    skipped: list[SkippedScan] | None = None,
    progress: bool = True,
) -> Iterator[ScanCodes]:
    """Yield the codes of every scan, in the order of the cohort.

    Parameters
    ----------
    model : AVQModel
        Used in evaluation mode, so that its codebook is read and never updated.
    feature_extractor : AVQFeatureExtractor
        The one saved with the model.
    cohort : Cohort
    subject_ids : list of str, optional
        Default: all of the cohort.
    batch_size : int
        Windows per forward pass; also bounds what is held in memory.
    skipped : list, optional
        Receives a `SkippedScan` for every scan that is too short or unusable. They are logged by
        name at the end in any case.
    progress : bool
        Show a progress bar over scans.

    Raises
    ------
    InferenceError
        No scan at all could be encoded; the first reason is given.
    """
    for scans in _scan_groups(
        feature_extractor, cohort, subject_ids, batch_size, skipped, progress
    ):
        codes = [encode_windows(model, scan, batch_size) for scan in _merge(scans)]
        for scan, scan_codes in zip(scans, _split(scans, codes), strict=True):
            series = scan.series
            yield ScanCodes(series.subject_id, series.session, series.site, scan_codes)


def reconstruct_cohort(
    model: AVQModel,
    feature_extractor: AVQFeatureExtractor,
    cohort: Cohort,
    subject_ids: list[str] | None = None,
    batch_size: int = 32,
    skipped: list[SkippedScan] | None = None,
    progress: bool = True,
) -> Iterator[ScanReconstruction]:
    """Yield every scan with its reconstruction, decode(encode(x)); arguments as `encode_cohort`."""
    for scans in _scan_groups(
        feature_extractor, cohort, subject_ids, batch_size, skipped, progress
    ):
        codes = [encode_windows(model, scan, batch_size) for scan in _merge(scans)]
        for scan, scan_codes in zip(scans, _split(scans, codes), strict=True):
            decoded = decode_windows(model, scan_codes, scan.coordinates, batch_size)
            kept = scan.time_mask.numpy()  # (windows, time); all True unless windows are padded
            yield ScanReconstruction(
                scan.series.subject_id,
                scan.series.session,
                scan.series.site,
                scan.values.numpy()[kept],
                decoded[kept],
                scan.region_mask[0].numpy(),
                scan_codes,
            )


def cohort_windows(
    feature_extractor: AVQFeatureExtractor,
    cohort: Cohort,
    subject_ids: list[str] | None = None,
    progress: bool = True,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (subject_id, windows float32 (windows, time, regions)) as the codec would read them.

    For baselines that must see exactly what the codec sees; scans left out are logged by name.
    """
    for scans in _scan_groups(feature_extractor, cohort, subject_ids, 1, None, progress):
        for scan in scans:
            yield scan.series.subject_id, scan.values.numpy()


def encode_windows(model: AVQModel, scan: _Prepared, batch_size: int) -> np.ndarray:
    """Codes int64 (windows, tokens) of prepared windows, `batch_size` windows at a time."""
    device = next(model.parameters()).device
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(scan.values), batch_size):
            rows = slice(start, start + batch_size)
            output = model.encode(
                scan.values[rows].to(device),
                region_coordinates=scan.coordinates.to(device),
                region_mask=scan.region_mask[rows].to(device),
                time_mask=scan.time_mask[rows].to(device),
                codes_only=True,
            )
            parts.append(output.codes.cpu().numpy())
    return np.concatenate(parts)


def decode_windows(
    model: AVQModel,
    codes: np.ndarray,
    region_coordinates: torch.Tensor,
    batch_size: int = 32,
    code_coordinates: torch.Tensor | None = None,
) -> np.ndarray:
    """Series float32 (windows, time, regions), z-score units, of codes int64 (windows, tokens).

    `region_coordinates` is float32 (1, regions, 3) in mm, MNI: where to decode. `code_coordinates`,
    of the same kind, are the regions that were encoded, where those are others: codes of the grid
    layout belong to regions.
    """
    device = next(model.parameters()).device
    coordinates = region_coordinates.to(device)
    source = None if code_coordinates is None else code_coordinates.to(device)
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(codes), batch_size):
            rows = torch.from_numpy(np.ascontiguousarray(codes[start : start + batch_size]))
            output = model.decode(rows.long().to(device), coordinates, source)
            parts.append(output.reconstruction.float().cpu().numpy())
    return np.concatenate(parts)


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, the former mode after it."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _scan_groups(
    feature_extractor: AVQFeatureExtractor,
    cohort: Cohort,
    subject_ids: list[str] | None,
    batch_size: int,
    skipped: list[SkippedScan] | None,
    progress: bool,
) -> Iterator[list[_Prepared]]:
    """Groups of prepared scans with at least `batch_size` windows each, but for the last."""
    if batch_size < 1:
        raise InferenceError(f"expected batch_size of at least 1, found {batch_size}.")
    chosen = cohort if subject_ids is None else cohort.subset(subject_ids)
    bad: list[SkippedScan] = []
    group: list[_Prepared] = []
    good = 0
    for series in tqdm(chosen, total=len(chosen), unit="scan", disable=not progress):
        try:
            scan = _prepare(feature_extractor, series)
        except (CohortError, TokenizationError) as error:
            bad.append(SkippedScan(series.subject_id, str(error)))
            continue
        group.append(scan)
        good += 1
        if sum(len(item.values) for item in group) >= batch_size:
            yield group
            group = []
    if group:
        yield group
    if skipped is not None:
        skipped.extend(bad)
    if not good:
        reason = f"The first: {bad[0].reason}" if bad else "The cohort holds no scan."
        raise InferenceError(f"none of {len(chosen)} scans could be encoded. {reason}")
    if bad:
        names = "\n".join(f"  {scan.subject_id}: {scan.reason}" for scan in bad)
        logger.warning("%d of %d scans were left out:\n%s", len(bad), len(chosen), names)


def _prepare(feature_extractor: AVQFeatureExtractor, series: ParcelSeries) -> _Prepared:
    """Check one scan and cut it into windows."""
    series.validate()
    features: Any = feature_extractor(
        series.values,
        tr=series.tr,
        region_labels=series.labels,
        region_coordinates=series.coordinates,
        atlas=series.atlas,
        return_tensors="pt",
    )
    return _Prepared(
        series,
        features["input_values"],
        features["region_mask"].bool(),
        features["time_mask"].bool(),
        features["region_coordinates"].float(),
    )


def _merge(scans: list[_Prepared]) -> list[_Prepared]:
    """One virtual scan of all windows; separate ones where the regions differ between scans."""
    first = scans[0]
    if any(not torch.equal(scan.coordinates, first.coordinates) for scan in scans):
        return scans
    return [
        _Prepared(
            first.series,
            torch.cat([scan.values for scan in scans]),
            torch.cat([scan.region_mask for scan in scans]),
            torch.cat([scan.time_mask for scan in scans]),
            first.coordinates,
        )
    ]


def _split(scans: list[_Prepared], codes: list[np.ndarray]) -> list[np.ndarray]:
    """Undo `_merge` for the codes: one array (windows, tokens) per scan."""
    if len(codes) == len(scans):
        return codes
    ends = np.cumsum([len(scan.values) for scan in scans])[:-1]
    return np.split(codes[0], ends)
