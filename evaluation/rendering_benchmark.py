"""Pictures of a benchmark: systems, distributions, scatter, sites, calibration, cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .baselines import DESCRIPTIONS
from .benchmark_scores import answers_of
from .clinical import CLASS_REFERENCE, NUMERIC_FLOOR, NUMERIC_REFERENCE
from .rendering import (
    BLUE,
    DOTS_PER_INCH,
    FAINT,
    GREY,
    INK,
    ORANGE,
    PALETTE,
    STYLE,
    VERMILION,
    Picture,
    finish,
    new_figure,
)
from .rendering_clinical import with_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCES = (NUMERIC_REFERENCE, CLASS_REFERENCE)
COLUMNS = 4
SITE_SYSTEMS = 4
NOT_RANKED = " (not ranked)"


def shown_name(name: str, facts: Mapping[str, Any]) -> str:
    """A system's name, marked where it is never ranked."""
    return name if facts[name]["ranked"] else name + NOT_RANKED


def plain_baseline(name: str, facts: Mapping[str, Any]) -> bool:
    """Whether a row is the median, a control and the like, or a fitted baseline of ours."""
    return facts[name]["kind"] == "baseline"


def _colour(name: str, facts: Mapping[str, Any]) -> str:
    if name in REFERENCES:
        return ORANGE
    if facts[name]["control"]:
        return VERMILION
    return GREY if plain_baseline(name, facts) else BLUE


def draw_benchmark(
    folder: Path, results: Mapping[str, Any], predictions: Mapping[str, pd.DataFrame]
) -> dict[tuple[str, str], list[Picture]]:
    """Draw every figure into FOLDER/figures/*.png.

    Parameters
    ----------
    folder : Path
    results : mapping
        As written to results.json.
    predictions : mapping of str to DataFrame
        Split -> rows as `score_view` takes them.

    Returns
    -------
    dict of (str, str) to list of Picture
        (split, target) -> its pictures.
    """
    from matplotlib import rc_context

    facts, found = results["systems"], {}
    with rc_context(STYLE):
        for view, targets in results["scores"].items():
            for target, scored in targets.items():
                rows = predictions[view]
                rows = rows[rows["target"] == target]
                drawings = _drawings(scored, rows, target, facts)
                found[view, target] = [
                    _picture(folder, f"{name}_{view}_{target}", title, caption, drawing)
                    for name, title, caption, drawing in drawings
                ]
    return found


Drawing = tuple[str, str, str, Callable[[], "Figure | None"]]


def _drawings(
    scored: dict[str, Any], rows: pd.DataFrame, target: str, facts: Mapping[str, Any]
) -> list[Drawing]:
    marks = (
        "Orange: the connectivity baseline. Grey: other baselines. Blue: models. Red: controls. "
        "Hollow: never ranked."
    )
    drawings: list[Drawing] = [
        (
            "systems",
            "All systems",
            f"The same subjects, best first, 95 % intervals over subjects. {marks}",
            partial(draw_systems, scored, target, facts),
        )
    ]
    if scored["kind"] == "number":
        answers = answers_of(rows, numeric=True)
        names = [
            name
            for name in (*scored["ranking"], *scored["unranked"])
            if np.ptp(answers[name].y_hat) > 1e-9
        ]
        shown = {name: answers[name] for name in names}
        drawings += [
            (
                "distribution",
                f"Distribution of the predicted {target} beside the true one",
                "Grey: true values. A model that answers in a narrow range can have a fair error "
                "and still know little.",
                partial(draw_distributions, shown, target, facts),
            ),
            (
                "scatter",
                f"Predicted and true {target}",
                "One dot per held-out subject; on the dotted line a prediction is exact.",
                partial(draw_scatter, shown, target, facts),
            ),
        ]
    return [
        *drawings,
        (
            "sites",
            "Site by site",
            "Sites by number of subjects, 95 % intervals over subjects; the best systems, the "
            "connectivity baseline, and what knows the site alone.",
            partial(draw_sites, scored, target, facts),
        ),
        (
            "calibration",
            "Calibration",
            "Subjects in five groups of like size by prediction; on the dotted line the mean "
            "prediction is the mean truth. For classes only systems with a probability are drawn.",
            partial(draw_calibration, scored, target, facts),
        ),
        (
            "cost",
            "Cost against accuracy",
            "Seconds for one fold, fitting and prediction, on the machine of this run. "
            "The area of a point grows with the peak of memory.",
            partial(draw_cost, scored, target, facts),
        ),
    ]


