"""One self-contained quality.html for a prepared cohort: counts, distributions, carpet plots."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cortexicon.cohorts import stream_cohort
from cortexicon.cohorts.quality import dvars

from .errors import EvaluationError
from .rendering import BLUE, FAINT, GREY, STYLE, VERMILION, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "quality.html"
#: Carpets drawn: those of the most striking scans, and some from the middle for comparison.
NUM_STRIKING, NUM_TYPICAL = 12, 4
#: A carpet shows z-scores from -2.5 (black) to 2.5 (white).
CARPET_SD = 2.5
MAX_ROWS = 2000
# Column of the quality table -> (title, unit of the axis).
MEASURES = {
    "max_dvars": ("Largest change between volumes", "DVARS, units of the regions' SD"),
    "mean_fd": ("Head motion", "mean framewise displacement, mm"),
    "global_signal_sd": ("Share of one global signal", "SD of the mean z-scored region"),
    "median_sd": ("Strength of the signal", "median SD over regions, unit of the files"),
    "n_timepoints": ("Length", "volumes"),
    "masked": ("Regions without signal", "regions"),
}


def write_cohort_report(folder: str | Path) -> Path:
    """Draw the quality of a cohort that `cortexicon prepare` wrote, into FOLDER/quality.html.

    Scans are read one after the other, so the cohort may be larger than memory.

    Returns
    -------
    Path
        The report. It loads nothing from anywhere: pictures and style are inside.

    Raises
    ------
    EvaluationError
        The folder holds no quality.tsv or prepare.json.
    CohortError
        The cohort is damaged.
    """
    from jinja2 import Environment, StrictUndefined

    folder = Path(folder)
    table, manifest = _read(folder)
    used = table[table["status"] == "used"].copy()
    used["masked"] = used["n_missing"] + used["n_constant"]
    striking, typical = choose_scans(used)
    carpets = _draw_carpets(folder, used, [*striking, *typical])
    template = (files(__package__) / "templates" / "quality.html.jinja").read_text("utf-8")
    page = (
        Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
        .from_string(template)
        .render(
            title=f"Quality of {len(used)} scans",
            cards=_cards(table, used, manifest),
            settings=_settings(manifest),
            left_out=_records(
                table[table["status"] == "refused"], ("subject_id", "source", "reason")
            ),
            not_used=_records(
                table[table["status"] == "not used"], ("subject_id", "source", "reason")
            ),
            warned=_records(used[used["warnings"].notna()], ("subject_id", "source", "warnings")),
            figures=[
                _embed(_draw_measures(used), "All scans that are used; the line is the median."),
                _embed(*_draw_regions(folder, used)),
            ],
            striking=[carpets[name] for name in striking],
            typical=[carpets[name] for name in typical],
            columns=_COLUMNS,
            rows=_records(used.head(MAX_ROWS), tuple(_COLUMNS)),
            more=max(0, len(used) - MAX_ROWS),
        )
    )
    path = folder / REPORT
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


# Columns of text, also where every cell of a file is empty.
_TEXT = ("subject_id", "session", "task", "run", "reason", "source", "masked_regions", "warnings")
# Columns of the table of all scans, with their heads.
_COLUMNS = {
    "subject_id": "subject",
    "session": "session",
    "tr": "TR (s)",
    "n_timepoints": "volumes",
    "masked": "masked regions",
    "mean_fd": "mean FD (mm)",
    "n_scrubbed": "scrubbed",
    "max_dvars": "max DVARS",
    "global_signal_sd": "global signal",
    "median_sd": "SD",
    "median_tsnr": "tSNR",
    "source": "file",
}


def _read(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The quality table and the manifest of a prepared folder."""
    try:
        table = pd.read_csv(
            folder / "quality.tsv",
            sep="\t",
            na_values=["n/a"],
            dtype=dict.fromkeys(_TEXT, str),
        )
        manifest = json.loads((folder / "prepare.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{folder}: expected a folder that `cortexicon prepare` wrote, found: {error}."
        ) from error
    return table, manifest


def choose_scans(used: pd.DataFrame) -> tuple[list[str], list[str]]:
    """Subjects of the scans to draw: the most striking ones, and some from the middle.

    A scan is as striking as the most extreme of its ranks in change between volumes, motion,
    global signal and masked regions; ranks, because no unit is common to them.

    Parameters
    ----------
    used : pandas.DataFrame
        Rows of the quality table, with `masked`.

    Returns
    -------
    striking, typical : list of str
        Subject ids; striking ones most extreme first.
    """
    measures = used[["max_dvars", "mean_fd", "global_signal_sd", "masked"]].astype(float)
    varying = measures.loc[:, measures.nunique() > 1]
    # Ties share their lowest rank: a measure that is 0 nearly everywhere makes nobody striking.
    rank = varying.rank(pct=True, method="min").max(axis=1).fillna(0.0)
    order = rank.sort_values(ascending=False, kind="stable").index
    subjects = used["subject_id"]
    striking = [str(subjects[row]) for row in order[:NUM_STRIKING]]
    rest = order[NUM_STRIKING:]
    middle = rest[max(0, len(rest) // 2 - NUM_TYPICAL // 2) :][:NUM_TYPICAL]
    return striking, [str(subjects[row]) for row in middle]


def draw_carpet(values: np.ndarray, tr: float, title: str) -> Figure:
    """A carpet plot: every region's z-scored series as a row of grey, DVARS above it.

    Power 2017 (NeuroImage 154:150), over regions in the order of the atlas instead of voxels.

    Parameters
    ----------
    values : numpy.ndarray of float, shape (time, regions)
        Any unit; regions with NaN or without variance are drawn in blue.
    tr : float
        Seconds.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(5.0, 2.9))
        figure.subplots_adjust(left=0.1, right=0.985, top=0.91, bottom=0.14, hspace=0.12)
        trace, carpet = figure.subplots(2, 1, sharex=True, height_ratios=(1, 3.4))
        trace.set_title(title)
    usable = np.isfinite(values).all(axis=0) & (np.ptp(values, axis=0) > 0)
    scaled = np.full(values.T.shape, np.nan)  # (regions, time)
    part = values[:, usable].astype(float)
    scaled[usable] = ((part - part.mean(axis=0)) / part.std(axis=0)).T
    seconds = np.arange(len(values)) * tr
    steps = dvars(values, usable)
    trace.plot(seconds[1:], steps, color=VERMILION, linewidth=0.8)
    trace.set_ylabel("DVARS")
    trace.set_ylim(0, max(2.5, 1.05 * float(steps.max())))
    carpet.set_facecolor(BLUE)
    extent = (0.0, len(values) * tr, len(scaled), 0)
    carpet.imshow(
        scaled,
        cmap="gray",
        vmin=-CARPET_SD,
        vmax=CARPET_SD,
        aspect="auto",
        interpolation="nearest",
        extent=extent,
    )
    carpet.set_ylabel("region")
    carpet.set_xlabel("s")
    return figure


def _draw_carpets(
    folder: Path, used: pd.DataFrame, subjects: list[str]
) -> dict[str, dict[str, str]]:
    """Carpets of some subjects, read in one pass over the cohort."""
    facts = used.set_index("subject_id")
    missing, drawn = set(subjects), {}
    for scan in stream_cohort(folder).scans:
        name = str(scan["subject_id"])
        if name in missing:
            missing.discard(name)
            caption = _caption(facts.loc[name])
            values = np.asarray(scan["time_series"])
            drawn[name] = _embed(draw_carpet(values, float(scan["tr"]), name), caption)
        if not missing:
            break
    return drawn


def _caption(row: pd.Series) -> str:
    """What is notable about one scan, in a line."""
    pieces = [f"max DVARS {row['max_dvars']:.2f}", f"global signal {row['global_signal_sd']:.2f}"]
    if pd.notna(row["mean_fd"]):
        pieces.insert(0, f"mean FD {row['mean_fd']:.2f} mm")
    if row["masked"]:
        pieces.append(f"{int(row['masked'])} masked regions")
    return ", ".join(pieces)


def _draw_measures(used: pd.DataFrame) -> Figure:
    """Histograms of the measures that vary."""
    known = {name: used[name].dropna().astype(float) for name in MEASURES}
    known = {name: column for name, column in known.items() if len(column)}
    rows = -(-len(known) // 3)
    with _style():
        figure, grid = new_figure(2.3 * rows, rows, 3)
        for axes, (name, column) in zip(grid.flat, known.items(), strict=False):
            bins = min(40, max(5, int(np.sqrt(len(column)) * 2)))
            axes.hist(column, bins=bins, color=BLUE)
            axes.axvline(column.median(), color=VERMILION, linewidth=1.2)
            finish(axes, MEASURES[name][0], MEASURES[name][1], "scans", legend=False)
        for axes in grid.flat[len(known) :]:
            axes.set_axis_off()
    return figure


def _draw_regions(folder: Path, used: pd.DataFrame) -> tuple[Figure, str]:
    """Where in the brain regions are masked, from the side and from above, and a caption."""
    regions = pd.read_csv(folder / "regions.tsv", sep="\t", na_values=["n/a"], dtype={"label": str})
    counts = dict.fromkeys(regions["label"], 0)
    for text in used["masked_regions"].dropna():
        for label in str(text).split(", "):
            if label in counts:
                counts[label] += 1
    share = np.array([counts[label] for label in regions["label"]]) / max(1, len(used))
    lost = share > 0
    with _style():
        figure, ((side, above),) = new_figure(3.4, 1, 2)
        for axes, (x, y), title in (
            (side, ("y", "z"), "From the side"),
            (above, ("x", "y"), "From above"),
        ):
            axes.scatter(regions[x], regions[y], s=10, color=FAINT)
            points = axes.scatter(
                regions[x][lost], regions[y][lost], s=40, c=share[lost], cmap="inferno_r", vmin=0.0
            )
            axes.set_aspect("equal")
            finish(axes, title, f"{x}, mm", f"{y}, mm", legend=False)
        if lost.any():
            figure.colorbar(points, ax=above, label="share of scans without signal")
    worst = [
        f"{regions['label'][place]} ({share[place]:.1%})"
        for place in np.argsort(-share, kind="stable")[:5]
        if share[place]
    ]
    text = "Region centres (grey); coloured where some scans have no signal. "
    return figure, text + (f"Most often: {', '.join(worst)}." if worst else "No region is masked.")


def _style() -> Any:
    from matplotlib import rc_context

    return rc_context(STYLE | {"axes.prop_cycle": f"cycler('color', ['{GREY}'])"})


def _embed(figure: Figure, caption: str) -> dict[str, str]:
    """A figure as PNG in base64; without matplotlib's version, so that bytes repeat."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return {"data": base64.b64encode(buffer.getvalue()).decode("ascii"), "caption": caption}


def _cards(
    table: pd.DataFrame, used: pd.DataFrame, manifest: Mapping[str, Any]
) -> list[tuple[str, str]]:
    hours = float((used["n_timepoints"].astype(float) * used["tr"]).sum()) / 3600
    trs = ", ".join(f"{value:g}" for value in sorted(used["tr"].round(3).unique())[:6])
    atlas = manifest.get("atlas") or {"name": "the files' own", "space": "unknown"}
    return [
        (f"{len(used)}", f"scans used of {len(table)} found"),
        (f"{int((table['status'] == 'refused').sum())}", "left out, with reasons below"),
        (f"{int(used['n_regions'].max())}", f"regions of {atlas['name']} ({atlas['space']})"),
        (f"{hours:.1f} h", "of signal"),
        (trs, "TR, s"),
        (f"{(used['masked'] > 0).mean():.1%}", "of scans lack some region"),
    ]


def _settings(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = dict(manifest["settings"])
    shown["participants sha256"] = manifest["participants"]["sha256"]
    if manifest.get("atlas"):
        shown |= {f"atlas {name}": value for name, value in manifest["atlas"].items()}
    return [(name.replace("_", " "), "none" if v is None else str(v)) for name, v in shown.items()]


def _records(table: pd.DataFrame, names: tuple[str, ...]) -> list[list[str]]:
    """Cells as text: three significant digits, nothing where there is no value."""
    return [[_cell(row[name]) for name in names] for _, row in table.iterrows()]


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, (float, np.floating)):
        return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"
    return str(value)
