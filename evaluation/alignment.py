"""The table of alignment: what fresh probes make of codecs, beside the rows they are read against.

Five rows stand beside the codec: text against text, two Gaussian clouds, codes that are copies of
text rows, and two other codecs: adversary off, and a classifier whose gradient is not reversed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from .code_geometry import geometry
from .errors import EvaluationError
from .probes import (
    PROBES,
    as_numpy,
    capped_share,
    control_rows,
    gap_closed,
    probe_alignment,
    text_types,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Rows in the order of the table; the first is the codec that is judged.
ROWS = {
    "codes": "codes of this checkpoint",
    "text_against_text": "(a) text against text, the floor",
    "gaussian": "(b) two Gaussian clouds",
    "copied": "(c) codes copied from text rows",
    "adversary_off": "(d) adversary off",
    "not_reversed": "(e) gradient not reversed",
}
SHOWN_POINTS = 4000


class CodecRows(NamedTuple):
    """What the table needs of one codec.

    Attributes
    ----------
    codebook : float32, shape (codes, code_dim)
    projected : float32, shape (codes, width)
        P(codebook).
    counts : int64, shape (codes,)
        Occurrences in the training part.
    classifier_accuracy : float or None
        Of the classifier that training used, see `classifier_accuracy`; None where training used
        none.
    """

    codebook: torch.Tensor
    projected: torch.Tensor
    counts: np.ndarray
    classifier_accuracy: float | None


def classifier_accuracy(
    code_logits: Any, code_counts: Any, text_logits: Any, text_counts: Any
) -> float:
    """Accuracy of the training classifier, each side one half; positive logits say text.

    Parameters
    ----------
    code_logits, code_counts : float32 and int64, shape (codes,)
        Of every code, and its occurrences in scans that training did not see.
    text_logits, text_counts : float32 and int64, shape (types,)
        Types weigh as training draws them, by frequency, none above 0.5 % of the mass. NOTE: all
        of them were in training; only the codes' scans are held out.
    """
    codes = as_numpy(code_counts).astype(np.float64)
    right = (as_numpy(code_logits) < 0) @ (codes / codes.sum())
    return float(0.5 * (right + (as_numpy(text_logits) >= 0) @ capped_share(as_numpy(text_counts))))


def alignment_table(
    codecs: Mapping[str, CodecRows],
    text_table: Any,
    text_counts: Any,
    splits: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Probe every codec and the controls.

    Parameters
    ----------
    codecs : dict of str to CodecRows
        ``codes``, the codec that is judged, and where there are such: ``adversary_off`` and
        ``not_reversed``.
    text_table : float32, shape (types, width)
    text_counts : int64, shape (types,)
    splits, seed : int
    progress : bool

    Returns
    -------
    dict
        ``rows``: for each of `ROWS` that there is, what `probe_alignment` returns; codecs and
        copies also with ``geometry``, codecs with ``classifier_accuracy``. ``gap_closed``, beside
        ``adversary_off`` only: for each probe the share of its gap to the floor that is closed.

    Raises
    ------
    EvaluationError
        A name that is no row of a codec, no ``codes``, or rows that cannot be probed.
    """
    names = ("codes", "adversary_off", "not_reversed")
    if "codes" not in codecs or not set(codecs) <= set(names):
        raise EvaluationError(
            f"Expected the codec 'codes', and beside it at most {names[1]!r} and {names[2]!r}; "
            f"found {sorted(codecs)}."
        )
    rows: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=len(codecs) + 1, desc="probe", unit="row", disable=not progress)
    with bar:
        for name, codec in codecs.items():
            rows[name] = probe_alignment(
                codec.projected, codec.counts, text_table, text_counts, splits, seed
            )
            rows[name]["geometry"] = geometry(codec.codebook, codec.projected, codec.counts)
            rows[name]["classifier_accuracy"] = codec.classifier_accuracy
            bar.update()
        judged = codecs["codes"]
        rows |= control_rows(judged.counts, text_table, text_counts, splits, seed)
        rows["copied"]["geometry"] = geometry(
            judged.codebook, _copies(judged.counts, text_table, text_counts, seed), judged.counts
        )
        bar.update()
    result: dict[str, Any] = {"rows": {name: rows[name] for name in ROWS if name in rows}}
    if "adversary_off" in rows:
        result["gap_closed"] = gap_closed(
            rows["codes"], rows["adversary_off"], rows["text_against_text"]
        )
    return result


