"""Pictures of a benchmark: systems, distributions, scatter, sites, calibration, cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .baselines import DESCRIPTIONS
from .benchmark_scores import answers_of
from .clinical import NUMERIC_FLOOR
from .rendering import (
    DOTS_PER_INCH,
    FAINT,
    GREY,
    INK,
    ORANGE,
    PALETTE,
    STYLE,
    Picture,
    file_name,
    finish,
    new_figure,
)
from .rendering_clinical import with_unit
from .rendering_systems import (
    REFERENCES,
    colour_of,
    draw_calibration,
    draw_distributions,
    draw_scatter,
    known,
    plain_baseline,
    shown_name,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITE_SYSTEMS = 4
NUM_COLOURS = 128


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
        "Orange: the connectivity baseline. Grey: other baselines. Blue: models. Hollow: never "
        "ranked. Dotted: the median, or chance."
    )
    drawings: list[Drawing] = [
        (
            "systems",
            "All systems",
            f"The same subjects, best first, 95 % intervals over subjects. {marks}",
            partial(draw_systems, scored, target, facts),
        ),
        (
            "controls",
            "Controls",
            "Trained and tested like their systems, on labels or scans that say nothing about the "
            "subject. An interval that reaches the dotted line (the median, or chance) passes.",
            partial(draw_controls, scored, target, facts),
        ),
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
            "The area of a point grows with the peak of memory. Hollow: never ranked.",
            partial(draw_cost, scored, target, facts),
        ),
    ]


def _picture(
    folder: Path, name: str, title: str, caption: str, drawing: Callable[[], Figure | None]
) -> Picture:
    from PIL import Image

    name = file_name(name)
    figure = drawing()
    if figure is None:
        return Picture(name, title, caption, None, "nothing to draw in these results")
    path = folder / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DOTS_PER_INCH)
    # A report holds forty pictures: with few colours each it stays small enough to be sent around.
    with Image.open(drawn) as picture:
        picture.convert("RGB").quantize(NUM_COLOURS).save(path, optimize=True)
    return Picture(name, title, caption, path)


def _score_key(scored: Mapping[str, Any]) -> str:
    return "mae" if scored["kind"] == "number" else "auc"


def _interval(scores: Mapping[str, Any], key: str) -> tuple[float, float]:
    """The score's interval, or the score itself twice."""
    low, high = scores[f"{key}_interval"]
    return (low, high) if known(low) and known(high) else (scores[key], scores[key])


def _score_label(scored: Mapping[str, Any], target: str) -> str:
    if scored["kind"] == "number":
        unit = with_unit(target).partition(" ")[2]
        return f"mean absolute error {unit}, less is better"
    return "AUC, more is better"


def draw_systems(scored: dict[str, Any], target: str, facts: Mapping[str, Any]) -> Figure | None:
    """Every system's score with its interval: ranked ones, then unranked ones."""
    names = [*scored["ranking"], *scored["unranked"]]
    key, title = _score_key(scored), f"{target}, n = {scored['num_subjects']}"
    floor = scored["systems"].get(NUMERIC_FLOOR, {}).get("mae") if key == "mae" else 0.5
    return _forest(scored, names, facts, title, _score_label(scored, target), key, floor)


def draw_controls(scored: dict[str, Any], target: str, facts: Mapping[str, Any]) -> Figure | None:
    """Every control's score with its interval, those of one system together.

    Numbers: the error minus the median's on the same people, who may be those of one fold.
    """
    names = sorted(scored["controls"], key=lambda name: (facts[name]["control_of"], name))
    title, label = f"controls of {target}", _score_label(scored, target)
    if _score_key(scored) == "auc":
        return _forest(scored, names, facts, title, label, "auc", 0.5)
    label += ": minus the median's, same people"
    return _forest(scored, names, facts, title, label, "difference_to_floor", 0.0)


def _forest(
    scored: dict[str, Any],
    names: list[str],
    facts: Mapping[str, Any],
    title: str,
    label: str,
    key: str,
    floor: float | None,
) -> Figure | None:
    """Scores and intervals, one row each; a dotted line where nothing is known of a subject."""
    names = [name for name in names if known(scored["systems"][name].get(key))]
    if not names:
        return None
    figure, ((panel,),) = new_figure(1.1 + 0.27 * len(names))
    for row, name in enumerate(names):
        scores, colour = scored["systems"][name], colour_of(name, facts)
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
    if floor is not None:
        panel.axvline(floor, color=INK, linewidth=0.8, linestyle=":")
    ranked = sum(facts[name]["ranked"] for name in names)
    if 0 < ranked < len(names) and facts[names[-1]]["ranked"] is False:
        panel.axhline(ranked - 0.5, color=FAINT, linewidth=1.0)
    panel.set_yticks(range(len(names)), [shown_name(name, facts) for name in names])
    panel.set_ylim(len(names) - 0.5, -0.6)
    panel.margins(x=0.08)
    finish(panel, title, label, "")
    panel.grid(axis="y", visible=False)
    return figure


def draw_sites(scored: dict[str, Any], target: str, facts: Mapping[str, Any]) -> Figure | None:
    """A forest of sites: the best systems, the reference, and the site's own mean."""
    key, systems = _score_key(scored), scored["systems"]
    ranked = [name for name in scored["ranking"] if systems[name].get("by_site")]
    always = [name for name in (*REFERENCES, "site mean") if name in ranked]
    models = [name for name in ranked if not plain_baseline(name, facts)]
    best = [name for name in (*models, *ranked) if name not in always]
    chosen = [*always, *dict.fromkeys(best)][: SITE_SYSTEMS + len(always) - 1]
    sizes: dict[str, int] = {}
    for name in chosen:
        for site, scores in systems[name]["by_site"].items():
            if known(scores.get(key)):
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
        drawn = [(row, s) for row, s in drawn if known(s.get(key))]
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


def draw_cost(scored: dict[str, Any], target: str, facts: Mapping[str, Any]) -> Figure | None:
    """Score against seconds of one fold; the point grows with the memory."""
    key, systems = _score_key(scored), scored["systems"]
    names = [
        name
        for name in (*scored["ranking"], *scored["unranked"])
        if facts[name].get("cost") and (name in REFERENCES or name not in DESCRIPTIONS)
        if known(systems[name].get(key))
    ]
    if not names:
        return None
    figure, ((panel,),) = new_figure(max(3.6, 0.9 + 0.21 * len(names)))
    # Many points lie close together: each has a number, and the list beside the panel its name.
    for number, name in enumerate(names, 1):
        cost, colour = facts[name]["cost"], colour_of(name, facts)
        panel.scatter(
            cost["seconds"],
            systems[name][key],
            s=20 + 60 * np.sqrt(cost["peak_memory_mb"] / 1024),
            edgecolors=colour,
            facecolors=colour if facts[name]["ranked"] else "none",
            alpha=0.7,
            label=f"{number}  {shown_name(name, facts)}: {cost['seconds']:,.0f} s, "
            f"{cost['peak_memory_mb'] / 1024:.1f} GB",
        )
        panel.annotate(
            str(number),
            (cost["seconds"], systems[name][key]),
            xytext=(6, 4 if number % 2 else -9),
            textcoords="offset points",
            fontsize=7.5,
        )
    panel.set_xscale("log")
    panel.margins(x=0.12, y=0.15)
    title, label = f"{target}", _score_label(scored, target)
    finish(panel, title, "seconds for one fold", label, legend=False)
    figure.legend(loc="outside right upper", fontsize=7, handlelength=1.5, handletextpad=1.0)
    return figure
