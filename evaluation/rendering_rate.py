"""Draws the rate-distortion figure of a table of reconstructions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .rendering import (
    BLUE,
    DOTS_PER_INCH,
    GREY,
    INK,
    ORANGE,
    SKY,
    STYLE,
    VERMILION,
    finish,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PLAIN = {
    "latent": ("spatial PCA + k-means", SKY, "s"),
    "grid": ("k-means on region patches", BLUE, "o"),
}
_CODEC = {
    "latent": ("AVQ, latent layout", ORANGE, "D"),
    "grid": ("AVQ, grid layout", VERMILION, "D"),
}


def render_rate_distortion(table: Mapping[str, Any], path: str | Path) -> Path:
    """Write R2 against bits per second as a PNG, one panel per signal.

    Parameters
    ----------
    table : mapping
        See `reconstruction_table.table_markdown`.
    path : path
        Its folder is made if need be.
    """
    from matplotlib import rc_context

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        draw_rate_distortion(table).savefig(path, dpi=DOTS_PER_INCH, format="png")
    return path


def draw_rate_distortion(table: Mapping[str, Any]) -> Figure:
    """The Gaussian curve, the tokenizers that learn nothing and the codecs, one panel a signal."""
    parts = table["sections"]
    figure, (panels,) = new_figure(4.4, 1, len(parts))
    for axes, part in zip(panels, parts, strict=True):
        curve = part["gaussian_curve"]
        axes.plot(
            curve["bits_per_second"], curve["r2"], color=GREY, label="Gaussian reference", zorder=1
        )
        for layout in _PLAIN:
            rows = [row for row in part["rows"] if row["layout"] == layout]
            plain = [row for row in rows if not row["learned"]]
            _points(axes, plain, *_PLAIN[layout], linestyle=":")
            codecs = [row for row in rows if row["learned"]]
            _points(axes, codecs, *_CODEC[layout], linestyle="")
            for row in codecs:
                # A long name runs out of the panel; it must not squeeze it.
                axes.annotate(
                    Path(row["system"]).name,
                    (row["bits_per_second"], row["r2"]),
                    (6, -9),
                    textcoords="offset points",
                    fontsize=7,
                    color=INK,
                ).set_in_layout(False)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(min(0.0, *(row["r2"] for row in part["rows"])), 1.0)
        finish(axes, part["signal"], "bits per second of scan", "R², held-out scans")
        axes.legend(loc="lower right")
    return figure


def _points(
    axes: Axes, rows: list[dict[str, Any]], label: str, colour: str, marker: str, linestyle: str
) -> None:
    """R2 with its bootstrap interval over the bit rate; nothing without rows."""
    if not rows:
        return
    r2 = np.array([row["r2"] for row in rows], float)
    # A single scan has no interval.
    ends = np.array([row["r2_interval"] for row in rows], float)
    ends = np.where(np.isfinite(ends), ends, r2[:, None])
    axes.errorbar(
        [row["bits_per_second"] for row in rows],
        r2,
        yerr=np.abs(ends.T - r2),
        color=colour,
        marker=marker,
        markersize=5,
        linestyle=linestyle,
        linewidth=1.0,
        capsize=2.0,
        label=label,
        zorder=2,
    )
