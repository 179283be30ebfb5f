"""One scan as region time series, and the checks that every scan passes before anything uses it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

#: A scan with a larger share of unusable regions than this is refused.
MAX_MASKED_SHARE = 0.1
#: Shortest series that still has a spectrum and a correlation worth the name.
MIN_TIMEPOINTS = 10
#: No scanner or preprocessing writes numbers this large; they are overflow or uninitialised memory.
MAX_ABSOLUTE_VALUE = 1e12
#: Robust standard deviations above which a sample is reported as a spike.
SPIKE_SD = 1e4
TR_RANGE_S = (0.05, 20.0)


class CohortError(ValueError):
    """A cohort, scan, table or split that cannot be used as it is; the text says what to do."""


class SeriesHealth(NamedTuple):
    """What `ParcelSeries.validate` found in a scan that can be used.

    Attributes
    ----------
    region_mask : numpy.ndarray of bool, shape (regions,)
        True where the region's series can be used.
    missing_regions : tuple of str
        Labels of regions with NaN samples (no coverage, or `n/a` columns).
    constant_regions : tuple of str
        Labels of regions whose series never changes.
    warnings : tuple of str
        Things worth a look that do not stop the scan, such as spikes above 1e4 SD.
    """

    region_mask: np.ndarray
    missing_regions: tuple[str, ...]
    constant_regions: tuple[str, ...]
    warnings: tuple[str, ...]


def check_tr(tr: float | str | None, where: str) -> float:
    """Return the repetition time as a float in seconds, or raise.

    Parameters
    ----------
    tr : float
        Repetition time, expected in seconds.
    where : str
        Scan, file or row named in the message.

    Raises
    ------
    CohortError
        TR missing, not a number, zero or negative, in milliseconds, or outside 0.05-20 s.
    """
    todo = "Give the repetition time in seconds (RepetitionTime in the BIDS sidecar)."
    try:
        seconds = math.nan if tr is None else float(tr)
    except (TypeError, ValueError):
        raise CohortError(
            f"{where}: expected a TR in seconds, found {tr!r}, which is not a number. {todo}"
        ) from None
    if math.isnan(seconds):
        raise CohortError(f"{where}: expected a TR in seconds, found none (TR missing). {todo}")
    if seconds <= 0:
        raise CohortError(f"{where}: expected a TR above 0 s, found TR {seconds:g}. {todo}")
    if seconds >= 50:
        raise CohortError(
            f"{where}: expected a TR in seconds, found TR {seconds:g}. TR {seconds:g} looks like "
            f"milliseconds: write {seconds / 1000:g}."
        )
    low, high = TR_RANGE_S
    if not low <= seconds <= high:
        raise CohortError(
            f"{where}: expected a TR between {low:g} and {high:g} s, found TR {seconds:g}. {todo}"
        )
    return seconds


def check_labels(labels: list[str], where: str) -> None:
    """Refuse duplicated or empty region labels, naming them.

    Raises
    ------
    CohortError
        A label occurs twice or is empty.
    """
    empty = [i for i, label in enumerate(labels) if not str(label).strip()]
    if empty:
        raise CohortError(
            f"{where}: expected a name for every region, found empty labels at positions "
            f"{some(empty)}. Name them."
        )
    doubled = sorted(label for label, count in Counter(labels).items() if count > 1)
    if doubled:
        raise CohortError(
            f"{where}: expected unique region labels, found {len(doubled)} duplicated: "
            f"{some(doubled)}. Rename or drop the copies."
        )


def some(items: list | tuple, limit: int = 5) -> str:
    """First few items as text, with the number of those left out."""
    text = ", ".join(str(item) for item in list(items)[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


@dataclass
class ParcelSeries:
    """Region time series of one scan with all that is needed to interpret them.

    Attributes
    ----------
    values : numpy.ndarray of float32, shape (time, regions)
        BOLD signal in any unit; NaN where there is no coverage.
    labels : list of str
        Region names, one per column of `values`.
    coordinates : numpy.ndarray of float32, shape (regions, 3)
        Region centres in MNI space, mm.
    atlas : str
        Name of the parcellation.
    tr : float
        Repetition time in seconds, as acquired.
    subject_id, session, site : str
        Who, which visit, which scanner.
    """

    values: np.ndarray
    labels: list[str]
    coordinates: np.ndarray
    atlas: str
    tr: float
    subject_id: str
    session: str = ""
    site: str = ""

    @property
    def where(self) -> str:
        """How messages name this scan."""
        return f"subject {self.subject_id}" + (f", session {self.session}" if self.session else "")

    @classmethod
    def from_array(
        cls,
        values: np.ndarray,
        labels: list[str],
        coordinates: np.ndarray,
        atlas: str,
        tr: float,
        subject_id: str,
        session: str = "",
        site: str = "",
        time_axis: int | None = None,
    ) -> ParcelSeries:
        """Build a scan from a bare array, refusing any doubt about which axis is time.

        Parameters
        ----------
        values : numpy.ndarray, shape (time, regions) or, with ``time_axis=1``, (regions, time)
            Signal in any unit.
        time_axis : int, optional
            0 or 1; needed when the array is (regions, time) or square. It is never guessed.

        Raises
        ------
        CohortError
            Not two-dimensional, not numeric, ambiguous or transposed axes, or as `validate`.
        """
        where, count = f"subject {subject_id}", len(labels)
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise CohortError(
                f"{where}: expected numbers, found an array of {array.dtype}. "
                "Convert it to float32 first."
            )
        if array.ndim != 2:
            raise CohortError(
                f"{where}: expected a two-dimensional array (time, regions), "
                f"found shape {array.shape}. Pass one scan at a time."
            )
        if time_axis not in (None, 0, 1):
            raise CohortError(f"{where}: expected time_axis 0 or 1, found {time_axis!r}.")
        if time_axis is None and array.shape[0] == count:
            guess = "it could be either way round" if array.shape[1] == count else "transposed"
            raise CohortError(
                f"{where}: expected (time, regions) with {count} regions of atlas {atlas}, found "
                f"shape {array.shape}: {guess}. Pass time_axis=0 or time_axis=1 to say which "
                "axis is time."
            )
        if time_axis == 1:
            array = array.T
        series = cls(
            np.ascontiguousarray(array, dtype=np.float32),
            [str(label) for label in labels],
            np.asarray(coordinates, dtype=np.float32),
            atlas,
            tr,
            subject_id,
            session,
            site,
        )
        series.validate()
        return series

    def reorder(self, labels: list[str], atlas: str | None = None) -> ParcelSeries:
        """Return the scan with its regions in the order of `labels`.

        Raises
        ------
        CohortError
            The two sets of labels differ; the first differences are named.
        """
        place = {label: column for column, label in enumerate(self.labels)}
        absent = [label for label in labels if label not in place]
        extra = sorted(set(self.labels) - set(labels))
        if absent or extra:
            raise CohortError(
                f"{self.where}: expected the {len(labels)} regions of atlas {atlas or self.atlas}, "
                f"found {len(self.labels)} of atlas {self.atlas}. "
                f"Missing: {some(absent) or 'none'}; extra: {some(extra) or 'none'}. "
                "Extract the series with the same atlas, or drop the extra columns."
            )
        columns = [place[label] for label in labels]
        return ParcelSeries(
            np.ascontiguousarray(self.values[:, columns]),
            list(labels),
            self.coordinates[columns],
            atlas or self.atlas,
            self.tr,
            self.subject_id,
            self.session,
            self.site,
        )

    def validate(self) -> SeriesHealth:
        """Check the scan and say which regions can be used.

        Returns
        -------
        SeriesHealth
            Mask of usable regions, labels of the masked ones, warnings.

        Raises
        ------
        CohortError
            Wrong shapes, duplicated labels, unusable TR, infinite or absurd values, a scan
            without any usable region, or more than 10 % of regions missing or constant.
        """
        self.tr = check_tr(self.tr, self.where)
        check_labels(self.labels, self.where)
        count = len(self.labels)
        if self.values.ndim != 2 or self.values.shape[1] != count:
            raise CohortError(
                f"{self.where}: expected shape (time, {count}) for atlas {self.atlas}, found "
                f"{self.values.shape}. Check that labels and columns come from the same atlas "
                "and that there is no background column."
            )
        if self.coordinates.shape != (count, 3) or not np.isfinite(self.coordinates).all():
            raise CohortError(
                f"{self.where}: expected finite MNI coordinates of shape ({count}, 3), found "
                f"{self.coordinates.shape} with "
                f"{int((~np.isfinite(self.coordinates)).sum())} non-finite numbers. "
                "Complete the region table."
            )
        return check_values(self.values, self.labels, self.where)


def check_values(values: np.ndarray, labels: list[str], where: str) -> SeriesHealth:
    """Check the numbers of one scan, shape (time, regions); see `ParcelSeries.validate`."""
    time, count = values.shape
    if time < MIN_TIMEPOINTS:
        raise CohortError(
            f"{where}: expected at least {MIN_TIMEPOINTS} time points, found {time}. "
            "Leave the scan out."
        )
    high, low = values.max(axis=0), values.min(axis=0)  # (regions,), NaN where a sample is NaN
    with np.errstate(invalid="ignore"):
        huge = np.flatnonzero(np.maximum(np.abs(high), np.abs(low)) > MAX_ABSOLUTE_VALUE)
    missing = np.isnan(high)
    if missing.any():  # a column with NaN can also hide an infinite sample
        with np.errstate(invalid="ignore"):
            hidden = (np.abs(values[:, missing]) > MAX_ABSOLUTE_VALUE).any(axis=0)
        huge = np.union1d(huge, np.flatnonzero(missing)[hidden])
    if huge.size:
        column = int(huge[0])
        with np.errstate(invalid="ignore"):
            row = int(np.flatnonzero(np.abs(values[:, column]) > MAX_ABSOLUTE_VALUE)[0])
        raise CohortError(
            f"{where}: expected finite values below {MAX_ABSOLUTE_VALUE:g}, found "
            f"{values[row, column]:g} at time point {row}, region {labels[column]} "
            f"({huge.size} such regions). Look for overflow in the preprocessing of this scan."
        )
    if missing.all():
        raise CohortError(
            f"{where}: expected region series, found NaN in every region. "
            "The mask and the image probably do not overlap; leave the scan out."
        )
    with np.errstate(invalid="ignore"):
        constant = (high - low) <= 1e-6 * np.maximum(np.abs(high), np.abs(low))
    mask = ~(missing | constant)
    masked = count - int(mask.sum())
    if masked > MAX_MASKED_SHARE * count:
        names = [labels[column] for column in np.flatnonzero(~mask)]
        raise CohortError(
            f"{where}: expected at most {MAX_MASKED_SHARE:.0%} of {count} regions without signal, "
            f"found {masked} ({int(constant.sum())} constant, {int(missing.sum())} with NaN): "
            f"{some(names)}. Leave the scan out, or mark it recommended = False."
        )
    return SeriesHealth(
        mask,
        tuple(labels[column] for column in np.flatnonzero(missing)),
        tuple(labels[column] for column in np.flatnonzero(constant)),
        _spikes(values, mask, labels, where),
    )


def _spikes(values: np.ndarray, mask: np.ndarray, labels: list[str], where: str) -> tuple[str, ...]:
    """Warnings about samples above 1e4 robust SD, shape (time, regions) in."""
    centred = np.abs(values - values.mean(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        # A lone huge spike drives max/mean towards time/2; only such columns get the slow median.
        suspects = np.flatnonzero(
            mask & (centred.max(axis=0) > 0.2 * len(values) * centred.mean(0))
        )
    found = []
    for column in suspects:
        series = values[:, column].astype(np.float64)
        deviation = np.abs(series - np.median(series))
        scale = 1.4826 * np.median(deviation)
        if scale > 0 and deviation.max() > SPIKE_SD * scale:
            row = int(deviation.argmax())
            found.append(
                f"{where}: {series[row]:g} at time point {row}, region {labels[column]} is "
                f"{deviation[row] / scale:.0f} robust SD from the median; look at this scan."
            )
    return tuple(found)
