"""Readers: prepared cohorts, folders of tables, and single tables of region series.

The tables are read strictly: a file that a spreadsheet or a script has damaged is refused with the
column and the line, because what it would become otherwise looks like data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from .build import Cohort, build_cohort
from .series import CohortError, ParcelSeries, check_labels, some
from .storage import load_prepared, read_parquet
from .tables import MISSING, is_number, read_table, to_numbers

#: Numbers that tables of the field use for "unknown"; no phenotype has them as values.
SENTINELS = (-9999.0, -999.0, -99.0, -888.0, -777.0, 9999.0)
AGE_RANGE_YEARS = (0.0, 120.0)
SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}


def load_cohort(
    path: str | Path, atlas: str | None = None, sex_codes: Mapping[str, str] | None = None
) -> Cohort:
    """Read a cohort folder into memory.

    Parameters
    ----------
    path : path
        A folder written by `save_cohort`, or one with participants.tsv, regions.tsv and
        timeseries/bold.parquet (columns participant_id, t, one column per region).
    atlas : str, optional
        Name of the parcellation of a folder of tables. By default the second part of the folder's
        name (``abide1_cc200`` is atlas ``cc200``), or the whole name.
    sex_codes : mapping of str to str, optional
        What codes such as "1" and "2" in the column `sex` mean, as {"1": "M", "2": "F"}.

    Returns
    -------
    Cohort
        One scan per participant; ages in years, sex F or M, all other columns as written.

    Raises
    ------
    CohortError
        Anything missing, damaged or contradictory, named with file, column and line.
    """
    path = Path(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise CohortError(f"{path}: expected a cohort folder, found {found}. Check the path.")
    if (path / "cohort.json").is_file():
        return load_prepared(path)
    for name in ("participants.tsv", "regions.tsv", "timeseries/bold.parquet"):
        if not (path / name).is_file():
            raise CohortError(
                f"{path}: expected a prepared cohort (cohort.json) or participants.tsv, "
                f"regions.tsv and timeseries/bold.parquet, found no {name}. Add it."
            )
    if atlas is None:
        parts = path.resolve().name.split("_")
        atlas = parts[1] if len(parts) > 1 else parts[0]
    regions = read_regions(path / "regions.tsv")
    table = read_participants(path / "participants.tsv", sex_codes)
    values, table = _read_stacked(path / "timeseries" / "bold.parquet", table, regions, atlas)
    return build_cohort(values, table, regions.drop(columns="column"), atlas, path)


def read_regions(path: Path) -> pd.DataFrame:
    """Read regions.tsv: label (`name` where given), x, y, z in MNI mm, size, hemisphere, network.

    Raises
    ------
    CohortError
        As `read_table`; duplicated labels; coordinates missing or outside the head.
    """
    raw = read_table(path)
    absent = [name for name in ("label", "x", "y", "z") if name not in raw]
    if absent:
        raise CohortError(
            f"{path}: expected the columns label, x, y, z, found no {', '.join(absent)}. Add them."
        )
    table = pd.DataFrame({"label": raw["name"] if "name" in raw else raw["label"]})
    check_labels(list(table["label"]), str(path))
    for axis in "xyz":
        table[axis] = to_numbers(raw[axis], path)
        wrong = raw.index[~(np.abs(table[axis]) <= 150)]
        if len(wrong):
            raise CohortError(
                f"{path}, line {wrong[0]}, column {axis}: expected an MNI coordinate within "
                f"150 mm, found {raw.loc[wrong[0], axis]!r}. Complete the table in mm."
            )
    sizes = [name for name in raw if name == "size" or name.startswith("n_voxels")]
    table["size"] = to_numbers(raw[sizes[0]], path) if sizes else np.nan
    if "hemisphere" in raw:
        table["hemisphere"] = raw["hemisphere"]
    networks = [name for name in ("network", "yeo7") if name in raw]
    if networks:
        table["network"] = raw[networks[0]]
    if "name" in raw:
        table["atlas_value"] = raw["label"]
    table["column"] = raw["column"] if "column" in raw else table["label"]
    return table.reset_index(drop=True)


def canonical_subject(subject_id: str) -> str:
    """One spelling for `sub-01`, `01` and `1`."""
    text = str(subject_id).strip().lower().removeprefix("sub-")
    return text.lstrip("0") or "0"


def read_participants(
    path: Path,
    sex_codes: Mapping[str, str] | None = None,
    site: str | None = None,
    need_tr: bool = True,
) -> pd.DataFrame:
    """Read participants.tsv into typed columns, checked for what silently spoils a study.

    Parameters
    ----------
    sex_codes : mapping of str to str, optional
        As of `load_cohort`.
    site : str, optional
        The scanner of everybody in a table without a column site.
    need_tr : bool
        False where the scans' own files may say it: `tr` is then NaN where the table has none.

    Returns
    -------
    pandas.DataFrame
        subject_id (participant_id as written), session, site, tr (s), and every other column.

    Raises
    ------
    CohortError
        As `read_table`; a person listed twice, site or TR missing, sex in codes without
        `sex_codes`, sentinels such as -9999, ages in months or out of range.
    """
    raw = read_table(path)
    if site is not None and "site" not in raw:
        raw["site"] = site
    if not need_tr and "tr" not in raw:
        raw["tr"] = "n/a"
    for name, advice in (
        ("participant_id", "Name the column of the subjects participant_id, as BIDS does."),
        ("site", "Add a column site with the scanner's name (one name if there is one scanner)."),
        ("tr", "Add a column tr with the repetition time in seconds."),
    ):
        if name not in raw:
            raise CohortError(
                f"{path}: expected a column {name}, found {some(list(raw), 8)}. {advice}"
            )
    for name in {"participant_id", "sub_id"} & set(raw):
        _refuse_doubled(raw[name], path)
    lines = raw.index[raw["site"].isin(MISSING)]
    if len(lines):
        raise CohortError(
            f"{path}, line {lines[0]}, column site: expected the scanner's name, found "
            f"{raw.loc[lines[0], 'site']!r} (site missing in {len(lines)} rows). Fill it in."
        )
    table = pd.DataFrame({"subject_id": raw["participant_id"]})
    table["session"] = raw.get("session", "")
    table["site"] = raw["site"]
    table["tr"] = to_numbers(raw["tr"], path)
    for name in raw:
        if name in ("participant_id", "session", "site", "tr"):
            continue
        table[name] = _typed(raw[name], path, numeric=name == "age")
    if "age" in table:
        _check_age(table["age"], path)
    if "sex" in raw:
        table["sex"] = _sexes(raw["sex"], path, sex_codes)
    return table.reset_index(drop=True)


def _refuse_doubled(column: pd.Series, path: Path) -> None:
    """Refuse one person under several spellings or in several rows."""
    seen: dict[str, tuple[int, str]] = {}
    for line, text in column.items():
        first = seen.setdefault(canonical_subject(text), (line, text))
        if first[0] != line:
            raise CohortError(
                f"{path}, lines {first[0]} and {line}, column {column.name}: expected every person "
                f"once, found {first[1]!r} and {text!r}, the same subject. Keep one row and one "
                "scan per person, or train and test would share a person."
            )


def _typed(column: pd.Series, path: Path, numeric: bool) -> pd.Series:
    """Text column as bool, int, float or text, whichever all its entries are."""
    present = column[~column.isin(MISSING)]
    if len(present) == len(column) and set(present) <= {"True", "False"}:
        return column == "True"
    commas = present.str.fullmatch(r"[-+]?\d+,\d+")
    if numeric or (len(present) and (present.map(is_number) | commas).all()):
        numbers = pd.Series(to_numbers(column, path), index=column.index)
        sentinel = numbers.isin(SENTINELS)
        if sentinel.any():
            line = sentinel.idxmax()
            raise CohortError(
                f"{path}, line {line}, column {column.name}: expected a value or n/a, found "
                f"{numbers[line]:g}, which stands for missing ({int(sentinel.sum())} rows). "
                "Write n/a there."
            )
        whole = len(present) == len(column) and present.str.fullmatch(r"[-+]?\d+").all()
        return numbers.astype(np.int64) if whole and not numeric else numbers
    return column.where(~column.isin(MISSING), None)


def _check_age(ages: pd.Series, path: Path) -> None:
    """Refuse ages in months, and ages outside 0-120 years."""
    low, high = AGE_RANGE_YEARS
    wrong = ages.index[(ages < low) | (ages > high)]
    if not len(wrong):
        return
    median = float(ages.median())
    if median > high:
        raise CohortError(
            f"{path}, column age: expected years, found ages from {ages.min():g} to "
            f"{ages.max():g} with median {median:g}: these look like months. Divide them by 12."
        )
    raise CohortError(
        f"{path}, line {wrong[0]}, column age: expected {low:g} to {high:g} years, found "
        f"{ages[wrong[0]]:g} ({len(wrong)} rows). Correct it or write n/a."
    )


def _sexes(column: pd.Series, path: Path, codes: Mapping[str, str] | None) -> pd.Series:
    """Sex as F or M; codes only through the mapping that the caller gives."""
    names = {str(k).lower(): v for k, v in (codes or {}).items()} | SEXES
    known = column.str.lower().map(names)
    unknown = sorted(set(column[known.isna() & ~column.isin(MISSING)]))
    if unknown:
        line = column.index[column == unknown[0]][0]
        raise CohortError(
            f"{path}, line {line}, column sex: expected F or M, found {some(unknown)}. Studies "
            'code it differently; say what yours means, as sex_codes={"1": "M", "2": "F"}.'
        )
    return known.where(known.notna(), None)


def _read_stacked(
    path: Path, table: pd.DataFrame, regions: pd.DataFrame, atlas: str
) -> tuple[np.ndarray, pd.DataFrame]:
    """Stacked series (sum of times, regions) in table order, and the table with n_timepoints."""
    found = read_parquet(path)
    names, wanted = found.column_names, list(regions["column"])
    for name in ("participant_id", "t"):
        if name not in names:
            raise CohortError(f"{path}: expected a column {name}, found {some(names)}.")
    series_names = [name for name in names if name not in ("participant_id", "t")]
    _match_regions(series_names, wanted, atlas, path)
    for name in series_names:
        if not pa.types.is_floating(kind := found.schema.field(name).type):
            raise CohortError(f"{path}, column {name}: expected float32, found {kind}.")
    codes, present = pd.factorize(found.column("participant_id").to_pandas())
    values = np.empty((found.num_rows, len(wanted)), np.float32)
    for column, name in enumerate(wanted):
        values[:, column] = found.column(name).to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    times = found.column("t").to_numpy()
    if len(starts) != len(present) or (np.diff(times)[np.diff(codes) == 0] <= 0).any():
        order = np.lexsort((times, codes))
        values, codes, times = values[order], codes[order], times[order]
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
    lengths = np.diff(np.append(starts, len(codes)))
    for subject, start, length in zip(present[codes[starts]], starts, lengths, strict=True):
        steps = times[start : start + length]
        if not np.array_equal(steps, np.arange(length)):
            doubled = len(np.unique(steps)) < length
            raise CohortError(
                f"{path}, participant {subject}: expected time points 0 to {length - 1} once each, "
                f"found {'repeated' if doubled else 'missing'} ones"
                f"{' (the same scan twice?)' if doubled else ''}. Repair the table."
            )
    place = {subject: row for row, subject in enumerate(present[codes[starts]])}
    lost = [subject for subject in table["subject_id"] if subject not in place]
    unknown = sorted(set(place) - set(table["subject_id"]))
    if lost or unknown:
        raise CohortError(
            f"{path}: expected a scan for each of the {len(table)} rows of participants.tsv. "
            f"Without scan: {some(lost) or 'none'}; without row: {some(unknown) or 'none'}. "
            "Add or remove them."
        )
    rows = np.array([place[subject] for subject in table["subject_id"]])
    if not np.array_equal(rows, np.arange(len(rows))):
        index = [np.arange(starts[row], starts[row] + lengths[row]) for row in rows]
        values = values[np.concatenate(index)]
    counted = lengths[rows]
    if "n_timepoints" in table:
        wrong = np.flatnonzero(table["n_timepoints"].to_numpy() != counted)
        if len(wrong):
            row = table.iloc[wrong[0]]
            raise CohortError(
                f"{path}, participant {row['subject_id']}: expected {row['n_timepoints']} time "
                f"points (participants.tsv), found {counted[wrong[0]]}. Was the file cut?"
            )
    return values, table.assign(n_timepoints=counted)


def _match_regions(found: list[str], wanted: list[str], atlas: str, where: Path) -> None:
    """Refuse series whose columns are not the regions of the table, naming the differences."""
    extra = [name for name in found if name not in set(wanted)]
    absent = [name for name in wanted if name not in set(found)]
    if extra or absent:
        raise CohortError(
            f"{where}: expected the {len(wanted)} regions of atlas {atlas} (regions.tsv), found "
            f"{len(found)} series. Extra: {some(extra) or 'none'}; missing: "
            f"{some(absent) or 'none'}. Use the region table of the same atlas, without a "
            "background column."
        )


def read_series(
    path: str | Path, regions: pd.DataFrame, atlas: str, tr: float, subject_id: str, site: str = ""
) -> ParcelSeries:
    """Read one scan from a tab-separated table of region series.

    The labels decide the orientation: a header of region labels means (time, regions); a first
    column of region labels means (regions, time). Columns are put in the order of `regions`;
    `n/a` becomes NaN, and such regions are masked later.

    Parameters
    ----------
    regions : pandas.DataFrame
        Columns label, x, y, z (MNI mm).
    tr : float
        Seconds.

    Raises
    ------
    CohortError
        As `read_table` and `ParcelSeries.validate`; labels of another atlas.
    """
    path = Path(path)
    raw, wanted = read_table(path), [str(label) for label in regions["label"]]
    first = raw.iloc[:, 0]
    if set(wanted) & set(first):  # (regions, time)
        check_labels(list(first), str(path))
        _match_regions(list(first), wanted, atlas, path)
        rows = raw.iloc[:, 1:].set_axis(list(first), axis=0)
        columns = [
            to_numbers(rows.loc[label].rename(f"of region {label}"), path) for label in wanted
        ]
    else:
        _match_regions([name for name in raw if name not in ("t", "time")], wanted, atlas, path)
        columns = [to_numbers(raw[label], path) for label in wanted]
    series = ParcelSeries(
        np.stack(columns, axis=1).astype(np.float32),
        wanted,
        regions[["x", "y", "z"]].to_numpy(np.float32),
        atlas,
        tr,
        subject_id,
        site=site,
    )
    series.validate()
    return series
