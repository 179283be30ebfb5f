"""AVQFeatureExtractor: from region time series as they are to the inputs of AVQModel."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin

from .band_pass_avq import SHORTEST_SCAN, band_pass_filter
from .columns_avq import Columns, checked_coordinates, checked_labels, match_columns
from .connectivity_avq import scan_connectivity
from .input_checks_avq import (
    as_series,
    check_magnitude,
    checked_band,
    checked_interval,
    region_name,
    warn_of_outliers,
)
from .resampling_avq import resample as resample_series
from .tokenization_errors import TokenizationError
from .windows_avq import cut_windows, robust_statistics

# Two intervals that differ by less than this (s) are the same: headers are rounded.
_INTERVAL_TOLERANCE = 1e-3
_LARGEST_MASKED_FRACTION = 0.10
# What transformers itself writes into preprocessor_config.json.
_BASE_KEYS = {"feature_extractor_type", "processor_class", "auto_map", "_name_or_path"}


class AVQFeatureExtractor(FeatureExtractionMixin):
    """Check, resample, normalise and cut region time series into the windows AVQModel reads.

    What it does, in this order, to each scan:

    * refuses what cannot be right (see Raises of :meth:`prepare_scan`);
    * brings the regions into the order of `region_labels`, when labels come with the scan;
    * resamples from `tr` to `sampling_interval` with anti-aliasing (resampling_avq.py);
    * masks regions with NaN or without variance (their values become 0), at most 10 % of them;
    * keeps the frequencies of `band_pass` only, if it is given (band_pass_avq.py);
    * z-scores each region over the whole scan (or scales it by stored population statistics);
    * cuts windows of `window_length` samples from sample 0, without overlap.

    Parameters
    ----------
    sampling_interval : float
        Seconds between two samples of the model's input.
    window_length : int
        Samples per window; a multiple of `patch_length`.
    patch_length : int
        Samples per patch, the stretch of time that one group of codes stands for.
    atlas : str, optional
        Name of the parcellation that scans must come from.
    region_labels : list of str, optional
        Labels of the regions in the model's order.
    region_coordinates : array-like, float, shape (regions, 3), optional
        Centres of the regions, mm, MNI.
    scaling : {"zscore", "population"}
        "zscore" needs nothing but the scan. "population" subtracts a median and divides by a
        robust standard deviation per region, both from :meth:`fit_scaling` on training subjects.
    scaling_center, scaling_scale : list of float, shape (regions,), optional
        The statistics of "population"; :meth:`fit_scaling` fills them.
    band_pass : list of float, [low, high], optional
        Edges in Hz of a zero-phase Butterworth band-pass of order 2 over the whole scan.

    Raises
    ------
    TokenizationError
        Settings that are out of range, contradict each other, or are not known.
    """

    model_input_names = ["input_values", "region_coordinates", "region_mask", "time_mask"]  # noqa: RUF012

    def __init__(
        self,
        sampling_interval: float = 2.0,
        window_length: int = 80,
        patch_length: int = 20,
        atlas: str | None = None,
        region_labels: Sequence[str] | None = None,
        region_coordinates: Any = None,
        scaling: str = "zscore",
        scaling_center: Any = None,
        scaling_scale: Any = None,
        band_pass: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        code = AVQFeatureExtractor.__init__.__code__
        own = code.co_varnames[1 : code.co_argcount]
        for key in sorted(set(kwargs) - _BASE_KEYS):
            near = difflib.get_close_matches(key, own, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(own)}"
            raise TokenizationError(f"AVQFeatureExtractor has no setting {key!r}{hint}")
        super().__init__(**kwargs)
        self.sampling_interval = checked_interval("sampling_interval", sampling_interval)
        for name, value in (("window_length", window_length), ("patch_length", patch_length)):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise TokenizationError(f"{name} must be a positive integer, found {value!r}")
        if window_length % patch_length:
            raise TokenizationError(
                f"window_length must be a multiple of patch_length, found {window_length} and "
                f"{patch_length} samples; choose e.g. window_length="
                f"{max(1, window_length // patch_length) * patch_length}"
            )
        self.window_length = int(window_length)
        self.patch_length = int(patch_length)
        self.atlas = atlas
        self.region_labels = None if region_labels is None else checked_labels(region_labels)
        self.region_coordinates = None
        if region_coordinates is not None:
            self.region_coordinates = checked_coordinates(region_coordinates).tolist()
        if scaling not in ("zscore", "population"):
            raise TokenizationError(f"scaling must be 'zscore' or 'population', found {scaling!r}")
        self.scaling = scaling
        self.scaling_center = None if scaling_center is None else list(map(float, scaling_center))
        self.scaling_scale = None if scaling_scale is None else list(map(float, scaling_scale))
        self.band_pass = None
        if band_pass is not None:
            self.band_pass = checked_band(band_pass, self.sampling_interval)
        counts = {
            name: len(getattr(self, name))
            for name in ("region_labels", "region_coordinates", "scaling_center", "scaling_scale")
            if getattr(self, name) is not None
        }
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise TokenizationError(f"settings disagree about the number of regions: {listed}")

    @property
    def num_regions(self) -> int | None:
        """Number of regions of the atlas, or None for an extractor that takes any atlas."""
        for known in (self.region_labels, self.region_coordinates, self.scaling_center):
            if known is not None:
                return len(known)
        return None

    @property
    def _columns(self) -> Columns:
        return Columns(self.atlas, self.region_labels, self.region_coordinates)

    def for_atlas(
        self, atlas: str, region_labels: Sequence[str], region_coordinates: Any
    ) -> "AVQFeatureExtractor":
        """The same preparation for another parcellation (the model knows regions by coordinates).

        Parameters
        ----------
        atlas, region_labels, region_coordinates
            As in the class; all three are needed.

        Raises
        ------
        TokenizationError
            With scaling "population", whose statistics belong to the regions of one atlas.
        """
        if self.scaling == "population":
            raise TokenizationError(
                f"the population statistics belong to atlas {self.atlas!r} and cannot serve "
                f"{atlas!r}; use scaling='zscore', or fit_scaling on scans of {atlas!r}"
            )
        return AVQFeatureExtractor(
            sampling_interval=self.sampling_interval,
            window_length=self.window_length,
            patch_length=self.patch_length,
            atlas=atlas,
            region_labels=region_labels,
            region_coordinates=region_coordinates,
            band_pass=self.band_pass,
        )

    def __call__(
        self,
        fmri: Any,
        tr: float | Sequence[float] | None = None,
        region_labels: Sequence[str] | None = None,
        region_coordinates: Any = None,
        atlas: str | None = None,
        resample: bool = True,
        remainder: str = "drop",
        window_starts: Sequence[int] | Sequence[Sequence[int]] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Prepare one scan or several; the windows of all scans are stacked in scan order.

        Parameters
        ----------
        fmri : array (time, regions), or a list of such arrays
            Raw or preprocessed BOLD, any unit.
        tr : float or list of float
            Repetition time in seconds, one for all scans or one per scan. Required.
        region_labels, region_coordinates, atlas
            What the columns of `fmri` are, the same for all scans of the call; see
            :meth:`prepare_scan`.
        resample : bool
            False: another `tr` than `sampling_interval` is an error.
        remainder : {"drop", "pad"}
            Samples after the last whole window: left out, or one more window, padded with 0.
        window_starts : list of int, or one such list per scan, optional
            Cut windows at these samples (at the sampling interval) instead of from 0 on.
        return_tensors : {"pt", "np", None}
            None gives NumPy arrays, like "np".

        Returns
        -------
        BatchFeature
            input_values float32 (windows, window_length, regions), 0 where masked;
            region_coordinates float32 (1, regions, 3) mm MNI, absent when nobody gave any;
            region_mask bool (windows, regions); time_mask bool (windows, window_length);
            num_windows int64 (scans,).

        Raises
        ------
        TokenizationError
            As :meth:`prepare_scan`; besides, a scan too short for a window and window starts
            outside the scan.
        """
        if remainder not in ("drop", "pad"):
            raise TokenizationError(f"remainder must be 'drop' or 'pad', found {remainder!r}")
        scans = list(fmri) if isinstance(fmri, (list, tuple)) else [fmri]
        if not scans:
            raise TokenizationError("expected at least one scan, found an empty list")
        intervals = _one_per_scan("tr", tr, len(scans))
        starts: list[Any] = [window_starts] * len(scans)
        if window_starts is not None and len(window_starts) and not np.isscalar(window_starts[0]):
            starts = _one_per_scan("list of window_starts", list(window_starts), len(scans))

        windows: list[np.ndarray] = []
        time_masks, region_masks, num_windows = [], [], []
        for index, (scan, interval) in enumerate(zip(scans, intervals, strict=True)):
            where = f"scan {index}: " if len(scans) > 1 else ""
            values, region_mask = self.prepare_scan(
                scan, interval, region_labels, region_coordinates, atlas, resample, where=where
            )
            cut, time_mask = cut_windows(
                values, self.window_length, starts[index], remainder, self.sampling_interval, where
            )
            if windows and cut.shape[2] != windows[0].shape[2]:
                raise TokenizationError(
                    f"{where}expected {windows[0].shape[2]} regions as in the scan before, found "
                    f"{cut.shape[2]}; scans of different atlases need separate calls"
                )
            windows.append(cut)
            time_masks.append(time_mask)
            region_masks.append(np.broadcast_to(region_mask, (len(cut), len(region_mask))))
            num_windows.append(len(cut))

        data = {
            "input_values": np.concatenate(windows),  # (windows, window_length, regions)
            "region_mask": np.concatenate(region_masks),
            "time_mask": np.concatenate(time_masks),
            "num_windows": np.asarray(num_windows, dtype=np.int64),
        }
        given = Columns(atlas, region_labels, region_coordinates)
        _, places = match_columns((0, cut.shape[2]), self._columns, self.num_regions, given, "")
        if places is not None:
            data["region_coordinates"] = places.astype(np.float32)[None]  # (1, regions, 3)
        return BatchFeature(data, tensor_type=return_tensors)

    def prepare_scan(
        self,
        x: Any,
        tr: float | None,
        region_labels: Sequence[str] | None = None,
        region_coordinates: Any = None,
        atlas: str | None = None,
        resample: bool = True,
        where: str = "",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check, order, resample, filter and normalise one whole scan, without cutting windows.

        Parameters
        ----------
        x : array or tensor, real numbers, shape (time, regions)
        tr : float
            Repetition time, seconds.
        region_labels : list of str, optional
            One label per column. In another order than the extractor's: the columns are reordered.
        region_coordinates : array-like (regions, 3), optional
            mm, MNI, one row per column of `x`; compared with the extractor's own, if it has any.
        atlas : str, optional
            Name of the parcellation; compared with the extractor's own.
        resample : bool
            False: another `tr` than `sampling_interval` is an error.
        where : str
            Put in front of every message, e.g. ``"sub-01: "``.

        Returns
        -------
        values : ndarray float32 (time at `sampling_interval`, regions)
            Normalised; 0 in masked regions.
        region_mask : ndarray bool (regions,)
            False for regions with NaN or without variance.

        Raises
        ------
        TokenizationError
            Not a real 2-D array; empty; infinite or absurdly large values; `tr` missing, not
            positive or in milliseconds; another `tr` with ``resample=False``; another atlas; wrong
            number of regions, unknown labels, a transposed array, or a square one without labels;
            more than 10 % of the regions masked; too short for the band-pass.
        """
        columns = Columns(atlas, region_labels, region_coordinates)
        series, region_mask = self._checked_scan(x, tr, columns, resample, where)
        if self.scaling == "population":
            if self.scaling_center is None or self.scaling_scale is None:
                raise TokenizationError(
                    "scaling='population' has no statistics yet; call fit_scaling on training scans"
                )
            mean, deviation = np.asarray(self.scaling_center), np.asarray(self.scaling_scale)
        else:
            mean, deviation = series.mean(axis=0), series.std(axis=0)
        values = (series - mean) / np.where(region_mask, deviation, 1.0)
        warn_of_outliers(values, self.region_labels, where)
        return np.where(region_mask, values, 0.0).astype(np.float32), region_mask

    def connectivity(
        self,
        x: Any,
        region_labels: Sequence[str] | None = None,
        region_coordinates: Any = None,
        atlas: str | None = None,
        where: str = "",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Fisher-z connectivity of a whole scan; see `connectivity_avq.scan_connectivity`.

        Returns
        -------
        matrix : ndarray float32 (regions, regions)
        region_mask : ndarray bool (regions,)
        """
        found = Columns(atlas, region_labels, region_coordinates)
        return scan_connectivity(x, self._columns, self.num_regions, found, where)

    def _checked_scan(
        self, x: Any, tr: float | None, columns: Columns, resample: bool, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """All of :meth:`prepare_scan` but the scaling; float64, masked regions undefined."""
        series = as_series(x, where)
        interval = checked_interval("tr", tr, where)
        order, _ = match_columns(series.shape, self._columns, self.num_regions, columns, where)
        if order is not None:
            series = series[:, order]
        labels = columns.labels if self.region_labels is None else self.region_labels
        same_interval = abs(interval - self.sampling_interval) <= _INTERVAL_TOLERANCE
        if not same_interval and not resample:
            raise TokenizationError(
                f"{where}expected a tr of {self.sampling_interval:g} s, the model's sampling "
                f"interval, found {interval:g} s; leave resample=True to resample the scan"
            )
        check_magnitude(series, labels, where)
        finite = ~np.isnan(series).any(axis=0)  # (regions,)
        series = np.where(finite, series, 0.0)
        needed = self.patch_length * self.sampling_interval
        if len(series) * interval < needed - _INTERVAL_TOLERANCE:
            raise TokenizationError(
                f"{where}expected at least one patch of {self.patch_length} samples "
                f"({needed:g} s), found {len(series)} samples of {interval:g} s "
                f"({len(series) * interval:g} s)"
            )
        if not same_interval:
            series = resample_series(series, interval, self.sampling_interval)
        mean, deviation = series.mean(axis=0), series.std(axis=0)
        # NOTE: not > 0, because a resampled constant varies by rounding.
        least = 1e-6 * np.maximum(np.abs(mean), np.median(deviation))
        region_mask = finite & (deviation > least)
        if self.band_pass is not None:
            if len(series) < SHORTEST_SCAN:
                raise TokenizationError(
                    f"{where}expected at least {SHORTEST_SCAN} samples for the band-pass, found "
                    f"{len(series)}; leave this scan out"
                )
            series = band_pass_filter(series, self.sampling_interval, *self.band_pass)
        masked = np.flatnonzero(~region_mask)
        if len(masked) > _LARGEST_MASKED_FRACTION * len(region_mask):
            names = ", ".join(region_name(labels, column) for column in masked[:5])
            raise TokenizationError(
                f"{where}at most 10 % of the regions may be without signal, found {len(masked)} of "
                f"{len(region_mask)} with NaN or a constant value ({names}"
                f"{', ...' if len(masked) > 5 else ''}); check the mask and the field of view of "
                f"this scan, or leave it out"
            )
        return series, region_mask

    def fit_scaling(
        self,
        scans: Sequence[Any],
        tr: float | Sequence[float],
        region_labels: Sequence[str] | None = None,
        atlas: str | None = None,
    ) -> "AVQFeatureExtractor":
        """Fit the statistics of scaling "population" on training subjects, and switch to it.

        Per region: the median and 1.4826 times the median absolute deviation over all samples of
        all scans in which the region is not masked. They are saved in preprocessor_config.json.

        Parameters
        ----------
        scans : list of arrays (time, regions)
            Training subjects only.
        tr : float or list of float
            Seconds.
        region_labels, atlas
            As in :meth:`prepare_scan`, the same for all scans.

        Raises
        ------
        TokenizationError
            No scans, a bad scan, or a region that is masked in all of them.
        """
        if not len(scans):
            raise TokenizationError("expected training scans, found an empty list")
        intervals = _one_per_scan("tr", tr, len(scans))
        columns = Columns(atlas, region_labels, None)
        prepared = [
            self._checked_scan(scan, interval, columns, True, f"scan {index}: ")
            for index, (scan, interval) in enumerate(zip(scans, intervals, strict=True))
        ]
        center, scale = robust_statistics(prepared, self.region_labels)
        self.scaling = "population"
        self.scaling_center, self.scaling_scale = center, scale
        return self


def _one_per_scan(name: str, value: Any, num_scans: int) -> list[Any]:
    """A list as it is, when it has one entry per scan; a single value once per scan."""
    if not isinstance(value, (list, tuple, np.ndarray)):
        return [value] * num_scans
    if len(value) != num_scans:
        raise TokenizationError(
            f"expected one {name} per scan, found {len(value)} for {num_scans} scans"
        )
    return list(value)


AVQFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
