"""Pictures of what moves an answer: regions on the brain, networks, and what codes stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import EvaluationError
from .rendering import BLUE, FAINT, INK, VERMILION, file_name, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: File beside the scores of `cortexicon evaluate`.
INTERPRETATION = "interpretation.npz"
# Name, then which of x, y, z goes right and which goes up.
_VIEWS = (("from above", 0, 1), ("from the side", 1, 2), ("from behind", 0, 2))


def write_interpretation(path: Path, **arrays: np.ndarray) -> None:
    """Write what `interpretation_figures` draws: means over people, nobody's scan.

    Parameters
    ----------
    path : Path
    **arrays
        `targets` (str), `people` (their number), `regions` (targets, regions), `coordinates`
        (regions, 3) in mm, `networks` of regions; `codes`, their `shares` (codes, networks) and the
        networks' `names`, empty where no dynamics are read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def interpretation_figures(path: Path) -> list[tuple[str, str, str, Callable[[], Figure]]]:
    """Name, title, caption and drawing of what `path`, by `write_interpretation`, holds."""
    with np.load(path, allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    figures: list[tuple[str, str, str, Callable[[], Figure]]] = []
    for target, regions in zip(held["targets"].tolist(), held["regions"], strict=True):
        drawing = partial(
            draw_attribution, regions, held["coordinates"], held["networks"].tolist(), target
        )
        caption = (
            f"Each code of {int(held['people'])} held-out people was hidden in turn; how far the "
            "answer then moved is laid out on the regions in which the code is seen. It says what "
            "this model listens to, not where the brain differs."
        )
        figures.append(
            (f"moves_{file_name(target)}", f"What moves the answer: {target}", caption, drawing)
        )
    if len(held["codes"]):
        caption = (
            "The commonest codes of held-out people, one a column: the share of each network in "
            "how the decoded signal changes when the code takes an average one's place."
        )
        drawing = partial(
            draw_code_networks, held["shares"], held["names"].tolist(), held["codes"].tolist()
        )
        figures.append(("code_networks", "What codes stand for", caption, drawing))
    return figures


def draw_attribution(
    regions: np.ndarray, coordinates: np.ndarray, networks: Sequence[str], title: str
) -> Figure:
    """Regions that move an answer, from three sides, and the mean of each network.

    Parameters
    ----------
    regions : float array, shape (regions,)
        At least 0, such as `Attribution.regions`, averaged over people.
    coordinates : float array, shape (regions, 3), mm, MNI
    networks : sequence of str
    title : str
        What the answer is about.

    Raises
    ------
    EvaluationError
        Values that are negative or not finite, or other numbers of regions.
    """
    regions, coordinates = np.asarray(regions, float), np.asarray(coordinates, float)
    if not len(regions) == len(coordinates) == len(networks):
        raise EvaluationError(
            f"expected values, coordinates and networks of the same regions, found {len(regions)}, "
            f"{len(coordinates)} and {len(networks)}."
        )
    if not (np.isfinite(regions) & (regions >= 0)).all():
        raise EvaluationError("expected attributions of at least 0, found others.")
    # From the least to the most: every region has some share, and often much the same.
    share = (regions - regions.min()) / max(np.ptp(regions), 1e-30)
    figure, grid = new_figure(3.6, 1, 4, width_ratios=[1, 1.15, 1, 1.2])
    axes = grid[0]
    for place, (name, right, up) in zip(axes, _VIEWS, strict=False):
        order = np.argsort(share)  # the strongest on top
        place.scatter(
            coordinates[order, right],
            coordinates[order, up],
            s=8 + 70 * share[order],
            c=share[order],
            cmap="inferno_r",
            vmin=0,
            vmax=1,
            linewidths=0.3,
            edgecolors=INK,
        )
        place.set_aspect("equal")
        place.set_xticks([])
        place.set_yticks([])
        finish(place, name, f"{'xyz'[right]}, MNI", f"{'xyz'[up]}, MNI", legend=False)
    own = np.array([str(network) for network in networks])
    names = sorted(set(own), key=lambda network: regions[own == network].mean())
    means = [regions[own == network].mean() / regions.mean() for network in names]
    axes[3].barh(range(len(names)), means, color=[VERMILION if m > 1 else BLUE for m in means])
    axes[3].axvline(1, color=FAINT)
    axes[3].set_yticks(range(len(names)), names)
    finish(axes[3], "by network", "mean over the brain = 1", "", legend=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


def draw_code_networks(shares: np.ndarray, names: Sequence[str], codes: Sequence[int]) -> Figure:
    """Share of each code in each network, codes ordered by their strongest network.

    Parameters
    ----------
    shares : float array, shape (codes, networks)
        Rows sum to 1, as `code_networks` makes them.
    names : sequence of str
    codes : sequence of int
    """
    shares = np.asarray(shares, float)
    if shares.shape != (len(codes), len(names)):
        raise EvaluationError(
            f"expected shares of {len(codes)} codes in {len(names)} networks, found {shares.shape}."
        )
    order = np.lexsort((-shares.max(1), shares.argmax(1)))
    figure, grid = new_figure(3.6)
    axes = grid[0, 0]
    picture = axes.imshow(shares[order].T, aspect="auto", cmap="magma_r", vmin=0)
    axes.set_yticks(range(len(names)), names)
    finish(axes, "What codes stand for", f"{len(codes)} codes", "", legend=False)
    axes.grid(visible=False)
    figure.colorbar(picture, ax=axes, label="share of the code's change")
    return figure
