"""Pictures of the clinical predictions: scatter, distributions, and the systems side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .baselines import DESCRIPTIONS
from .clinical import CLASS_REFERENCE, NUMERIC_FLOOR, NUMERIC_REFERENCE
from .predictions import missing_answers, read_predictions
from .rendering import BLUE, FAINT, GREY, INK, ORANGE, file_name, finish, new_figure
from .results import read_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PART_NAMES = {"test": "held-out subjects", "test_sites": "held-out sites"}
SHOWN_SYSTEMS = 3
UNITS = {"age": "years"}

Drawing = tuple[str, str, str, Callable[[], "Figure | None"] | None]


def with_unit(target: str) -> str:
    """'age' -> 'age (years)'; a target of unknown unit stays as it is."""
    return f"{target} ({UNITS[target]})" if target in UNITS else target


def clinical_figures(run: Path) -> list[Drawing]:
    """Name, title, caption and drawing function of every clinical figure of a run."""
    files = sorted((run / "predictions").glob("*.csv"))
    title = "Predicted and true values"
    if not files or not (run / "results.json").is_file():
        return [("predictions", title, "", None)]
    rows = read_predictions(files)
    clinical = read_json(run / "results.json")["clinical"]
    drawings: list[Drawing] = []
    for target, scored in clinical.items():
        drawings.append(
            (
                f"systems_{file_name(target)}",
                f"All systems: {target}",
                "Each system on the same subjects, best first, with 95 % intervals (bootstrap over "
                "subjects). Blue: models that read a scan through a language model. Orange: the "
                "connectivity baseline.",
                partial(draw_systems, scored, target),
            )
        )
        if scored["kind"] == "number":
            drawings.append(
                (
                    f"predictions_{file_name(target)}",
                    f"Predicted and true {target}",
                    "Above: one dot per held-out subject; on the line a prediction is exact. "
                    "Below: the distribution of predictions beside the true one. A model that "
                    "answers in a narrow range can have a fair error and still know little.",
                    partial(draw_predictions, rows, target),
                )
            )
    return drawings


def draw_systems(scored: dict[str, Any], target: str) -> Figure | None:
    """MAE (numbers) or AUC (classes) of every system with its interval, one panel per part."""
    parts = [part for part in PART_NAMES if part in scored["parts"]]
    if not parts:
        return None
    numeric = scored["kind"] == "number"
    key = "mae" if numeric else "auc"
    count = max(len(scored["parts"][part]["systems"]) for part in parts)
    figure, (panels,) = new_figure(1.0 + 0.3 * count, 1, len(parts))
    for panel, part in zip(panels, parts, strict=True):
        of_part = scored["parts"][part]
        names = [n for n in of_part["ranking"] if of_part["systems"][n].get(key) is not None]
        for row, name in enumerate(names):
            scores = of_part["systems"][name]
            colour = GREY if name in DESCRIPTIONS else BLUE
            colour = ORANGE if name in (NUMERIC_REFERENCE, CLASS_REFERENCE) else colour
            low, high = scores[f"{key}_interval"]
            if low is not None and high is not None:
                panel.plot([low, high], [row, row], color=colour, linewidth=2.2, alpha=0.55)
            panel.plot(scores[key], row, "o", color=colour, markersize=6)
            panel.annotate(
                f"{scores[key]:.2f}",
                (scores[key], row),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85},
            )
        floor = of_part["systems"].get(NUMERIC_FLOOR, {}).get("mae") if numeric else 0.5
        if floor is not None:
            panel.axvline(floor, color=INK, linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(names)), names)
        for label in panel.get_yticklabels():
            if label.get_text() not in DESCRIPTIONS:
                label.set_fontweight("bold")
        panel.set_ylim(len(names) - 0.5, -0.7)
        unit = f" ({UNITS[target]})" if target in UNITS else ""
        finish(
            panel,
            f"{PART_NAMES[part]}, n = {of_part['num_subjects']}",
            f"mean absolute error{unit}, less is better" if numeric else "AUC, more is better",
            "",
        )
        panel.grid(axis="y", visible=False)
    return figure


def draw_predictions(rows: pd.DataFrame, target: str) -> Figure | None:
    """Predicted against true, and both distributions, of our models and the baseline."""
    rows = rows[(rows["target"] == target) & (rows["part"] == "test")]
    if not len(rows):
        return None
    rows = rows[~missing_answers(rows, numeric=True)]
    values = rows.assign(y=rows["y"].astype(float), y_hat=rows["y_hat"].astype(float))
    systems = list(values["system"].drop_duplicates())
    models = [name for name in systems if name not in DESCRIPTIONS]
    baseline = [name for name in systems if name == NUMERIC_REFERENCE]
    shown = [*models[: SHOWN_SYSTEMS - len(baseline)], *baseline]
    if not shown:
        return None
    low, high = np.percentile(np.r_[values["y"], values["y_hat"]], [0, 100])
    pad = 0.04 * (high - low) or 1.0
    bins = np.linspace(low - pad, high + pad, 31)
    figure, axes = new_figure(
        5.4, 2, len(shown), sharex=True, gridspec_kw={"height_ratios": [2.0, 1.0]}
    )
    tallest = 0.0
    for column, name in enumerate(shown):
        mine = values[values["system"] == name]
        colour = ORANGE if name == NUMERIC_REFERENCE else BLUE
        scatter, shapes = axes[:, column]
        scatter.plot(bins[[0, -1]], bins[[0, -1]], color=GREY, linewidth=0.9, linestyle=":")
        scatter.scatter(
            mine["y"], mine["y_hat"], s=16, color=colour, alpha=0.55, edgecolors="white",
            linewidths=0.3,
        )  # fmt: skip
        scatter.set_ylim(bins[0], bins[-1])
        scatter.set_xlim(bins[0], bins[-1])
        finish(scatter, name, f"true {with_unit(target)}", f"predicted {with_unit(target)}")
        scatter.tick_params(labelbottom=True)
        shapes.hist(mine["y"], bins, color=FAINT, label=f"true, SD {mine['y'].std():.1f}")
        heights, _, _ = shapes.hist(
            mine["y_hat"],
            bins,
            histtype="step",
            color=colour,
            linewidth=1.6,
            label=f"predicted, SD {mine['y_hat'].std():.1f}",
        )
        # One constant answer would flatten the true distribution: its bar may leave the panel.
        tallest = max(tallest, float(np.histogram(mine["y"], bins)[0].max()))
        tallest = max(tallest, min(float(heights.max()), 2.0 * tallest))
        finish(shapes, "", with_unit(target), "subjects")
    for panel in axes[1]:
        panel.set_ylim(0, 1.25 * tallest)
    return figure
