"""Pictures of the connectivity stream: matrices before and after, and what a code means."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .rendering import BLUE, VERMILION, new_figure
from .rendering_codec import Examples, readable, region_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: where `cortexicon evaluate` leaves what these pictures are drawn from, beside its scores
EXAMPLES = "connectome_examples.npz"
CONNECTIONS = 40


def draw_matrices(examples: Examples) -> Figure:
    """Fisher-z matrices of scans, left as measured, right as decoded from their codes.

    Below the diagonal the whole, above it the deviation from the mean over training people.
    """
    order, groups = region_order(examples)
    raw, decoded, mean = examples["raw"], examples["decoded"], examples["mean"]
    figure, panels = new_figure(3.9 * len(raw), len(raw), 2)
    limit = float(np.nanpercentile(np.abs(raw), 99))
    below = np.tril(np.ones_like(mean, dtype=bool))
    for scan, row in enumerate(panels):
        for panel, matrix, what in zip(
            row, (raw[scan], decoded[scan]), ("as measured", "decoded from the codes"), strict=True
        ):
            deviation = 2.0 * (matrix - mean)
            shown = np.where(below, matrix[np.ix_(order, order)], deviation[np.ix_(order, order)])
            image = panel.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit)
            panel.set_title(f"held-out scan {scan + 1}, {what}")
            _group_ticks(panel, groups)
        bar = figure.colorbar(image, ax=list(row), shrink=0.8, pad=0.01)
        bar.set_label("Fisher z; above the diagonal\ntwice the deviation from the mean")
        bar.outline.set_visible(False)
    return figure


def draw_meaning(examples: Examples) -> Figure:
    """What changes in a matrix when one token says another code: as a matrix and in the brain."""
    from nilearn.plotting.glass_brain import plot_brain_schematics

    order, groups = region_order(examples)
    places, effects = examples["coordinates"], examples["effects"]
    figure, panels = new_figure(
        2.9 * len(effects), len(effects), 3, gridspec_kw={"width_ratios": [160, 150, 180]}
    )
    for number, (effect, row) in enumerate(zip(effects, panels, strict=True)):
        limit = float(np.percentile(np.abs(effect), 99.5))
        image = row[0].imshow(effect[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit)
        token, (code, instead) = examples["effect_tokens"][number], examples["effect_codes"][number]
        row[0].set_title(f"token {token}: code {code} instead of {instead}")
        _group_ticks(row[0], groups)
        bar = figure.colorbar(image, ax=row[0], shrink=0.8, pad=0.01)
        bar.set_label("change of Fisher z")
        bar.outline.set_visible(False)
        upper = np.triu_indices(len(effect), 1)
        strongest = np.argsort(-np.abs(effect[upper]))[:CONNECTIONS]
        for panel, direction, across, up in ((row[1], "z", 0, 1), (row[2], "r", 1, 2)):
            plot_brain_schematics(panel, direction, alpha=0.5, linewidth=0.8)
            for pair in strongest:
                a, b = upper[0][pair], upper[1][pair]
                value = effect[a, b]
                panel.plot(
                    places[[a, b], across],
                    places[[a, b], up],
                    color=VERMILION if value > 0 else BLUE,
                    linewidth=1.6 * abs(value) / max(limit, 1e-9),
                    alpha=0.6,
                )
            panel.set_xlim((-110, 80) if across == 1 else (-80, 80))
            panel.set_ylim((-80, 90) if up == 2 else (-112, 80))
            panel.set_aspect("equal")
            panel.set_axis_off()
        row[1].set_title(f"{CONNECTIONS} strongest, from above")
        row[2].set_title("from the right")
        for side, place in (("L", -72), ("R", 72)):
            row[1].text(place, 72, side, ha="center", va="center", fontsize=8)
    return figure


def _group_ticks(panel: Axes, groups: list[tuple[str, int, int]]) -> None:
    """Names of networks on the left, lines between them."""
    for _, first, _ in groups[1:]:
        panel.axhline(first - 0.5, color="white", linewidth=0.6)
        panel.axvline(first - 0.5, color="white", linewidth=0.6)
    panel.set_xticks([])
    names = ["no network" if name == "none" else readable(name) for name, _, _ in groups]
    panel.set_yticks([(a + b - 1) / 2 for _, a, b in groups], names)
    panel.tick_params(length=0, labelsize=6)


def write_examples(path: Path, **arrays: np.ndarray) -> None:
    """Write what the pictures need, through a temporary file.

    ``labels``, ``networks``, ``hemispheres`` (regions,), ``coordinates`` (regions, 3) in mm;
    ``raw``, ``decoded`` (scans, regions, regions), ``mean`` (regions, regions); ``effects``
    (shown, regions, regions), ``effect_tokens`` (shown,), ``effect_codes`` (shown, 2).
    """
    temporary = path.with_name(f".{path.stem}.tmp.npz")
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    temporary.replace(path)


FIGURES = (
    (
        "connectome_matrices",
        "One person's connectivity as 64 codes",
        "Fisher-z matrices of held-out scans. Below the diagonal the matrix itself; above it, "
        "twice as strong, what is this person's own: the deviation from the training mean.",
        draw_matrices,
    ),
    (
        "connectome_meaning",
        "What a code of connectivity means",
        "What changes in the decoded matrix when one token says one code instead of another: the "
        "two codes of held-out scans that lie farthest apart along the token's loudest component. "
        "In the brain the connections that change most: orange rises, blue falls.",
        draw_meaning,
    ),
)
