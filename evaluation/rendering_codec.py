"""Pictures of the codec: carpets, connectivity, the brain, codes and spectra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .rendering import BLUE, FAINT, GREY, INK, PALETTE, VERMILION, finish, new_figure
from .scores import fisher_z, r2_from_sums, squared_error_sums, valid_regions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Examples = dict[str, np.ndarray]
SHOWN_SCANS = 2
RASTER_SCANS = 4


def load_examples(path: Path) -> Examples:
    """Read `reconstruction_examples.npz` (written by `ReconstructionScores.write_examples`)."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def draw_examples(function: Callable[[Examples], Figure], path: Path) -> Figure:
    """Load the examples and draw them."""
    return function(load_examples(path))


def region_order(examples: Examples) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """Order the regions by network, else by hemisphere, else as they are.

    Returns
    -------
    order : int array, (regions,)
    groups : list of (name, first row, row after the last)
        Empty if neither is known.
    """
    names = examples["networks"] if (examples["networks"] != "").any() else examples["hemispheres"]
    if not (names != "").any():
        return np.arange(len(names)), []
    names = np.where(names == "", "other", names)
    order = np.lexsort((examples["coordinates"][:, 1], names))
    found, starts = np.unique(names[order], return_index=True)
    ends = [*starts[1:], len(names)]
    return order, [
        (str(name), int(a), int(b)) for name, a, b in zip(found, starts, ends, strict=True)
    ]


def _group_strip(axes: Axes, groups: list[tuple[str, int, int]], num_regions: int) -> None:
    """A coloured bar left of a region axis, with the groups' names where there is room."""
    from matplotlib.patches import Rectangle

    for (name, first, last), colour in zip(groups, PALETTE * 4, strict=False):
        axes.add_patch(
            Rectangle(
                (-0.018, first - 0.5),
                0.012,
                last - first,
                color=colour,
                linewidth=0,
                transform=axes.get_yaxis_transform(),
                clip_on=False,
            )
        )
        if last - first >= 0.035 * num_regions:
            axes.text(
                -0.025,
                (first + last - 1) / 2,
                readable(name),
                transform=axes.get_yaxis_transform(),
                ha="right",
                va="center",
                fontsize=7.5,
            )
    axes.set_yticks([])


def readable(name: str) -> str:
    """'DorsalAttention' -> 'Dorsal Attention', 'L' -> 'left'."""
    if name in ("L", "R"):
        return {"L": "left", "R": "right"}[name]
    return "".join(
        f" {c}" if i and c.isupper() and name[i - 1].islower() else c for i, c in enumerate(name)
    )


def draw_carpets(examples: Examples) -> Figure:
    """Regions x time, raw beside reconstructed, for a few held-out scans."""
    order, groups = region_order(examples)
    count = min(SHOWN_SCANS, len(examples["subject_ids"]))
    figure, axes = new_figure(3.0 * count + 0.3, count, 2, sharey=True)
    step = float(examples["seconds_per_sample"])
    for row in range(count):
        raw = examples[f"raw_{row}"].astype(np.float32)
        decoded = examples[f"reconstruction_{row}"].astype(np.float32)
        sums = squared_error_sums(raw, decoded, examples["region_mask"][row])
        r2 = float(r2_from_sums(np.nansum(sums[0]), np.nansum(sums[1])))
        windows = len(examples[f"codes_{row}"])
        for column, (values, what) in enumerate(((raw, "raw"), (decoded, "decoded from codes"))):
            panel = axes[row, column]
            image = panel.imshow(
                values[:, order].T,
                aspect="auto",
                cmap="gray",
                vmin=-2,
                vmax=2,
                interpolation="none",
                extent=(0, len(raw) * step, len(order) - 0.5, -0.5),
            )
            for window in range(1, windows):
                panel.axvline(
                    window * len(raw) / windows * step, color=PALETTE[1], linewidth=0.8, alpha=0.8
                )
            label = f", R² {r2:.2f}" if column else f": {examples['subject_ids'][row]}"
            panel.set_title(what + label)
            panel.set_xlabel("time (s)")
            panel.spines[:].set_visible(False)
        _group_strip(axes[row, 0], groups, len(order))
        if not groups:
            axes[row, 0].set_ylabel("region")
    bar = figure.colorbar(image, ax=axes, shrink=0.5, pad=0.015, aspect=28)
    bar.set_label("signal (SD of the scan's region)")
    bar.outline.set_visible(False)
    return figure