def table_text(result: Mapping[str, Any]) -> str:
    """The table in Markdown, and under it what share of the gap was closed."""
    lines = [
        "| row | logistic | quadratic | MLP | 10-NN overlap | close pairs | training classifier |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        cells = [f"{row[probe]['accuracy']:.3f} ± {row[probe]['sd']:.3f}" for probe in PROBES]
        kept = row.get("geometry")
        cells += (
            ["-", "-"]
            if kept is None
            else [f"{kept['neighbour_overlap']:.3f}", f"{kept['share_close_pairs']:.2%}"]
        )
        own = row.get("classifier_accuracy")
        cells.append("-" if own is None else f"{own:.3f}")
        lines.append(f"| {ROWS[name]} | " + " | ".join(cells) + " |")
    if "gap_closed" in result:
        shares = ", ".join(
            f"{probe} {'no gap' if share is None else format(share, '.0%')}"
            for probe, share in result["gap_closed"].items()
        )
        lines += ["", f"Of the gap between (d) and (a), closed: {shares}."]
    return "\n".join(lines) + "\n"


def render_alignment(
    codecs: Mapping[str, CodecRows],
    text_table: Any,
    text_counts: Any,
    result: Mapping[str, Any],
    path: Path,
) -> Path:
    """Draw text rows and P(codes) along the text's principal components, as a PNG.

    One panel per codec, adversary off on the left; one codec alone gets a second panel of
    components 3 and 4. What lies outside is counted, not hidden.
    """
    from matplotlib import rc_context

    from .rendering import DOTS_PER_INCH, STYLE, new_figure

    text, share = text_types(text_table, text_counts)
    weights = torch.from_numpy(share).to(text)
    mean = weights @ text
    centred = text - mean
    values, vectors = torch.linalg.eigh((centred * weights[:, None]).T @ centred)
    values, vectors = values.flip(0), vectors.flip(1)  # the largest first

    names = [name for name in ("adversary_off", "not_reversed", "codes") if name in codecs]
    shown = [(name, 0) for name in names] if len(names) > 1 else [("codes", 0), ("codes", 2)]
    with rc_context(STYLE):
        figure, (panels,) = new_figure(10.0 / len(shown) + 0.4, 1, len(shown))
        for panel, (name, first) in zip(panels, shown, strict=True):
            counts = as_numpy(codecs[name].counts).astype(np.float64)
            two = vectors[:, first : first + 2] / values[first : first + 2].sqrt()
            clouds = [
                ((torch.as_tensor(rows).detach().float() - mean) @ two, chance)
                for rows, chance in ((text, share), (codecs[name].projected, counts / counts.sum()))
            ]
            title = ROWS[name].removeprefix("(d) ").removeprefix("(e) ")
            accuracy = result["rows"][name]["mlp"]["accuracy"]
            _scatter(panel, clouds, f"{title}: MLP probe {accuracy:.0%}")
            explained = values[first : first + 2] / values.sum()
            panel.set_xlabel(f"PC {first + 1} of text, {explained[0]:.0%} of variance (SD)")
            panel.set_ylabel(f"PC {first + 2} of text, {explained[1]:.0%} (SD)")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    return path


def _scatter(panel: Axes, clouds: list[tuple[torch.Tensor, np.ndarray]], title: str) -> None:
    """Text and codes in one panel, drawn as the probes' batches are: by weight, with repeats."""
    from .rendering import BLUE, ORANGE, finish

    generator = np.random.default_rng(0)
    limit = 3.8
    for (points, chance), colour, label in zip(
        clouds, (BLUE, ORANGE), ("text tokens", "codes"), strict=True
    ):
        drawn = points[generator.choice(len(points), SHOWN_POINTS, p=chance)].numpy()
        outside = (np.abs(drawn) > limit).any(1).mean()
        label += f", {outside:.0%} outside" if outside >= 0.005 else ""
        panel.scatter(
            drawn[:, 0], drawn[:, 1], s=3, color=colour, alpha=0.3, linewidths=0, label=label
        )
    panel.set_xlim(-limit, limit)
    panel.set_ylim(-limit, limit)
    panel.set_aspect("equal")
    finish(panel, title, "", "", legend=False)
    for handle in panel.legend(loc="upper right", markerscale=3).legend_handles:
        if handle is not None:
            handle.set_alpha(1.0)


def _copies(code_counts: Any, text_table: Any, text_counts: Any, seed: int) -> torch.Tensor:
    """A text row for each code, drawn as in `control_rows`."""
    text, share = text_types(text_table, text_counts)
    generator = np.random.default_rng(seed)
    return text[generator.choice(len(text), len(as_numpy(code_counts)), p=share)]
