"""Scores a codec scan by scan: R2, connectivity kept, spectrum, codebook usage, bits.

A streaming accumulator, because a cohort's decoded series need not fit into memory. It reads plain
arrays, so that any codec, ours or a baseline, is scored by the same lines. Connectivity needs a
pass over training scans as well: only the deviation from the training mean says something about
the person, since the group's mean matrix alone already correlates highly with every single one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from .connectivity import RunningMean
from .errors import EvaluationError
from .scores import (
    bootstrap_interval,
    code_usage,
    fisher_z,
    interval_of,
    pearson,
    r2_from_sums,
    squared_error_sums,
    valid_regions,
)

EXAMPLE_SCANS = 4


class ReconstructedScan(Protocol):
    """What the accumulator reads of a scan.

    Attributes
    ----------
    subject_id : str
    raw, reconstruction : float32, (time, regions)
        Z-scored windows one after the other, and the same decoded from codes.
    region_mask : bool, (regions,)
    codes : int64, (windows, tokens)
    """

    # Properties, so that a NamedTuple, whose fields cannot be set, is one too.
    @property
    def subject_id(self) -> str: ...
    @property
    def raw(self) -> np.ndarray: ...
    @property
    def reconstruction(self) -> np.ndarray: ...
    @property
    def region_mask(self) -> np.ndarray: ...
    @property
    def codes(self) -> np.ndarray: ...


class ReconstructionScores:
    """Accumulates scans and answers with every reconstruction score.

    Parameters
    ----------
    num_codes : int
        Size K of the codebook; a token carries log2(K) bits.
    window_seconds : float
        Length of one window in seconds.
    tokens_per_window : int
    """

    def __init__(self, num_codes: int, window_seconds: float, tokens_per_window: int) -> None:
        if num_codes < 1 or window_seconds <= 0 or tokens_per_window < 1:
            raise EvaluationError(
                "num_codes, window_seconds and tokens_per_window must be positive; found "
                f"{num_codes}, {window_seconds}, {tokens_per_window}."
            )
        self.num_codes = num_codes
        self.window_seconds = window_seconds
        self.tokens_per_window = tokens_per_window
        self.training_raw, self.training_decoded = RunningMean(), RunningMean()
        self.num_training = 0
        self.subject_ids: list[str] = []
        self.sse: list[np.ndarray] = []
        self.sst: list[np.ndarray] = []
        self.raw_z: list[np.ndarray] = []
        self.decoded_z: list[np.ndarray] = []
        self.raw_power: list[np.ndarray] = []
        self.decoded_power: list[np.ndarray] = []
        self.spectrum_error: list[float] = []
        self.frequencies: np.ndarray = np.empty(0)
        self.counts = np.zeros(num_codes, np.int64)
        self.num_windows = 0
        self.examples: list[ReconstructedScan] = []

    def add_training(self, scan: ReconstructedScan) -> None:
        """Take a training scan into the mean matrices (raw and decoded); it is not scored."""
        valid = valid_regions(scan.raw, scan.region_mask)
        self.training_raw.add(fisher_z(scan.raw, valid))
        self.training_decoded.add(fisher_z(scan.reconstruction, valid))
        self.num_training += 1

    def add(self, scan: ReconstructedScan) -> None:
        """Score one held-out scan.

        Raises
        ------
        EvaluationError
            If shapes disagree, values are not finite, a code lies outside the codebook, or the
            subject was added before.
        """
        where = f"Subject {scan.subject_id}"
        if scan.subject_id in self.subject_ids:
            raise EvaluationError(
                f"{where} was scored already; pass every held-out subject exactly once."
            )
        codes = np.asarray(scan.codes)
        if codes.ndim != 2 or codes.shape[1] != self.tokens_per_window or not len(codes):
            raise EvaluationError(
                f"{where}: codes must have shape (windows, {self.tokens_per_window}) with at least "
                f"one window; found {codes.shape}."
            )
        if codes.min() < 0 or codes.max() >= self.num_codes:
            raise EvaluationError(
                f"{where}: codes must lie in 0..{self.num_codes - 1}; found "
                f"{codes.min()}..{codes.max()}."
            )
        if len(scan.raw) % len(codes):
            raise EvaluationError(
                f"{where}: {len(scan.raw)} samples do not divide into {len(codes)} windows."
            )
        try:
            sse, sst = squared_error_sums(scan.raw, scan.reconstruction, scan.region_mask)
        except EvaluationError as error:
            raise EvaluationError(f"{where}: {error}") from error
        valid = np.isfinite(sst)
        if not valid.any():
            raise EvaluationError(f"{where}: no region with a signal; leave the scan out.")
        self.subject_ids.append(str(scan.subject_id))
        self.sse.append(sse)
        self.sst.append(sst)
        self.raw_z.append(fisher_z(scan.raw, valid))
        self.decoded_z.append(fisher_z(scan.reconstruction, valid))
        self._add_spectrum(scan, valid, len(codes))
        self.counts += np.bincount(codes.ravel().astype(np.int64), minlength=self.num_codes)
        self.num_windows += len(codes)
        if len(self.examples) < EXAMPLE_SCANS:
            self.examples.append(scan)

    def _add_spectrum(self, scan: ReconstructedScan, valid: np.ndarray, num_windows: int) -> None:
        """Mean periodogram over a scan's windows, and its error in decibel."""
        powers = []
        for values in (scan.raw, scan.reconstruction):
            windows = np.asarray(values, np.float64)[:, valid].reshape(
                num_windows, -1, int(valid.sum())
            )
            transform = np.fft.rfft(windows - windows.mean(axis=1, keepdims=True), axis=1)
            # (frequencies without zero, regions)
            powers.append((np.abs(transform[:, 1:]) ** 2).mean(axis=0) / windows.shape[1])
        length = len(scan.raw) // num_windows
        self.frequencies = np.fft.rfftfreq(length, self.window_seconds / length)[1:]
        # A decoder may erase a frequency altogether; -60 dB is as silent as it is counted.
        floor = 1e-6 * powers[0].mean()
        ratio = np.maximum(powers[1], floor) / np.maximum(powers[0], floor)
        self.spectrum_error.append(float(np.abs(10.0 * np.log10(ratio)).mean()))
        self.raw_power.append(powers[0].mean(axis=1))
        self.decoded_power.append(powers[1].mean(axis=1))

    def results(
        self,
        num_resamples: int = 1000,
        seed: int = 0,
        groups: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """All scores as plain numbers and lists.

        Parameters
        ----------
        num_resamples, seed : int
            Of the bootstrap.
        groups : mapping, optional
            Subject id -> name of a group (such as "TR 2 s"); R2 is pooled within each as well.

        Returns
        -------
        dict
            `r2` pooled over scans and regions, with `r2_interval` (bootstrap over subjects);
            `r2_by_group` {group: {"r2", "r2_interval", "num_subjects"}} with `groups`;
            `r2_per_subject` {id: R2}; `r2_per_region` list; `connectivity` (median over scans of
            the correlation with the raw matrix, for the full matrix, for the deviation from the
            training mean, and for the training mean alone); `spectrum_error_db`; `power_kept`;
            `codebook`; `tokens_per_window`, `bits_per_token`, `bits_per_second`.

        Raises
        ------
        EvaluationError
            If no scan was added.
        """
        if not self.subject_ids:
            raise EvaluationError(
                "No held-out scan was scored; expected at least one. Check that the split's part "
                "is not empty and that its scans are at least one window long."
            )
        sse, sst = np.array(self.sse), np.array(self.sst)  # (scans, regions)
        scan_sse, scan_sst = np.nansum(sse, axis=1), np.nansum(sst, axis=1)

        def pooled(rows: np.ndarray) -> float:
            return float(r2_from_sums(scan_sse[rows].sum(), scan_sst[rows].sum()))

        region_sst = np.where(np.isfinite(sst).any(axis=0), np.nansum(sst, axis=0), np.nan)
        per_region = r2_from_sums(np.nansum(sse, axis=0), region_sst)
        per_subject = r2_from_sums(scan_sse, scan_sst)
        raw_power, decoded_power = np.array(self.raw_power), np.array(self.decoded_power)
        bits = float(np.log2(self.num_codes))
        by_group: dict[str, Any] = {}
        named = np.array([str((groups or {}).get(name, "")) for name in self.subject_ids])
        for group in sorted(set(named) - {""}):
            rows = np.flatnonzero(named == group)
            interval = interval_of(pooled, (rows,), num_resamples, seed)
            by_group[group] = {
                "r2": pooled(rows),
                "r2_interval": interval,
                "num_subjects": len(rows),
            }
        return {
            "r2": pooled(np.arange(len(sse))),
            **({"r2_by_group": by_group} if by_group else {}),
            "r2_interval": list(bootstrap_interval(pooled, len(sse), num_resamples, seed)),
            "num_subjects": len(sse),
            "num_windows": self.num_windows,
            "r2_per_subject": dict(zip(self.subject_ids, per_subject.tolist(), strict=True)),
            "r2_per_region": per_region.tolist(),
            "connectivity": self._connectivity(num_resamples, seed),
            "spectrum_error_db": float(np.median(self.spectrum_error)),
            "power_kept": float(decoded_power.sum() / raw_power.sum()),
            "codebook": code_usage(self.counts),
            "tokens_per_window": self.tokens_per_window,
            "window_seconds": float(self.window_seconds),
            "bits_per_token": bits,
            "bits_per_second": bits * self.tokens_per_window / float(self.window_seconds),
        }

    def _connectivity(self, num_resamples: int, seed: int) -> dict[str, Any]:
        full = [pearson(a, b) for a, b in zip(self.raw_z, self.decoded_z, strict=True)]
        result: dict[str, Any] = {"num_training_scans": self.num_training}
        columns = {"full": full}
        if self.num_training:
            raw_mean, decoded_mean = self.training_raw.mean(), self.training_decoded.mean()
            columns["deviation"] = [
                pearson(a - raw_mean, b - decoded_mean)
                for a, b in zip(self.raw_z, self.decoded_z, strict=True)
            ]
            columns["training_mean_alone"] = [pearson(a, raw_mean) for a in self.raw_z]
        for name, values in columns.items():
            known = np.array(values)[np.isfinite(values)]
            result[name] = float(np.median(known)) if len(known) else float("nan")
            result[f"{name}_interval"] = interval_of(np.median, (known,), num_resamples, seed)
        return result

    def write_examples(self, path: str | Path, regions: pd.DataFrame) -> Path:
        """Write what the report's pictures need of single scans to a compressed `.npz`.

        Parameters
        ----------
        path : path
            Its folder is made if need be.
        regions : DataFrame
            One row per region with `label`, `x`, `y`, `z` (mm, MNI), and `hemisphere` or `network`.

        Notes
        -----
        The file holds `subject_ids` (scans,), `raw_i` and `reconstruction_i` (time, regions)
        float16 and `codes_i` (windows, tokens) for scan i, `region_mask` (scans, regions),
        `labels`, `networks`, `hemispheres` (regions,), `coordinates` (regions, 3),
        `raw_connectivity` and `decoded_connectivity` (pairs,) averaged over all held-out
        scans, `r2_per_region` (regions,), `code_counts` (K,), `frequencies` in Hz with
        `raw_power` and `decoded_power` (frequencies,), and `seconds_per_sample`.
        """
        if len(regions) != self.sse[0].shape[0]:
            raise EvaluationError(
                f"The table of regions has {len(regions)} rows; the scans have "
                f"{self.sse[0].shape[0]} regions. Pass the table of the cohort that was scored."
            )
        means = []
        for vectors in (self.raw_z, self.decoded_z):
            mean = RunningMean()
            for vector in vectors:
                mean.add(vector)
            means.append(mean.mean())
        arrays: dict[str, np.ndarray] = {
            "subject_ids": np.array([str(scan.subject_id) for scan in self.examples]),
            "region_mask": np.array([scan.region_mask for scan in self.examples], bool),
            "labels": regions["label"].astype(str).to_numpy(str),
            "coordinates": regions[["x", "y", "z"]].to_numpy(np.float32),
            "networks": _text_column(regions, "network"),
            "hemispheres": _text_column(regions, "hemisphere"),
            "raw_connectivity": means[0].astype(np.float32),
            "decoded_connectivity": means[1].astype(np.float32),
            "r2_per_region": np.array(self.results(num_resamples=0)["r2_per_region"]),
            "code_counts": self.counts,
            "frequencies": self.frequencies,
            "raw_power": np.mean(self.raw_power, axis=0),
            "decoded_power": np.mean(self.decoded_power, axis=0),
        }
        for i, scan in enumerate(self.examples):
            arrays[f"raw_{i}"] = np.asarray(scan.raw, np.float16)
            arrays[f"reconstruction_{i}"] = np.asarray(scan.reconstruction, np.float16)
            arrays[f"codes_{i}"] = np.asarray(scan.codes, np.int32)
        first = self.examples[0]
        arrays["seconds_per_sample"] = np.array(
            self.window_seconds * len(first.codes) / len(first.raw)
        )
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp.npz")
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
        return path


def _text_column(regions: pd.DataFrame, name: str) -> np.ndarray:
    """A column as strings, empty where it or a value is absent."""
    if name not in regions:
        return np.full(len(regions), "", dtype="<U1")
    return regions[name].astype(object).where(regions[name].notna(), "").astype(str).to_numpy(str)


def evaluate_reconstruction(
    items_train: Iterable[ReconstructedScan],
    items_test: Iterable[ReconstructedScan],
    num_codes: int,
    window_seconds: float,
    tokens_per_window: int,
    regions: pd.DataFrame,
    items_test_sites: Iterable[ReconstructedScan] = (),
    examples_path: str | Path | None = None,
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Score a codec on held-out scans, and on scans of sites it never saw.

    Parameters
    ----------
    items_train : iterable of ReconstructedScan
        Training scans for the mean matrices; a few hundred suffice, none leaves the deviation out.
    items_test : iterable of ReconstructedScan
        Held-out scans.
    num_codes, window_seconds, tokens_per_window
        See `ReconstructionScores`.
    regions : DataFrame
        The cohort's table of regions.
    items_test_sites : iterable of ReconstructedScan
        Scans of held-out sites; scored apart, under the key `test_sites`.
    examples_path : path, optional
        Where to write the examples for the report.
    groups : mapping, optional
        Subject id -> group, for R2 within groups of subjects (see `ReconstructionScores.results`).

    Returns
    -------
    dict
        `ReconstructionScores.results()` of the held-out scans, with `region_labels`, and
        `test_sites` holding the same for those (absent without such scans).
    """
    scores = ReconstructionScores(num_codes, window_seconds, tokens_per_window)
    for scan in items_train:
        scores.add_training(scan)
    for scan in items_test:
        scores.add(scan)
    result = scores.results(groups=groups)
    result["region_labels"] = regions["label"].astype(str).tolist()
    if examples_path is not None:
        scores.write_examples(examples_path, regions)

    unseen = ReconstructionScores(num_codes, window_seconds, tokens_per_window)
    unseen.training_raw, unseen.training_decoded = scores.training_raw, scores.training_decoded
    unseen.num_training = scores.num_training
    for scan in items_test_sites:
        unseen.add(scan)
    if unseen.subject_ids:
        result["test_sites"] = unseen.results(groups=groups)
    return result