def _picture(
    folder: Path, name: str, title: str, caption: str, drawing: Callable[[], Figure | None]
) -> Picture:
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    figure = drawing()
    if figure is None:
        return Picture(name, title, caption, None, "nothing to draw in these results")
    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    return Picture(name, title, caption, path)


def _known(value: Any) -> bool:
    """Whether a number is there; results.json holds None for one that is not finite."""
    return value is not None and bool(np.isfinite(value))


def _score_key(scored: Mapping[str, Any]) -> str:
    return "mae" if scored["kind"] == "number" else "auc"


def _interval(scores: Mapping[str, Any], key: str) -> tuple[float, float]:
    """The score's interval, or the score itself twice."""
    low, high = scores[f"{key}_interval"]
    return (low, high) if _known(low) and _known(high) else (scores[key], scores[key])


def _score_label(scored: Mapping[str, Any], target: str) -> str:
    if scored["kind"] == "number":
        unit = with_unit(target).partition(" ")[2]
        return f"mean absolute error {unit}, less is better"
    return "AUC, more is better"


def draw_systems(scored: dict[str, Any], target: str, facts: Mapping[str, Any]) -> Figure | None:
    """Every system's score with its interval: ranked ones, then unranked ones, then controls."""
    key = _score_key(scored)
    names = [
        name
        for name in (*scored["ranking"], *scored["unranked"], *scored["controls"])
        if _known(scored["systems"][name].get(key))
    ]
    if not names:
        return None
    figure, ((panel,),) = new_figure(1.1 + 0.27 * len(names))
    for row, name in enumerate(names):
        scores, colour = scored["systems"][name], _colour(name, facts)
        low, high = _interval(scores, key)
        panel.plot([low, high], [row, row], color=colour, linewidth=2.2, alpha=0.5)
        face = colour if facts[name]["ranked"] else "white"
        panel.plot(
            scores[key], row, "o", markersize=6, markeredgecolor=colour, markerfacecolor=face
        )
        panel.annotate(
            f"{scores[key]:.2f}",
            (high, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
        )
    floor = scored["systems"].get(NUMERIC_FLOOR, {}).get("mae") if key == "mae" else 0.5
    if floor is not None:
        panel.axvline(floor, color=INK, linewidth=0.8, linestyle=":")
    for border in (len(scored["ranking"]), len(scored["ranking"]) + len(scored["unranked"])):
        if 0 < border < len(names):
            panel.axhline(border - 0.5, color=FAINT, linewidth=1.0)
    panel.set_yticks(range(len(names)), [shown_name(name, facts) for name in names])
    panel.set_ylim(len(names) - 0.5, -0.6)
    panel.margins(x=0.08)
    finish(panel, f"{target}, n = {scored['num_subjects']}", _score_label(scored, target), "")
    panel.grid(axis="y", visible=False)
    return figure


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure, axes = new_figure(0.3 + height * rows, rows, columns, sharex=True)
    flat = list(axes.ravel())
    for unused in flat[count:]:
        unused.set_visible(False)
    return figure, flat[:count]


def _wrapped(text: str, width: int = 26) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def draw_distributions(
    answers: Mapping[str, Any], target: str, facts: Mapping[str, Any]
) -> Figure | None:
    """Histogram of each system's predictions over that of the true values."""
    if not answers:
        return None
    everything = np.concatenate([np.r_[a.y, a.y_hat.ravel()] for a in answers.values()])
    bins = np.linspace(everything.min(), everything.max() + 1e-9, 31).tolist()
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
            color=_colour(name, facts),
            label=f"predicted, SD {mine.y_hat.std():.1f}",
        )
        tallest = float(np.histogram(mine.y, bins)[0].max())
        peak = float(np.histogram(mine.y_hat, bins)[0].max()) / seeds
        # A narrow peak may leave the panel, or the true distribution would be flat.
        panel.set_ylim(0, 1.45 * max(tallest, min(peak, 2.0 * tallest)))
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
            color=_colour(name, facts),
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


