"""The table of connectivity codes for people, and a picture of matrices before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .rendering import DOTS_PER_INCH, STYLE
from .report_tables import number


def connectome_markdown(schemes: Mapping[str, Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """The table of every split scheme.

    Parameters
    ----------
    schemes : mapping
        Scheme to `rows` (each with `system`, `tokens`, `learned` and the keys of
        `connectome.summary`) and, where they were measured, `cross_atlas` and `differences` of the
        system `judged` to the others.
    notes : sequence of str
        Paragraphs that go below.
    """
    lines: list[str] = []
    for scheme, part in schemes.items():
        rows = part["rows"]
        targets = [key for key in rows[0] if key.endswith(("_mae", "_auc"))]
        names = [
            key.replace("_", " ").replace("mae", "MAE").replace("auc", "AUC") for key in targets
        ]
        head = [
            "system",
            "tokens",
            "bits",
            "folds",
            "scans",
            "full",
            "deviation",
            "top-1 of halves",
        ]
        lines += [
            f"### {scheme.replace('_', ' ')}",
            "",
            "| " + " | ".join(head + names) + " |",
            "|" + "---|" * (len(head) + len(names)),
        ]
        for row in rows:
            name = f"**{row['system']}**" if row["learned"] else row["system"]
            values = [number(row[key], 3) for key in ("full", "deviation", "top1")]
            values += [number(row.get(key), 3 if key.endswith("auc") else 2) for key in targets]
            cells = [name, str(row["tokens"] or "–"), number(row.get("bits"), 0)]
            cells += [str(row["folds"]), str(row["scans"]), *values]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *_difference_lines(part)]
        if "cross_atlas" in part:
            cross = part["cross_atlas"]
            lines += [
                f"Encoded in {cross['source']}, decoded in {cross['target']} "
                f"({cross['scans']} held-out scans, {cross['folds']} folds): correlation "
                f"{number(cross['full'], 3)} full (group mean of {cross['target']} alone "
                f"{number(cross['group_mean'], 3)}), {number(cross['deviation'], 3)} deviation "
                f"(group mean: 0); with the mean read by position too "
                f"{number(cross['full_by_position'], 3)} full.",
                "",
            ]
    lines += [f"{note}\n" for note in notes]
    return "\n".join(lines).rstrip("\n") + "\n"


def _difference_lines(part: Mapping[str, Any]) -> list[str]:
    """A table of what is better (or worse) about the judged system than about each other one."""
    gaps = part.get("differences")
    if not gaps:
        return []
    keys = [key for key in next(iter(gaps.values())) if key not in ("full", "deviation")]
    keys = ["full", "deviation", *keys]
    names = [key.replace("_", " ").replace("mae", "MAE").replace("auc", "AUC") for key in keys]
    lines = [
        f"{part['judged']} minus each other system, same scans, 95 % intervals over scans:",
        "",
        "| minus | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(keys),
    ]
    for system, found in gaps.items():
        row = [
            "–" if key not in found else "{:+.3f} ({:+.3f} to {:+.3f})".format(*found[key])
            for key in keys
        ]
        lines.append(f"| {system} | " + " | ".join(row) + " |")
    return [*lines, ""]


def render_matrices(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], path: str | Path) -> Path:
    """Write matrices before and after as a PNG, a row for each of `pairs` (title, raw, decoded).

    Matrices are Fisher z, (regions, regions). NOTE: a picture of single scans stays with the data.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.9 * len(pairs)), layout="constrained")
        panels = figure.subplots(len(pairs), 2, squeeze=False)
        limit = max(float(np.nanpercentile(np.abs(raw), 99)) for _, raw, _ in pairs)
        for (title, raw, decoded), row in zip(pairs, panels, strict=True):
            for axes, matrix, what in zip(row, (raw, decoded), ("before", "after"), strict=True):
                image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.set_title(f"{title}, {what}")
                axes.set_xticks([])
                axes.set_yticks([])
            figure.colorbar(image, ax=row, label="Fisher z")
        figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
    return path
