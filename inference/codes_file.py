"""codes.parquet: one row per window, and in its metadata all that is needed to read the codes."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cortexicon.cohorts import Cohort
from cortexicon.modeling import AVQModel

from .encode import ScanCodes
from .errors import InferenceError

_KEY = b"cortexicon_codes"
_FORMAT = 1
_ROWS_PER_GROUP = 4096


class CodesInfo(NamedTuple):
    """What the codes mean.

    Attributes
    ----------
    codebook_fingerprint : str
        `AVQModel.codebook_fingerprint()` of the codec that wrote them.
    num_codes, window_length, patch_length : int
    sampling_interval : float
        Seconds between the samples of a window.
    token_layout : {"latent", "grid"}
    atlas, cohort_hash : str
    region_labels : list of str
    region_coordinates : list of [x, y, z]
        Regions that were encoded, mm, MNI.
    """

    codebook_fingerprint: str
    num_codes: int
    window_length: int
    patch_length: int
    sampling_interval: float
    token_layout: str
    atlas: str
    cohort_hash: str
    region_labels: list[str]
    region_coordinates: list[list[float]]


class CodesFile(NamedTuple):
    """Contents of one codes.parquet."""

    scans: list[ScanCodes]
    info: CodesInfo


def describe_codes(model: AVQModel, cohort: Cohort) -> CodesInfo:
    """`CodesInfo` of what `model` writes for `cohort`."""
    config = model.config
    return CodesInfo(
        codebook_fingerprint=model.codebook_fingerprint(),
        num_codes=config.num_codes,
        window_length=config.window_length,
        patch_length=config.patch_length,
        sampling_interval=float(config.sampling_interval),
        token_layout=config.token_layout,
        atlas=cohort.atlas,
        cohort_hash=cohort.content_hash,
        region_labels=[str(label) for label in cohort.labels],
        region_coordinates=np.asarray(cohort.coordinates, dtype=float).round(4).tolist(),
    )


def write_codes(path: str | Path, scans: Iterable[ScanCodes], info: CodesInfo) -> int:
    """Write codes scan by scan; the file appears under its name only when it is whole.

    Returns
    -------
    int
        Number of scans written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"format": _FORMAT, **info._asdict()})
    schema = pa.schema(
        [
            ("subject_id", pa.string()),
            ("session", pa.string()),
            ("site", pa.string()),
            ("window", pa.int32()),
            ("codes", pa.list_(pa.int32())),
        ],
        metadata={_KEY: text.encode("utf-8")},
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            rows: list[dict[str, object]] = []
            for scan in scans:
                count += 1
                rows.extend(
                    {
                        "subject_id": scan.subject_id,
                        "session": scan.session,
                        "site": scan.site,
                        "window": window,
                        "codes": codes,
                    }
                    for window, codes in enumerate(scan.codes.astype(np.int32))
                )
                if len(rows) >= _ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    rows = []
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_codes(path: str | Path) -> CodesFile:
    """Read a file that `write_codes` wrote.

    Raises
    ------
    InferenceError
        The file is missing, damaged, not a codes file, or holds codes out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise InferenceError(
            f"{path}: expected a codes file, found nothing. Write one with `cortexicon encode`."
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise InferenceError(
            f"{path}: expected a Parquet file, found one that is truncated or of another kind "
            f"({error}). Write it again with `cortexicon encode`."
        ) from error
    metadata = (table.schema.metadata or {}).get(_KEY)
    if metadata is None:
        raise InferenceError(
            f"{path}: a Parquet file, but not one that `cortexicon encode` wrote: it does not say "
            "which codebook its codes belong to."
        )
    fields = json.loads(metadata)
    if fields.pop("format") != _FORMAT:
        raise InferenceError(f"{path}: written by another version. Encode the cohort again.")
    info = CodesInfo(**fields)
    scans = _scans(table)
    for scan in scans:
        low, high = int(scan.codes.min()), int(scan.codes.max())
        if low < 0 or high >= info.num_codes:
            raise InferenceError(
                f"{path}, subject {scan.subject_id}: expected codes in 0..{info.num_codes - 1}, "
                f"found {low}..{high}. The file was changed; encode the cohort again."
            )
    return CodesFile(scans, info)


def check_codebook(model: AVQModel, info: CodesInfo, where: str | Path) -> None:
    """Refuse codes that another codebook made.

    Raises
    ------
    InferenceError
        The fingerprints differ; both are given.
    """
    expected = model.codebook_fingerprint()
    if info.codebook_fingerprint != expected:
        raise InferenceError(
            f"{where}: expected codes of codebook {expected[:12]}, found codes of codebook "
            f"{info.codebook_fingerprint[:12]}. Use the checkpoint that wrote them, or encode the "
            "cohort again with this one."
        )


def _scans(table: pa.Table) -> list[ScanCodes]:
    """Rows of windows back to scans, in file order."""
    scans: list[ScanCodes] = []
    rows: list[np.ndarray] = []
    columns = [
        table.column(name).to_pylist() for name in ("subject_id", "session", "site", "window")
    ]
    lists = table.column("codes").combine_chunks()
    flat = lists.flatten().to_numpy().astype(np.int64)
    ends = np.cumsum(lists.value_lengths().to_numpy())
    starts = np.concatenate([[0], ends[:-1]])
    current: tuple[str, str, str] | None = None
    for subject, session, site, window, start, end in zip(*columns, starts, ends, strict=True):
        if window == 0 and current is not None:
            scans.append(ScanCodes(*current, np.stack(rows)))
            rows = []
        current = (subject, session, site)
        rows.append(flat[start:end])
    if current is not None:
        scans.append(ScanCodes(*current, np.stack(rows)))
    return scans
