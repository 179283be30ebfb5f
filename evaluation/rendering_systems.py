"""Names and colours of a benchmark's systems, and pictures with a panel for each of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from .baselines import DESCRIPTIONS
from .clinical import CLASS_REFERENCE, NUMERIC_REFERENCE
from .rendering import BLUE, FAINT, GREY, INK, ORANGE, VERMILION, finish, new_figure
from .rendering_clinical import with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCES = (NUMERIC_REFERENCE, CLASS_REFERENCE)
COLUMNS = 4
NOT_RANKED = " (not ranked)"


def shown_name(name: str, facts: Mapping[str, Any]) -> str:
    """A system's name, marked where it is never ranked."""
    return name if facts[name]["ranked"] else name + NOT_RANKED


def plain_baseline(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a row is the median, a control and the like, or a fitted baseline of ours."""
    return facts[name]["kind"] == "baseline"


def colour_of(name: str, facts: Mapping[str, Any]) -> str:
    """The reference, controls, other baselines and models, each in one colour."""
    if name in REFERENCES:
        return ORANGE
    if facts[name]["control"]:
        return VERMILION
    return GREY if plain_baseline(name, facts) else BLUE


def known(value: Any) -> bool:
    """Whether a number is there; results.json holds None for one that is not finite."""
    return value is not None and bool(np.isfinite(value))


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure, axes = new_figure(0.3 + height * rows, rows, columns, sharex=True)
    flat = list(axes.ravel())
    for unused in flat[count:]:
        unused.set_visible(False)
    for lowest in flat[max(0, count - columns) : count]:  # also above a place that is left empty
        lowest.tick_params(labelbottom=True)
    return figure, flat[:count]


def _wrapped(text: str, width: int = 26) -> str:
    return "\n".join(textwrap.wrap(text, width))


def draw_distributions(
    answers: Mapping[str, Any], target: str, facts: Mapping[str, Any]
) -> Figure | None:
    """Histogram of each system's predictions over that of the true values."""
    if not answers:
        return None
    everything = np.concatenate([np.r_[a.y, a.y_hat.ravel()] for a in answers.values()])
    bins = np.linspace(everything.min(), everything.max() + 1e-9, 31).tolist()
    tallest = max(float(np.histogram(mine.y, bins)[0].max()) for mine in answers.values())
    figure, panels = _grid(len(answers), 1.9)
    for panel, (name, mine) in zip(panels, answers.items(), strict=True):
        panel.hist(mine.y, bins, color=FAINT, label=f"true, SD {mine.y.std():.1f}")
        seeds = mine.y_hat.shape[1]
        panel.hist(
            mine.y_hat.ravel(),
            bins,
            weights=np.full(mine.y_hat.size, 1 / seeds),
            histtype="step",
            linewidth=1.5,
            color=colour_of(name, facts),
            label=f"predicted, SD {mine.y_hat.std():.1f}",
        )
        # A narrow peak leaves the panel, or the true distribution would be flat. One scale for all
        # who answered about as many people.
        mine_tallest = float(np.histogram(mine.y, bins)[0].max())
        panel.set_ylim(0, 2.2 * (tallest if mine_tallest > 0.5 * tallest else mine_tallest))
        finish(panel, _wrapped(shown_name(name, facts)), "", "")
        panel.title.set_fontsize(8)
        panel.legend(fontsize=6.5, loc="upper right", handlelength=1.0)
    figure.supxlabel(with_unit(target), fontsize=9)
    figure.supylabel("subjects", fontsize=9)
    return figure


def draw_scatter(
    answers: Mapping[str, Any], target: str, facts: Mapping[str, Any]
) -> Figure | None:
    """Predicted against true, with the line of exact prediction."""
    if not answers:
        return None
    everything = np.concatenate([np.r_[a.y, a.y_hat.ravel()] for a in answers.values()])
    ends = np.array([everything.min(), everything.max()])
    ends = ends + np.array([-0.04, 0.04]) * np.ptp(ends)
    figure, panels = _grid(len(answers), 2.4)
    for panel, (name, mine) in zip(panels, answers.items(), strict=True):
        panel.plot(ends, ends, color=INK, linewidth=0.9, linestyle=":")
        panel.scatter(
            np.repeat(mine.y, mine.y_hat.shape[1]),
            mine.y_hat.ravel(),
            s=7,
            color=colour_of(name, facts),
            alpha=0.4,
            linewidths=0,
        )
        panel.set_xlim(ends)
        panel.set_ylim(ends)
        finish(panel, _wrapped(shown_name(name, facts)), "", "")
        panel.title.set_fontsize(8)
    figure.supxlabel(f"true {with_unit(target)}", fontsize=9)
    figure.supylabel(f"predicted {with_unit(target)}", fontsize=9)
    return figure


def draw_calibration(
    scored: dict[str, Any], target: str, facts: Mapping[str, Any]
) -> Figure | None:
    """Mean truth against mean prediction in groups of like prediction."""
    systems = scored["systems"]
    names = [
        name
        for name in (*scored["ranking"], *scored["unranked"])
        if name in REFERENCES or name not in DESCRIPTIONS
        if np.ptp(systems[name].get("calibration", {}).get("predicted", [0.0])) > 1e-9
    ]
    if not names:
        return None
    points = np.concatenate(
        [systems[n]["calibration"][side] for n in names for side in ("predicted", "true")]
    )
    ends = np.array([points.min(), points.max()])
    ends = ends + np.array([-0.06, 0.06]) * np.ptp(ends)
    figure, panels = _grid(len(names), 2.1)
    for panel, name in zip(panels, names, strict=True):
        calibration = systems[name]["calibration"]
        panel.plot(ends, ends, color=INK, linewidth=0.9, linestyle=":")
        panel.plot(
            calibration["predicted"],
            calibration["true"],
            marker="o",
            markersize=4,
            linewidth=1.2,
            color=colour_of(name, facts),
            markerfacecolor=colour_of(name, facts) if facts[name]["ranked"] else "white",
        )
        slope = calibration.get("slope")
        told = f"slope {slope:.2f}" if known(slope) else f"Brier {calibration['brier']:.3f}"
        panel.text(0.04, 0.93, told, transform=panel.transAxes, va="top", fontsize=7.5)
        panel.set_xlim(ends)
        panel.set_ylim(ends)
        finish(panel, _wrapped(shown_name(name, facts)), "", "")
        panel.title.set_fontsize(8)
    number = scored["kind"] == "number"
    x = f"mean predicted {with_unit(target)}" if number else "mean probability"
    y = f"mean true {with_unit(target)}" if number else "share of the class that sorts last"
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return figure
