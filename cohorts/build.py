"""A cohort: scans, participants and regions together, as a `datasets.Dataset` and on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa

from .series import CohortError, ParcelSeries, check_tr, check_values, some

SERIES_COLUMN = "time_series"
FIXED_COLUMNS = ("subject_id", "session", "site", "tr", "n_timepoints")
_STRING = {pa.large_string(): pa.string(), pa.null(): pa.string()}
#: Numbers in one chunk of the Arrow table at most.
MAX_CHUNK = 2**31 - 1
REGION_COLUMNS = ("label", "x", "y", "z", "size", "hemisphere")


class Cohort:
    """Scans of one parcellation, one per participant, kept in one Arrow table.

    Attributes
    ----------
    dataset : datasets.Dataset
        Columns subject_id, session, site, tr (s), n_timepoints, the phenotypes, and `time_series`
        (time, regions) float32, in numpy format.
    regions : pandas.DataFrame
        One row per region: label, x, y, z (MNI mm), size, hemisphere, and what else was given.
    labels : list of str
        Region names in column order.
    coordinates : numpy.ndarray of float32, shape (regions, 3)
        MNI mm.
    atlas : str
        Name of the parcellation.
    participants : pandas.DataFrame
        All columns but the series, indexed by subject_id.
    content_hash : str
        SHA-256 over series, participants and regions; independent of the order of the scans.
    path : pathlib.Path or None
        Where it was read from.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        regions: pd.DataFrame,
        atlas: str,
        path: Path | None = None,
        digests: dict[str, str] | None = None,
    ):
        self.dataset = dataset.with_format("numpy")
        self.regions = regions.reset_index(drop=True)
        self.atlas = atlas
        self.path = path
        self.labels = [str(label) for label in self.regions["label"]]
        self.coordinates = self.regions[["x", "y", "z"]].to_numpy(np.float32)
        table = dataset.with_format("arrow").remove_columns(SERIES_COLUMN)[:]
        frame = table.to_pandas()
        self.participants = frame.set_index("subject_id")
        self._row = {subject: row for row, subject in enumerate(frame["subject_id"])}
        self._digests = digests or {}
        self._content_hash: str | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[ParcelSeries]:
        for subject in self._row:
            yield self.series(subject)

    def __repr__(self) -> str:
        sites = self.participants["site"].nunique()
        return (
            f"Cohort({len(self)} scans, {len(self.labels)} regions of {self.atlas}, {sites} sites)"
        )

    @property
    def subject_ids(self) -> list[str]:
        """Subject ids in the order of the scans."""
        return list(self._row)

    @property
    def content_hash(self) -> str:
        """SHA-256 of the content; computed once, over every scan."""
        if self._content_hash is None:
            for subject in self._row:
                if subject not in self._digests:
                    self._digests[subject] = digest_values(self.series(subject).values)
            self._content_hash = _hash_content(self)
        return self._content_hash

    def series(self, subject_id: str) -> ParcelSeries:
        """The scan of one participant.

        Raises
        ------
        CohortError
            No such participant.
        """
        if subject_id not in self._row:
            raise CohortError(
                f"expected a participant of this cohort, found {subject_id!r}. Its "
                f"{len(self)} participants are {some(self.subject_ids)}."
            )
        row = self.dataset[self._row[subject_id]]
        return ParcelSeries(
            row[SERIES_COLUMN],
            self.labels,
            self.coordinates,
            self.atlas,
            float(row["tr"]),
            str(subject_id),
            str(row["session"]),
            str(row["site"]),
        )

    def subset(self, subject_ids: Sequence[str]) -> Cohort:
        """The cohort of the given participants, in the given order.

        Raises
        ------
        CohortError
            A participant is unknown or named twice.
        """
        unknown = [subject for subject in subject_ids if subject not in self._row]
        if unknown:
            raise CohortError(
                f"expected participants of this cohort, found {len(unknown)} unknown: "
                f"{some(unknown)}. Use ids of its participants table."
            )
        if len(set(subject_ids)) != len(subject_ids):
            raise CohortError("expected every participant once, found repeated subject ids.")
        rows = [self._row[subject] for subject in subject_ids]
        digests = {s: self._digests[s] for s in subject_ids if s in self._digests}
        return Cohort(self.dataset.select(rows), self.regions, self.atlas, self.path, digests)

    def quality(self) -> pd.DataFrame:
        """What the checks find in every scan, also in those that are kept but not recommended.

        Returns
        -------
        pandas.DataFrame
            Indexed by subject_id: n_missing and n_constant regions, masked_regions (labels),
            warnings, and problem (why the scan cannot be used; empty for usable scans).
        """
        rows = []
        for scan in self:
            row = dict[str, int | str](n_missing=0, n_constant=0)
            row |= {"masked_regions": "", "warnings": "", "problem": ""}
            try:
                found = scan.validate()
            except CohortError as error:
                row["problem"] = str(error)
            else:
                row["n_missing"] = len(found.missing_regions)
                row["n_constant"] = len(found.constant_regions)
                row["masked_regions"] = ", ".join(found.missing_regions + found.constant_regions)
                row["warnings"] = " ".join(found.warnings)
            rows.append(row)
        return pd.DataFrame(rows, index=pd.Index(self.subject_ids, name="subject_id"))

    def summary(self) -> str:
        """Counts by site, sex and diagnosis, and ranges, as a few lines of text."""
        table, lines = self.participants, [repr(self)]
        for column in ("site", "sex", "diagnosis"):
            if column in table:
                counts = table[column].value_counts(dropna=False)
                lines.append(f"{column}: " + ", ".join(f"{k} {v}" for k, v in counts.items()))
        for column in ("age", "tr", "n_timepoints"):
            if column in table:
                values = table[column].astype(float)
                lines.append(f"{column}: {values.min():g} to {values.max():g}")
        return "\n".join(lines)