def draw_connectivity(examples: Examples) -> Figure:
    """Fisher-z matrices before and after, for the group's mean and for one scan."""
    order, groups = region_order(examples)
    raw = examples["raw_0"].astype(np.float64)
    valid = valid_regions(raw, examples["region_mask"][0])
    rows = [
        (
            "mean of held-out scans",
            examples["raw_connectivity"],
            examples["decoded_connectivity"],
        ),
        (
            f"one scan: {examples['subject_ids'][0]}",
            fisher_z(raw, valid),
            fisher_z(examples["reconstruction_0"].astype(np.float64), valid),
        ),
    ]
    figure, axes = new_figure(6.4, 2, 3)
    limit = float(np.nanpercentile(np.abs(np.concatenate([r[1] for r in rows])), 99))
    for row, (title, before, after) in enumerate(rows):
        for column, (vector, what) in enumerate(
            ((before, "raw"), (after, "decoded"), (after - before, "decoded − raw"))
        ):
            panel = axes[row, column]
            matrix = _square(vector, len(order))[np.ix_(order, order)]
            image = panel.imshow(
                matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="none"
            )
            panel.set_facecolor("#EDEEF0")  # pairs of regions without a signal
            panel.set_title(f"{what}\n{title}" if column == 0 else what)
            for _, _, end in groups[:-1]:
                panel.axhline(end - 0.5, color=INK, linewidth=0.3)
                panel.axvline(end - 0.5, color=INK, linewidth=0.3)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
            panel.set_xlabel("region")
        _group_strip(axes[row, 0], groups, len(order))
        if not groups:
            axes[row, 0].set_ylabel("region")
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=30, extend="both")
    bar.set_label("connectivity (Fisher z)")
    bar.outline.set_visible(False)
    return figure


def _square(vector: np.ndarray, size: int) -> np.ndarray:
    """Upper triangle back to a symmetric matrix; the diagonal is NaN."""
    matrix = np.full((size, size), np.nan)
    rows, columns = np.triu_indices(size, 1)
    matrix[rows, columns] = vector
    matrix[columns, rows] = vector
    return matrix


def draw_brain(examples: Examples) -> Figure:
    """R2 of each region at its place in the brain, seen from left, above, behind and right."""
    from nilearn.plotting.glass_brain import plot_brain_schematics

    values, places = examples["r2_per_region"].astype(float), examples["coordinates"]
    known = np.isfinite(values)
    figure, (panels,) = new_figure(2.7, 1, 4, gridspec_kw={"width_ratios": [180, 150, 150, 180]})
    low, high = np.nanpercentile(values, [2, 98]) if known.any() else (0.0, 1.0)
    views = (
        ("l", "left", 1, 2, known & (places[:, 0] <= 0)),
        ("z", "above", 0, 1, known),
        ("y", "behind", 0, 2, known),
        ("r", "right", 1, 2, known & (places[:, 0] >= 0)),
    )
    axis_names = "x (mm)", "y (mm)", "z (mm)"
    for panel, (direction, title, across, up, shown) in zip(panels, views, strict=True):
        plot_brain_schematics(panel, direction, alpha=0.6, linewidth=0.8)
        # What lies nearest to the viewer is drawn last.
        depth = {"l": -places[:, 0], "r": places[:, 0], "z": places[:, 2], "y": -places[:, 1]}
        order = np.flatnonzero(shown)[np.argsort(depth[direction][shown])]
        points = panel.scatter(
            places[order, across],
            places[order, up],
            c=values[order],
            cmap="cividis",
            vmin=low,
            vmax=high,
            s=26,
            edgecolors="white",
            linewidths=0.4,
            zorder=5,
        )
        missing = ~known
        panel.scatter(
            places[missing, across], places[missing, up], marker="x", s=14, color=GREY, zorder=4
        )
        panel.set_xlim((-110, 80) if across == 1 else (-80, 80))
        panel.set_ylim((-80, 90) if up == 2 else (-112, 80))
        panel.set_aspect("equal")
        panel.set_title(title)
        panel.set_xlabel(axis_names[across])
        panel.set_ylabel(axis_names[up])
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, colors=GREY)
    bar = figure.colorbar(points, ax=panels, shrink=0.75, aspect=20, pad=0.01, extend="both")
    bar.set_label("R², held out")
    bar.outline.set_visible(False)
    return figure


