"""The Space's pictures: carpets, codes, the brain, an answer. Matplotlib without pyplot."""

import io
from typing import Any

import numpy as np

from .space import ScanReading, SpaceAnswer

# Okabe & Ito's palette: told apart with every kind of colour vision.
BLUE, ORANGE, VERMILION = "#0072B2", "#E69F00", "#D55E00"
INK, GREY, FAINT = "#22262B", "#7A808A", "#D9DCE1"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
DOTS_PER_INCH = 110
WIDTH_INCHES = 10.0


def draw_carpets(reading: ScanReading) -> np.ndarray:
    """Regions x time as it entered the encoder, and as the codes alone give it back.

    Returns
    -------
    uint8 array, (height, width, 3)
    """
    order, groups = region_order(reading)
    step, windows = _sampling_interval(reading), len(reading.codes)
    seconds = len(reading.raw) * step

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        titles = ("the scan", f"given back by {reading.codes.size} codes: R² {reading.r2:.2f}")
        for axes, values, title in zip(panels, (reading.raw, reading.decoded), titles, strict=True):
            shown = np.where(reading.region_mask[order, None], values.T[order], np.nan)
            image = axes.imshow(
                shown,
                aspect="auto",
                cmap="gray",
                vmin=-2,
                vmax=2,
                interpolation="none",
                extent=(0, seconds, len(order) - 0.5, -0.5),
            )
            for window in range(1, windows):
                axes.axvline(window * seconds / windows, color=ORANGE, linewidth=1.0)
            axes.set_title(title)
            axes.set_xlabel("time (s)")
            axes.spines[:].set_visible(False)
            axes.set_yticks([])
        name_groups(panels[0], groups)
        bar = figure.colorbar(image, ax=panels, shrink=0.6, pad=0.015, aspect=24)
        bar.set_label("signal (SD of the region)")
        bar.outline.set_visible(False)

    return picture(3.5, draw)


def draw_codes(reading: ScanReading) -> np.ndarray:
    """The codes as a raster: time across, the tokens of one patch down; like codes look alike.

    A code's colour are the three leading directions of the codebook, so that two codes of one
    colour stand for similar activity.

    Returns
    -------
    uint8 array, (height, width, 3)
    """
    config = reading.checkpoint.codec.config
    patches = config.num_patches
    rows = reading.codes.shape[1] // patches
    grid = reading.codes.reshape(-1, rows).T  # (tokens of a patch, patches of all windows)
    colours = _code_colours(reading)[grid]  # (tokens, patches, 3)
    step = _sampling_interval(reading) * config.patch_length

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        width = grid.shape[1] * step
        axes.imshow(
            colours,
            aspect="auto",
            interpolation="none",
            extent=(0, width, rows - 0.5, -0.5),
        )
        for window in range(1, len(reading.codes)):
            axes.axvline(window * patches * step, color="white", linewidth=3.0)
        if grid.shape[1] <= 44 and rows <= 4:  # then a number fits into its cell
            for row in range(rows):
                for column in range(grid.shape[1]):
                    dark = colours[row, column].mean() < 0.55
                    axes.text(
                        (column + 0.5) * step,
                        row,
                        str(grid[row, column]),
                        ha="center",
                        va="center",
                        rotation=90 if grid.shape[1] > 16 else 0,
                        fontsize=8.5,
                        color="white" if dark else INK,
                    )
        codes = len(np.unique(grid))
        axes.set_title(
            f"{grid.size} codes, {codes} different, of a vocabulary of {config.num_codes}"
        )
        axes.set_xlabel("time (s)")
        axes.set_ylabel("token")
        axes.set_yticks([] if rows == 1 else [0, rows - 1], [] if rows == 1 else ["1", str(rows)])
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)

    return picture(1.9 if rows <= 4 else 3.0, draw)


def draw_brain(reading: ScanReading) -> np.ndarray:
    """R2 of each region at its place in the brain, seen from left, above, behind and right.

    Returns
    -------
    uint8 array, (height, width, 3)
    """
    from nilearn.plotting.glass_brain import plot_brain_schematics

    values = reading.region_r2
    places = np.asarray(
        reading.checkpoint.processor.feature_extractor.region_coordinates, np.float64
    )
    known = np.isfinite(values)
    low, high = np.percentile(values[known], [2, 98])

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 4, gridspec_kw={"width_ratios": [180, 150, 150, 180]})
        views = (
            ("l", "left", 1, 2, places[:, 0] <= 0, -places[:, 0]),
            ("z", "above", 0, 1, known, places[:, 2]),
            ("y", "behind", 0, 2, known, -places[:, 1]),
            ("r", "right", 1, 2, places[:, 0] >= 0, places[:, 0]),
        )
        for axes, (direction, title, across, up, side, depth) in zip(panels, views, strict=True):
            plot_brain_schematics(axes, direction, alpha=0.6, linewidth=0.8)
            shown = np.flatnonzero(known & side)
            shown = shown[np.argsort(depth[shown])]  # the nearest to the viewer last
            points = axes.scatter(
                places[shown, across],
                places[shown, up],
                c=values[shown],
                cmap="cividis",
                vmin=low,
                vmax=high,
                s=34,
                edgecolors="white",
                linewidths=0.5,
                zorder=5,
            )
            lost = np.flatnonzero(~known & side)
            axes.scatter(places[lost, across], places[lost, up], marker="x", s=16, color=GREY)
            axes.set_xlim((-110, 80) if across == 1 else (-80, 80))
            axes.set_ylim((-80, 90) if up == 2 else (-112, 80))
            axes.set_aspect("equal")
            axes.set_title(title)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        bar = figure.colorbar(points, ax=panels, shrink=0.8, aspect=16, pad=0.01, extend="both")
        bar.set_label("R² of the region")
        bar.outline.set_visible(False)

    return picture(2.6, draw)