def draw_sites(scored: dict[str, Any], target: str, facts: Mapping[str, Any]) -> Figure | None:
    """A forest of sites: the best systems, the reference, and the site's own mean."""
    key, systems = _score_key(scored), scored["systems"]
    known = [name for name in scored["ranking"] if systems[name].get("by_site")]
    always = [name for name in (*REFERENCES, "site mean") if name in known]
    models = [name for name in known if not plain_baseline(name, facts)]
    best = [name for name in (*models, *known) if name not in always]
    chosen = [*always, *dict.fromkeys(best)][: SITE_SYSTEMS + len(always) - 1]
    sizes: dict[str, int] = {}
    for name in chosen:
        for site, scores in systems[name]["by_site"].items():
            if _known(scores.get(key)):
                sizes[site] = max(sizes.get(site, 0), scores["num_subjects"])
    if not sizes:
        return None
    order = sorted(sizes, key=lambda site: (-sizes[site], site))
    figure, ((panel,),) = new_figure(1.2 + 0.42 * len(order))
    others = [colour for colour in PALETTE if colour not in (ORANGE, GREY)]
    for place, name in enumerate(chosen):
        colour = ORANGE if name in REFERENCES else GREY
        if name not in always:
            colour = others[(place - len(always)) % len(others)]
        offset = 0.7 * (place / max(1, len(chosen) - 1) - 0.5)
        drawn = [
            (row, systems[name]["by_site"][site])
            for row, site in enumerate(order)
            if site in systems[name]["by_site"]
        ]
        drawn = [(row, s) for row, s in drawn if _known(s.get(key))]
        for row, scores in drawn:
            panel.plot(_interval(scores, key), [row + offset] * 2, color=colour, linewidth=1.2)
        panel.plot(
            [scores[key] for _, scores in drawn],
            [row + offset for row, _ in drawn],
            "o",
            markersize=3.6,
            color=colour,
            label=shown_name(name, facts),
        )
    panel.set_yticks(range(len(order)), [f"{site} (n = {sizes[site]})" for site in order])
    panel.set_ylim(len(order) - 0.5, -0.5)
    if key == "auc":
        panel.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    finish(panel, f"{target} by site", _score_label(scored, target), "", legend=False)
    figure.legend(loc="outside lower center", ncols=min(3, len(chosen)), fontsize=7.5)
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
    figure, ((panel,),) = new_figure(4.2)
    colours = [colour for colour in PALETTE if colour != ORANGE]
    points = np.concatenate(
        [systems[n]["calibration"][side] for n in names for side in ("predicted", "true")]
    )
    ends = [points.min(), points.max()]
    panel.plot(ends, ends, color=INK, linewidth=0.9, linestyle=":")
    for place, name in enumerate(names):
        calibration = systems[name]["calibration"]
        figure_of_merit = (
            f"slope {calibration['slope']:.2f}"
            if _known(calibration.get("slope"))
            else f"Brier {calibration.get('brier', np.nan):.3f}"
        )
        panel.plot(
            calibration["predicted"],
            calibration["true"],
            marker="o",
            markersize=3.5,
            linewidth=1.0,
            linestyle="-" if facts[name]["ranked"] else "--",
            color=ORANGE if name in REFERENCES else colours[place % len(colours)],
            label=f"{shown_name(name, facts)}: {figure_of_merit}",
        )
    number = scored["kind"] == "number"
    x = f"mean predicted {with_unit(target)}" if number else "mean probability"
    y = f"mean true {with_unit(target)}" if number else "share of the class that sorts last"
    finish(panel, f"{target}", x, y, legend=False)
    figure.legend(loc="outside right upper", fontsize=7)
    return figure


def draw_cost(scored: dict[str, Any], target: str, facts: Mapping[str, Any]) -> Figure | None:
    """Score against seconds of one fold; the point grows with the memory."""
    key, systems = _score_key(scored), scored["systems"]
    names = [
        name
        for name in (*scored["ranking"], *scored["unranked"])
        if facts[name].get("cost") and (name in REFERENCES or name not in DESCRIPTIONS)
        if _known(systems[name].get(key))
    ]
    if not names:
        return None
    figure, ((panel,),) = new_figure(3.6)
    for name in names:
        cost, colour = facts[name]["cost"], _colour(name, facts)
        panel.scatter(
            cost["seconds"],
            systems[name][key],
            s=20 + 60 * np.sqrt(cost["peak_memory_mb"] / 1024),
            edgecolors=colour,
            facecolors=colour if facts[name]["ranked"] else "none",
            alpha=0.7,
        )
        panel.annotate(
            shown_name(name, facts),
            (cost["seconds"], systems[name][key]),
            xytext=(8, 3),
            textcoords="offset points",
            fontsize=7,
        )
    panel.set_xscale("log")
    panel.margins(x=0.25, y=0.15)
    finish(panel, f"{target}", "seconds for one fold", _score_label(scored, target))
    return figure
