"""Draws a run's pictures: the style they share, the training curves, and the list of all figures.

Matplotlib is imported inside the functions and without pyplot: no global state, no display.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import EvaluationError
from .results import EXAMPLES_FILE, STAGES, read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#8A8F98"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW, GREY)
INK, FAINT = "#22262B", "#D9DCE1"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
}
WIDTH_INCHES = 10.0
DOTS_PER_INCH = 130


class Picture(NamedTuple):
    """One figure of the report, or the reason why it is not there.

    Attributes
    ----------
    name : str
        File name without its ending.
    title, caption : str
    path : Path or None
        None where the run holds nothing to draw; `problem` then says what is missing.
    problem : str
    """

    name: str
    title: str
    caption: str
    path: Path | None
    problem: str = ""


def file_name(name: str) -> str:
    """`name` with every character replaced that a file's name may not hold everywhere."""
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)


def new_figure(height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple:
    """A figure of the report's width (10 in) and its axes as an array (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def curve(
    axes: Axes, records: list[dict[str, Any]], key: str, label: str, colour: str, **kwargs: Any
) -> bool:
    """Draw a logged quantity over steps, with a running mean if it is long; False if absent."""
    points = [
        (record["step"], record[key])
        for record in records
        if isinstance(record.get(key), (int, float)) and "step" in record
    ]
    points = [point for point in points if np.isfinite(point[1])]
    if not points:
        return False
    steps, values = np.array(points, float).T
    if len(values) > 60:
        width = max(5, len(values) // 40)
        kernel = np.ones(width)
        # Ends are averaged over what exists there, not over zeros.
        smooth = np.convolve(values, kernel, "same") / np.convolve(
            np.ones_like(values), kernel, "same"
        )
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.7, **kwargs)
        axes.plot(steps, smooth, color=colour, label=label, **kwargs)
    else:
        marker = "o" if len(values) < 15 else ""
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=3, **kwargs)
    return True


def finish(axes: Axes, title: str, x_label: str, y_label: str, legend: bool = True) -> None:
    """Title, labels, a light grid and, if anything is labelled, a legend."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=FAINT, linewidth=0.5, alpha=0.7)
    axes.set_axisbelow(True)
    if not axes.has_data():
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_xticks([])
        axes.set_yticks([])
    elif legend and axes.get_legend_handles_labels()[0]:
        axes.legend()


def draw_codec_training(log: list[dict[str, Any]]) -> Figure:
    """The codec's losses, held-out R2, usage and perplexity of the codebook over training."""
    figure, ((losses, quality), (codebook, evenness)) = new_figure(5.2, 2, 2)
    names = ("reconstruction", "commitment", "spectrum", "connectivity", "domain")
    for name, colour in zip(names, PALETTE, strict=False):
        curve(losses, log, f"{name}_loss", name, colour)
    if losses.has_data() and all((line.get_ydata() > 0).all() for line in losses.lines):
        losses.set_yscale("log")
    finish(losses, "Codec losses", "training step", "loss")
    curve(quality, log, "eval_r2", "validation R²", BLUE)
    finish(quality, "Reconstruction, held out", "training step", "R²", legend=False)
    curve(codebook, log, "usage", "of a training batch", SKY)
    curve(codebook, log, "eval_usage", "of the validation part", BLUE)
    codebook.set_ylim(0, 1.02)
    finish(codebook, "Codebook usage", "training step", "share of codes used")
    curve(evenness, log, "perplexity", "perplexity", PURPLE)
    finish(evenness, "Codebook perplexity", "training step", "perplexity (codes)", legend=False)
    return figure


def draw_domain(log: list[dict[str, Any]]) -> Figure:
    """The domain classifier's accuracy and the gradients it sends back."""
    figure, ((accuracy, norms),) = new_figure(3.0, 1, 2)
    curve(accuracy, log, "domain_accuracy", "classifier accuracy", BLUE)
    curve(accuracy, log, "reversal_strength", "reversal strength", ORANGE, linestyle="--")
    if accuracy.has_data():
        accuracy.axhline(0.5, color=GREY, linewidth=0.9, linestyle=":", label="chance")
        accuracy.set_ylim(-0.02, 1.02)
    finish(accuracy, "Text or code? The domain classifier", "training step", "share, strength")
    curve(norms, log, "domain_grad_norm_projection", "reaching the projection P", VERMILION)
    curve(norms, log, "domain_grad_norm_encoder", "reaching the encoder", GREEN)
    if norms.has_data() and all((line.get_ydata() > 0).all() for line in norms.lines):
        norms.set_yscale("log")
    finish(norms, "Reversed gradient of the domain loss", "training step", "gradient norm")
    return figure


def draw_language_training(text: list[dict[str, Any]], lm: list[dict[str, Any]]) -> Figure:
    """Losses of the text warm-up and of the model that reads codes, and its validation error."""
    figure, ((warm_up, reading, error),) = new_figure(3.2, 1, 3)
    for axes, log in ((warm_up, text), (reading, lm)):
        curve(axes, log, "loss", "training", SKY)
        curve(axes, log, "eval_loss", "validation", BLUE)
    finish(warm_up, "Text warm-up", "training step", "loss (nats per token)")
    finish(reading, "Reading codes", "training step", "loss (nats per token)")
    keys = sorted({key for record in lm for key in record if key.startswith("eval_mae_")})
    for key, colour in zip(keys, PALETTE, strict=False):
        curve(error, lm, key, key.removeprefix("eval_mae_"), colour)
    finish(error, "Validation error of the answers", "training step", "mean absolute error")
    return figure


def render_figures(run_folder: str | Path) -> list[Picture]:
    """Draw every figure the run has data for into RUN/figures/*.png.

    Returns
    -------
    list of Picture
        In the report's order; one with `path` None for what could not be drawn, and why.
    """
    from matplotlib import rc_context

    from . import (
        rendering_clinical,
        rendering_codec,
        rendering_connectome,
        rendering_interpretation,
    )

    run = Path(run_folder)
    logs = {stage: read_log(run / stage / "training_log.jsonl") for stage in STAGES}
    pictures: list[Picture] = []

    def draw(
        name: str, title: str, caption: str, problem: str, function: Callable[[], Figure | None]
    ) -> None:
        path = None
        if not problem:
            try:
                figure = function()
            except (EvaluationError, KeyError, OSError) as error:
                figure, problem = None, f"could not be drawn: {error}"
            if figure is not None:
                path = run / "figures" / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=DOTS_PER_INCH)
            elif not problem:
                problem = "nothing to draw in this run's data"
        pictures.append(Picture(name, title, caption, path, problem))

    with rc_context(STYLE):
        examples_path = run / EXAMPLES_FILE
        for name, title, caption, function in rendering_codec.FIGURES:
            absent = "" if examples_path.is_file() else f"{EXAMPLES_FILE} is not there"
            draw(
                name,
                title,
                caption,
                absent,
                partial(rendering_codec.draw_examples, function, examples_path),
            )
        connectome = run / "evaluation" / rendering_connectome.EXAMPLES
        if connectome.is_file():  # a run without the second stream lacks nothing
            for name, title, caption, function in rendering_connectome.FIGURES:
                of_examples = partial(rendering_codec.draw_examples, function, connectome)
                draw(name, title, caption, "", of_examples)
        for name, title, caption, drawing in rendering_clinical.clinical_figures(run):
            if drawing is None:
                draw(name, title, caption, "no predictions in this run", lambda: None)
            else:
                draw(name, title, caption, "", drawing)
        moved = run / "evaluation" / rendering_interpretation.INTERPRETATION
        if moved.is_file():  # a model of features has no codes to hide
            for figure in rendering_interpretation.interpretation_figures(moved):
                draw(*figure[:3], "", figure[3])
        no_avq = "" if logs["avq"] else "avq/training_log.jsonl is not there"
        draw(
            "training_codec",
            "Training of the codec",
            "Losses (before weighting), R² on the validation part, and the share of codes in use.",
            no_avq,
            lambda: draw_codec_training(logs["avq"]),
        )
        draw(
            "domain",
            "Adversarial alignment with text",
            "A classifier tries to tell projected codes from text embeddings; its gradient reaches "
            "the codec reversed. Accuracy near one half means it fails, which alone proves little: "
            "a starved classifier fails for free. Both gradients must be there.",
            no_avq,
            lambda: draw_domain(logs["avq"]),
        )
        no_language = (
            "" if logs["text"] or logs["lm"] else "neither text/ nor lm/training_log.jsonl is there"
        )
        draw(
            "training_language",
            "Training of the language model",
            "First on text alone, then on prompts of codes, a question and its answer.",
            no_language,
            lambda: draw_language_training(logs["text"], logs["lm"]),
        )
    return pictures