def digest_values(values: np.ndarray) -> str:
    """SHA-256 of one scan's numbers, shape (time, regions), as float32."""
    array = np.ascontiguousarray(values, dtype="<f4")
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


def _hash_content(cohort: Cohort) -> str:
    """SHA-256 over regions, participants and the digests of the series."""
    digest = hashlib.sha256()
    digest.update(json.dumps([cohort.atlas, cohort.labels]).encode())
    digest.update(np.ascontiguousarray(cohort.coordinates, dtype="<f4").tobytes())
    table = cohort.participants.reindex(columns=sorted(cohort.participants.columns)).sort_index()
    for subject, values in zip(table.index, table.itertuples(index=False, name=None), strict=True):
        plain = [None if pd.isna(v) else v.item() if hasattr(v, "item") else v for v in values]
        record = [subject, cohort._digests[subject], dict(zip(table.columns, plain, strict=True))]
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def build_cohort(
    values: np.ndarray,
    participants: pd.DataFrame,
    regions: pd.DataFrame,
    atlas: str,
    path: Path | None = None,
) -> Cohort:
    """Build a checked cohort from stacked scans.

    Parameters
    ----------
    values : numpy.ndarray of float32, shape (sum of n_timepoints, regions)
        All scans under one another, in the order of `participants`.
    participants : pandas.DataFrame
        One row per scan with subject_id, session, site, tr (s), n_timepoints, and phenotypes.
        Scans whose column `recommended` is False are kept without being checked, and no split
        uses them.
    regions : pandas.DataFrame
        One row per column of `values`; at least label, x, y, z.
    atlas : str
        Name of the parcellation.

    Raises
    ------
    CohortError
        Counts that do not fit, an unusable TR, scans that fail `ParcelSeries.validate`, or two
        participants with the same scan; all such scans are named at once.
    """
    regions, table = _complete_regions(regions), participants.reset_index(drop=True)
    lengths = table["n_timepoints"].to_numpy(np.int64)
    if values.ndim != 2 or values.shape != (lengths.sum(), len(regions)):
        raise CohortError(
            f"expected stacked series of shape ({lengths.sum()}, {len(regions)}) for "
            f"{len(table)} scans of atlas {atlas}, found {values.shape}. "
            "Check n_timepoints and the number of regions."
        )
    values = np.ascontiguousarray(values, dtype=np.float32)
    table["tr"] = [
        check_tr(tr, f"subject {subject}")
        for tr, subject in zip(table["tr"], table["subject_id"], strict=True)
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels, digests = [str(label) for label in regions["label"]], {}
    usable = table["recommended"].astype(bool) if "recommended" in table else [True] * len(table)
    problems: list[str] = []
    seen: dict[str, str] = {}
    for row, (subject, checked) in enumerate(zip(table["subject_id"], usable, strict=True)):
        scan = values[offsets[row] : offsets[row + 1]]
        if checked:
            try:
                check_values(scan, labels, f"subject {subject}")
            except CohortError as error:
                problems.append(str(error))
        digests[subject] = digest_values(scan)
        if not checked:
            continue
        twin = seen.setdefault(digests[subject], subject)
        if twin != subject:
            problems.append(
                f"subjects {twin} and {subject}: expected different scans, found the same scan "
                "twice. Remove one of them, or train and test would share it."
            )
    if problems:
        shown = "\n".join(problems[:10])
        raise CohortError(
            f"{len(problems)} of {len(table)} scans cannot be used:\n{shown}"
            + (f"\n... and {len(problems) - 10} more" if len(problems) > 10 else "")
        )
    return Cohort(_nest(values, offsets, table), regions, atlas, path, digests)


def cohort_from_series(
    scans: Iterable[ParcelSeries], participants: pd.DataFrame | None = None
) -> Cohort:
    """Build a cohort from single scans of one atlas.

    Parameters
    ----------
    scans : iterable of ParcelSeries
        One scan per participant, all with the same regions.
    participants : pandas.DataFrame, optional
        Phenotypes indexed by subject_id.

    Raises
    ------
    CohortError
        No scan, different regions, a participant twice, or as `build_cohort`.
    """
    listed = list(scans)
    if not listed:
        raise CohortError("expected at least one scan, found none.")
    first = listed[0]
    blocks, rows = [], []
    for scan in listed:
        same = scan.labels == first.labels
        blocks.append((scan if same else scan.reorder(first.labels, first.atlas)).values)
        row = dict(zip(FIXED_COLUMNS, (scan.subject_id, scan.session, scan.site), strict=False))
        rows.append(row | {"tr": scan.tr, "n_timepoints": len(scan.values)})
    table = pd.DataFrame(rows)
    doubled = table["subject_id"][table["subject_id"].duplicated()].tolist()
    if doubled:
        raise CohortError(f"expected one scan per participant, found more for {some(doubled)}.")
    if participants is not None:
        extra = participants.drop(columns=list(FIXED_COLUMNS), errors="ignore")
        table = table.join(extra, on="subject_id")
    regions = pd.DataFrame(first.coordinates, columns=["x", "y", "z"])
    regions.insert(0, "label", first.labels)
    return build_cohort(np.concatenate(blocks), table, regions, first.atlas)


def _complete_regions(regions: pd.DataFrame) -> pd.DataFrame:
    """Region table with the fixed columns first; size and hemisphere filled where absent."""
    table = regions.copy()
    table["label"] = table["label"].astype(str)
    if "size" not in table:
        table["size"] = np.nan
    if "hemisphere" not in table:
        table["hemisphere"] = np.where(table["x"] < 0, "L", "R")
    rest = [column for column in table.columns if column not in REGION_COLUMNS]
    return table[list(REGION_COLUMNS) + rest]


def _nest(values: np.ndarray, offsets: np.ndarray, table: pd.DataFrame) -> datasets.Dataset:
    """Arrow table of the scans without a round trip through Python lists."""
    count = values.shape[1]
    chunks, first = [], 0
    while first < len(table):
        # Offsets into a chunk have 32 bits, so a large cohort needs several chunks.
        last = int(np.searchsorted(offsets, offsets[first] + MAX_CHUNK // count, "right")) - 1
        last = max(last, first + 1)
        block = values[offsets[first] : offsets[last]]
        rows = np.arange(len(block) + 1, dtype=np.int64) * count
        volumes = pa.ListArray.from_arrays(pa.array(rows, pa.int32()), pa.array(block.reshape(-1)))
        starts = pa.array(offsets[first : last + 1] - offsets[first], pa.int32())
        chunks.append(pa.ListArray.from_arrays(starts, volumes))
        first = last
    rest = [column for column in table.columns if column not in FIXED_COLUMNS]
    plain = pa.Table.from_pandas(table[list(FIXED_COLUMNS) + rest], preserve_index=False)
    kind = pa.list_(pa.list_(pa.float32()))
    return to_dataset(plain.replace_schema_metadata(None), pa.chunked_array(chunks, kind), count)


def to_dataset(plain: pa.Table, scans: pa.ChunkedArray, count: int) -> datasets.Dataset:
    """Dataset from a table without series and the nested lists of the series."""
    feature = datasets.Array2D(shape=(None, count), dtype="float32")
    kind = feature()
    wrapped = pa.chunked_array(
        [pa.ExtensionArray.from_storage(kind, c) for c in scans.chunks], kind
    )
    # Large strings come from pandas; one string type keeps saved and fresh cohorts alike.
    plain = plain.cast(pa.schema([f.with_type(_STRING.get(f.type, f.type)) for f in plain.schema]))
    features = datasets.Features.from_arrow_schema(plain.schema)
    features[SERIES_COLUMN] = feature
    table = plain.append_column(SERIES_COLUMN, wrapped)
    info = json.dumps({"info": {"features": features.to_dict()}})
    return datasets.Dataset(
        datasets.table.InMemoryTable(table.replace_schema_metadata({"huggingface": info}))
    )