def draw_answer(answer: SpaceAnswer, truth: str = "") -> np.ndarray | None:
    """The probabilities behind an answer; None for a free one.

    Parameters
    ----------
    truth : str
        The true answer of a simulated person, drawn beside it.

    Returns
    -------
    uint8 array, (height, width, 3), or None
    """
    if not answer.options:
        return None
    shares = answer.probabilities / answer.probabilities.sum()

    def draw_numbers(figure: Any) -> None:
        axes = figure.subplots()
        values = np.array([float(option) for option in answer.options])
        axes.fill_between(values, shares, step="mid", color=BLUE, alpha=0.25, linewidth=0)
        axes.step(values, shares, where="mid", color=BLUE, linewidth=1.4)
        axes.axvline(answer.number, color=VERMILION, linewidth=2.0, label="answer")
        if truth:
            axes.axvline(float(truth), color=INK, linewidth=1.4, linestyle=":", label="true")
        axes.set_ylim(0, None)
        axes.set_xlim(values[0], values[-1])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylabel("probability")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.97), ncols=2)

    def draw_classes(figure: Any) -> None:
        axes = figure.subplots()
        rows = np.arange(len(shares))[::-1]
        best = int(shares.argmax())
        colours = [VERMILION if row == best else FAINT for row in range(len(shares))]
        axes.barh(rows, shares, color=colours, height=0.6)
        for row, share, option in zip(rows, shares, answer.options, strict=True):
            note = "   (true)" if option == truth else ""
            axes.text(share + 0.01, row, f"{share:.0%}{note}", va="center")
        axes.set_yticks(rows, answer.options)
        axes.set_xlim(0, 1.15)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    numbers = answer.number is not None
    height = 1.9 if numbers else 0.5 + 0.45 * len(shares)
    return picture(height, draw_numbers if numbers else draw_classes, width=6.2)


def picture(height: float, draw: Any, width: float = WIDTH_INCHES) -> np.ndarray:
    """What `draw` puts on a new figure, as pixels."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=DOTS_PER_INCH)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _sampling_interval(reading: ScanReading) -> float:
    return float(reading.checkpoint.processor.feature_extractor.sampling_interval)


def region_order(reading: ScanReading) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """Rows by hemisphere, front to back; and (name, first row, row after the last) of each side."""
    places = np.asarray(
        reading.checkpoint.processor.feature_extractor.region_coordinates, np.float64
    )
    right = places[:, 0] >= 0
    order = np.lexsort((-places[:, 1], right))
    split = int((~right).sum())
    return order, [("left", 0, split), ("right", split, len(order))]


def name_groups(axes: Any, groups: list[tuple[str, int, int]]) -> None:
    """Hemispheres as bars left of the regions."""
    from matplotlib.patches import Rectangle

    for (name, first, last), colour in zip(groups, (BLUE, ORANGE), strict=True):
        if last == first:
            continue
        place = axes.get_yaxis_transform()
        axes.add_patch(
            Rectangle(
                (-0.022, first - 0.5),
                0.013,
                last - first,
                color=colour,
                linewidth=0,
                transform=place,
                clip_on=False,
            )
        )
        middle = (first + last - 1) / 2
        axes.text(-0.03, middle, name, transform=place, ha="right", va="center", rotation=90)


def _code_colours(reading: ScanReading) -> np.ndarray:
    """One colour per code, float (codes, 3) in 0-1, by the codebook's three leading directions."""
    book = reading.checkpoint.codec.quantizer.codebook.detach().float().cpu().numpy()
    book = book - book.mean(axis=0)
    _, vectors = np.linalg.eigh(book.T @ book)
    leading = book @ vectors[:, ::-1][:, :3]  # (codes, at most 3)
    if leading.shape[1] < 3:
        leading = np.pad(leading, ((0, 0), (0, 3 - leading.shape[1])))
    ranks = leading.argsort(axis=0).argsort(axis=0) / max(len(leading) - 1, 1)
    return 0.12 + 0.8 * ranks  # neither black nor white, which part the windows