def draw_codebook(examples: Examples) -> Figure:
    """How often each code occurs, by rank, and the spectrum that the codes keep."""
    counts = np.sort(examples["code_counts"])[::-1].astype(float)
    figure, ((ranks, spectrum),) = new_figure(3.3, 1, 2)
    used = counts[counts > 0]
    ranks.plot(np.arange(1, len(used) + 1), used / used.sum(), color=BLUE, label="codes, by rank")
    ranks.axhline(
        1 / len(counts), color=GREY, linestyle=":", linewidth=1.0, label="all codes alike"
    )
    ranks.axvline(len(counts), color=FAINT, linewidth=1.0)
    ranks.set_xscale("log")
    ranks.set_yscale("log")
    finish(
        ranks,
        f"{len(used)} of {len(counts)} codes used ({len(used) / len(counts):.0%})",
        "rank of the code",
        "share of all tokens",
    )
    frequencies = examples["frequencies"]
    spectrum.plot(frequencies, examples["raw_power"], color=INK, label="raw")
    spectrum.plot(frequencies, examples["decoded_power"], color=VERMILION, label="decoded")
    spectrum.set_yscale("log")
    finish(spectrum, "Mean power spectrum", "frequency (Hz)", "power (SD² per bin)")
    return figure


def draw_codes(examples: Examples) -> Figure:
    """The tokens of each window, coloured by how common their code is."""
    counts = examples["code_counts"].astype(float)
    frequency = counts / max(1.0, counts.sum())
    scans = range(min(RASTER_SCANS, len(examples["subject_ids"])))
    rows = [(i, window) for i in scans for window in examples[f"codes_{i}"]]
    image = np.log10(np.maximum(np.array([frequency[window] for _, window in rows]), 1e-9))
    figure, ((panel,),) = new_figure(0.9 + 0.22 * len(rows), 1, 1)
    shown = panel.imshow(image, aspect="auto", cmap="cividis", interpolation="none")
    first = [next(k for k, (i, _) in enumerate(rows) if i == scan) for scan in scans]
    for start in first[1:]:
        panel.axhline(start - 0.5, color="white", linewidth=2.5)
    ends = [*first[1:], len(rows)]
    panel.set_yticks(
        [(a + b - 1) / 2 for a, b in zip(first, ends, strict=True)],
        [str(examples["subject_ids"][scan]) for scan in scans],
    )
    panel.tick_params(length=0)
    panel.set_xlabel("token of the window")
    panel.set_ylabel("scan (one row per window)")
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=panel, pad=0.01, aspect=12)
    bar.set_label("how common\n(log₁₀ share)")
    bar.outline.set_visible(False)
    return figure


FIGURES = (
    (
        "carpet",
        "Raw and decoded signal",
        "Held-out scans, one row per region ordered by network, one column per sample. Left as "
        "measured, right as decoded from the codes alone. Orange lines part the windows.",
        draw_carpets,
    ),
    (
        "connectivity",
        "Connectivity before and after",
        "Fisher-z correlation between regions. The mean over people is easy to keep; the matrix of "
        "one person, below, is what a clinical question needs.",
        draw_connectivity,
    ),
    (
        "brain",
        "Where the signal is kept",
        "R² of each region over all held-out scans, at the region's MNI coordinates. Crosses mark "
        "regions that could not be scored.",
        draw_brain,
    ),
    (
        "codebook",
        "Codebook and spectrum",
        "Left: how often each code occurs in the held-out scans. Right: power by frequency; what "
        "lies below the black line is lost.",
        draw_codebook,
    ),
    (
        "codes",
        "What the language model reads",
        "The codes of some held-out scans, one row per window. Yellow codes are common, blue ones "
        "rare.",
        draw_codes,
    ),
)
