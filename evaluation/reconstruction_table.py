"""The table of reconstructions: tokenizers that learn nothing, the Gaussian reference, and codecs.

A table is a plain dict, one section per *signal* (unfiltered, or one pass band): what entered the
tokenizers there, their rows, and the Gaussian curve over bit rates. Rows that learn nothing take
half a minute each and never change for the same windows, so they are kept as files named by the
hash of everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .json_files import write_json
from .patch_kmeans import region_patch_baseline, tokenizer_baseline
from .rate_distortion import rate_distortion_r2, separable_spectrum
from .report_tables import number, percent

# A kept row is good as long as these files, the windows and its settings stay the same.
_CODE = hashlib.sha256(
    b"".join(
        Path(__file__).with_name(name).read_bytes()
        for name in ("patch_kmeans.py", "reconstruction.py", "scores.py")
    )
).hexdigest()
_PATCH = 20  # samples; at 2 s a patch of 40 s
_COMPONENTS = (32, 64, 128)
_SCORES = (
    "system",
    "r2",
    "r2_interval",
    "tokens_per_window",
    "window_seconds",
    "bits_per_token",
    "bits_per_second",
    "num_subjects",
    "num_windows",
    "connectivity",
    "spectrum_error_db",
    "codebook",
)


class PlainTokenizer(NamedTuple):
    """A tokenizer that learns nothing, before it has seen data.

    Attributes
    ----------
    layout : {"latent", "grid"}
        Spatial principal components, or regions as they are.
    patch_length : int
        Samples.
    tokens_per_window : int
    num_codes : int
    """

    layout: str
    patch_length: int
    tokens_per_window: int
    num_codes: int = 8192


def standard_tokenizers(window_length: int, num_regions: int) -> list[PlainTokenizer]:
    """The rows of every table: 32, 64 and 128 components, regions at two lengths of a patch.

    A patch that does not divide the window, or components that the regions cannot supply, have no
    row.

    Parameters
    ----------
    window_length : int
        Samples.
    num_regions : int
    """
    rows = []
    if window_length % _PATCH == 0:
        for components in _COMPONENTS:
            if components <= num_regions:
                tokens = components * (window_length // _PATCH)
                rows.append(PlainTokenizer("latent", _PATCH, tokens))
    for patch in (_PATCH, _PATCH // 2):
        if window_length % patch == 0:
            rows.append(PlainTokenizer("grid", patch, num_regions * (window_length // patch)))
    return rows


def counterpart(
    layout: str, tokens_per_window: int, num_codes: int, window_length: int, num_regions: int
) -> PlainTokenizer | None:
    """The row a codec is measured against: the same layout, tokens and codes; None if none fits."""
    samples = window_length * num_regions
    if layout == "grid":
        patch, remainder = divmod(samples, tokens_per_window)
        fits = not remainder and patch > 0 and window_length % patch == 0
    else:
        patch = _PATCH
        patches = window_length // patch
        fits = (
            window_length % patch == 0
            and tokens_per_window % patches == 0
            and tokens_per_window // patches <= num_regions
        )
    return PlainTokenizer(layout, patch, tokens_per_window, num_codes) if fits else None


def plain_rows(
    tokenizers: Sequence[PlainTokenizer],
    train: Sequence[tuple[str, np.ndarray]],
    test: Sequence[tuple[str, np.ndarray]],
    window_seconds: float,
    cache: str | Path,
    name: str = "",
) -> dict[PlainTokenizer, dict[str, Any]]:
    """Fit and score tokenizers that learn nothing, or read what was computed before.

    Parameters
    ----------
    tokenizers : sequence of PlainTokenizer
    train, test : sequence of (subject_id, windows)
        windows: float32 (windows, window, regions), z-scored.
    window_seconds : float
    cache : path
        Folder of finished rows; one interrupted run loses one row.
    name : str
        Of the signal, for the progress bar.

    Returns
    -------
    dict
        In the order of `tokenizers`: see `tokenizer_baseline`; besides `layout`, `learned`.

    Raises
    ------
    EvaluationError
        No windows in one of the parts.
    """
    data = _hash_windows(train, test)
    rows = {}
    for plain in (bar := tqdm(tokenizers, desc=f"tokenizers {name}".strip(), unit="row")):
        bar.set_postfix_str(f"{plain.tokens_per_window} tokens")
        inputs = {
            **plain._asdict(),
            "window_seconds": window_seconds,
            "windows": data,
            "code": _CODE,
        }
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        path = Path(cache) / f"{key[:20]}.json"
        if not path.is_file():
            write_json(path, {**_fit(plain, train, test, window_seconds), "inputs": inputs})
        row = json.loads(path.read_text(encoding="utf-8"))
        rows[plain] = {
            **summary(row),
            "system": f"{row['system']}, patch {plain.patch_length}",
            "layout": plain.layout,
            "learned": False,
        }
    return rows


def _fit(
    plain: PlainTokenizer,
    train: Sequence[tuple[str, np.ndarray]],
    test: Sequence[tuple[str, np.ndarray]],
    window_seconds: float,
) -> dict[str, Any]:
    """One row, in about half a minute of one core for 800 windows of 200 regions."""
    common: dict[str, Any] = {
        "num_codes": plain.num_codes,
        "patch_length": plain.patch_length,
        "window_seconds": window_seconds,
    }
    if plain.layout == "grid":
        return region_patch_baseline(train, test, **common)
    return tokenizer_baseline(train, test, tokens_per_window=plain.tokens_per_window, **common)


def _hash_windows(*parts: Sequence[tuple[str, np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for name, windows in part:
            digest.update(f"{name} {windows.shape} {windows.dtype}\n".encode())
            digest.update(np.ascontiguousarray(windows).data)
        digest.update(b"end of part\n")
    return digest.hexdigest()


def summary(scores: Mapping[str, Any]) -> dict[str, Any]:
    """What a table keeps of `ReconstructionScores.results()`: no list over subjects or regions."""
    return {key: scores[key] for key in _SCORES if key in scores}


def share_of_gap(r2: float, plain_r2: float, reference_r2: float) -> float | None:
    """How much of the way from the plain tokenizer to the Gaussian reference a codec has gone."""
    gap = reference_r2 - plain_r2
    return (r2 - plain_r2) / gap if gap > 0 else None


def section(
    name: str,
    train: Sequence[tuple[str, np.ndarray]],
    plain: Mapping[PlainTokenizer, dict[str, Any]],
    codecs: Sequence[tuple[PlainTokenizer | None, dict[str, Any]]],
    window_seconds: float,
) -> dict[str, Any]:
    """One signal's part of the table.

    Parameters
    ----------
    name : str
        Such as "unfiltered".
    train : sequence of (subject_id, windows)
        The windows that the plain tokenizers were fitted on; the reference is theirs.
    plain : mapping
        From `plain_rows`.
    codecs : sequence of (counterpart or None, row)
        A row: `summary` of the scores, with `system`, `layout`, `cost` and what else is known.
    window_seconds : float

    Returns
    -------
    dict
        `signal`; `rows` by number of tokens, each with `gaussian_reference_r2`, a codec's with
        `plain_r2` and `share_of_gap` too where it has a counterpart; `gaussian_curve` with
        `bits_per_second` and `r2`.
    """
    variances = separable_spectrum(windows for _, windows in train)

    def reference(row: Mapping[str, Any]) -> float:
        return rate_distortion_r2(variances, row["bits_per_second"] * window_seconds)

    rows = [{**row, "gaussian_reference_r2": reference(row)} for row in plain.values()]
    for tokenizer, codec in codecs:
        row = {**codec, "learned": True, "gaussian_reference_r2": reference(codec)}
        if tokenizer is not None:
            row["plain_r2"] = plain[tokenizer]["r2"]
            row["share_of_gap"] = share_of_gap(
                row["r2"], row["plain_r2"], row["gaussian_reference_r2"]
            )
        rows.append(row)
    rows.sort(key=lambda row: (row["tokens_per_window"], row["learned"]))
    spent = [row["bits_per_second"] for row in rows]
    rates = np.geomspace(min(spent) / 2, max(spent) * 1.5, 60)
    return {
        "signal": name,
        "rows": rows,
        "gaussian_curve": {
            "bits_per_second": rates.tolist(),
            "r2": [rate_distortion_r2(variances, rate * window_seconds) for rate in rates],
        },
    }


def table_markdown(table: Mapping[str, Any]) -> str:
    """The table for people, one per signal.

    Parameters
    ----------
    table : mapping
        `sections` from `section`; optionally `notes`, lines that go below.

    Returns
    -------
    str
        Markdown, ending in a line break.
    """
    lines = []
    for part in table["sections"]:
        rows = part["rows"]
        seconds = rows[0]["window_seconds"]
        lines += [
            f"### {_title(part['signal'])}: {rows[0]['num_subjects']} held-out scans, "
            f"{rows[0]['num_windows']} windows of {seconds:g} s",
            "",
            f"| tokenizer | tokens / {seconds:g} s | bits / s | R² (95 %) | Gaussian reference "
            "| share of the gap | connectivity kept, full | deviation | codes used | cost |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row) for row in rows]
        lines.append("")
    lines += [f"{note}\n" for note in table.get("notes", ())]
    return "\n".join(lines).rstrip("\n") + "\n"


def _title(signal: str) -> str:
    """The name with a capital letter; "Hz" keeps its own."""
    return signal[:1].upper() + signal[1:]


def _line(row: Mapping[str, Any]) -> str:
    low, high = row["r2_interval"]
    interval = "" if low is None or high is None else f" ({number(low, 3)} to {number(high, 3)})"
    name = f"**{row['system']}**" if row["learned"] else row["system"]
    kept = row["connectivity"]
    cells = [
        name + (" *" if row.get("split") == "another" else ""),
        str(row["tokens_per_window"]),
        number(row["bits_per_second"], 1),
        number(row["r2"], 3) + interval,
        number(row["gaussian_reference_r2"], 3),
        percent(row.get("share_of_gap")),
        number(kept["full"], 3),
        number(kept.get("deviation"), 3),
        f"{percent(row['codebook']['usage'])} of {row['codebook']['num_codes']}",
        _cost(row.get("cost", {})),
    ]
    return "| " + " | ".join(cells) + " |"


def _cost(cost: Mapping[str, Any]) -> str:
    """What a codec took, in the units it was measured in; rows that learn nothing tell none."""
    parts = []
    if cost.get("parameters") is not None:
        parts.append(f"{cost['parameters'] / 1e6:.2f} M parameters")
    if cost.get("training_seconds") is not None:
        parts.append(f"{cost['training_seconds']:.0f} s training")
    if cost.get("windows_per_second") is not None:
        parts.append(f"encodes {cost['windows_per_second']:.0f} windows / s")
    return ", ".join(parts) or "–"
