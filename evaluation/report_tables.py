"""Rows and cells of the report's tables, as the template takes them."""

from __future__ import annotations

from typing import Any

from .baselines import DESCRIPTIONS
from .rendering_clinical import PART_NAMES, UNITS

Cell = dict[str, str]


def number(value: Any, digits: int = 2) -> str:
    """A number for people; a dash where there is none, a true minus sign."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: Any) -> str:
    """A share as a whole percentage, a dash where there is none."""
    return "–" if value is None else f"{100 * value:.0f} %".replace("-", "−")


def _cell(scores: dict[str, Any], key: str, show: Any = number) -> Cell:
    """A score with its interval, where it has one."""
    low, high = scores.get(f"{key}_interval") or (None, None)
    interval = "" if low is None or high is None else f"{show(low)} to {show(high)}"
    return {"value": show(scores.get(key)), "interval": interval}


def _three(value: Any) -> str:
    return number(value, 3)


def models_of(of_part: dict[str, Any]) -> list[str]:
    """Systems that are neither baselines nor controls of ours, best first."""
    return [name for name in of_part["ranking"] if name not in DESCRIPTIONS]


def codec_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The table of tokenizers: ours, the one that learns nothing, the Gaussian reference."""
    rows = []
    codec, plain = results["reconstruction"], results["tokenizer_baseline"]
    entries = []
    if codec:
        entries.append(("AVQ codec", "held-out subjects", codec, True))
        if "test_sites" in codec:
            entries.append(("AVQ codec", "held-out sites", codec["test_sites"], True))
    if plain:
        entries.append((plain["system"], "not learned; fitted on training windows", plain, False))
    for name, note, scores, ours in entries:
        usage = scores["codebook"]
        connectivity = scores["connectivity"]
        rows.append(
            {
                "name": name,
                "note": f"{note}; K = {usage['num_codes']}",
                "ours": ours,
                "cells": [
                    {"value": str(scores["num_subjects"])},
                    {"value": str(scores["tokens_per_window"])},
                    {"value": number(scores["bits_per_second"], 1)},
                    _cell(scores, "r2", _three),
                    _cell(connectivity, "full"),
                    _cell(connectivity, "deviation"),
                    {"value": number(scores["spectrum_error_db"], 1)},
                    {"value": percent(usage["usage"])},
                    {"value": number(usage["perplexity"], 0)},
                ],
            }
        )
    for name, _, scores, ours in entries[:]:
        for group, found in scores.get("r2_by_group", {}).items():
            cells = [{"value": "–"} for _ in range(9)]
            cells[0] = {"value": str(found["num_subjects"])}
            cells[3] = _cell(found, "r2", _three)
            rows.append({"name": f"{name}: {group}", "note": "", "ours": ours, "cells": cells})
    for scores in (codec, plain):
        if scores and scores.get("gaussian_reference_r2") is not None:
            rows.append(
                {
                    "name": "Gaussian rate-distortion reference",
                    "note": "not a tokenizer: what the same bits could buy if the signal were "
                    "Gaussian with separable covariance",
                    "ours": False,
                    "cells": [
                        {"value": "–"},
                        {"value": str(scores["tokens_per_window"])},
                        {"value": number(scores["bits_per_second"], 1)},
                        {"value": number(scores["gaussian_reference_r2"], 3)},
                        *[{"value": "–"}] * 5,
                    ],
                }
            )
            break
    return rows


def target_tables(name: str, scored: dict[str, Any]) -> dict[str, Any]:
    """The tables of one target: every system in every part, best first, and by site."""
    numeric = scored["kind"] == "number"
    unit = f" ({UNITS[name]})" if name in UNITS else ""
    if numeric:
        columns = [
            ("n", lambda s: {"value": str(s["num_subjects"])}),
            ("invalid answers", _invalid),
            (f"MAE{unit}", lambda s: _cell(s, "mae")),
            ("r", lambda s: _cell(s, "r")),
            ("R²", lambda s: _cell(s, "r2")),
            ("MAE minus kernel ridge's", lambda s: _cell(s, "difference_to_reference")),
            ("MAE minus the median's", lambda s: _cell(s, "difference_to_floor")),
            ("share of kernel ridge's gain", lambda s: _cell(s, "gain_share", percent)),
            ("SD (range) predicted", _predicted),
            ("MAE, bias-corrected*", lambda s: _cell(s, "mae_bias_corrected")),
        ]
        note = (
            "Best first. Small print: 95 % interval, bootstrap over subjects; differences are "
            "paired on the same subjects, below 0 is better. An invalid answer counts as the "
            "median. * The correction uses the true value, so it flatters every system and a "
            "constant answer most: shown, never ranked."
        )
    else:
        columns = [
            ("n", lambda s: {"value": str(s["num_subjects"])}),
            ("invalid answers", _invalid),
            ("AUC", lambda s: _cell(s, "auc")),
            ("balanced accuracy", lambda s: _cell(s, "balanced_accuracy")),
            ("AUC minus SVM's", lambda s: _cell(s, "difference_to_reference")),
        ]
        note = (
            "Best first. Small print: 95 % interval, bootstrap over subjects; differences are "
            "paired on the same subjects, above 0 is better. An invalid answer counts as the "
            "majority class."
        )
    parts = []
    for part, title in PART_NAMES.items():
        if part not in scored["parts"]:
            continue
        of_part = scored["parts"][part]
        parts.append(
            {
                "title": title.capitalize(),
                "truth": _truth(of_part, numeric),
                "heads": ["system", *[head for head, _ in columns]],
                "rows": [
                    {
                        "name": system,
                        "note": DESCRIPTIONS.get(system, ""),
                        "ours": system not in DESCRIPTIONS,
                        "cells": [show(of_part["systems"][system]) for _, show in columns],
                    }
                    for system in of_part["ranking"]
                ],
                "sites": _sites(of_part, "mae" if numeric else "auc"),
            }
        )
    return {"name": name, "parts": parts, "note": note}


def _invalid(scores: dict[str, Any]) -> Cell:
    """Invalid answers in the file; below it the rate without a grammar, where it is known."""
    valid = scores.get("free_answers_valid")
    return {
        "value": str(scores["num_invalid"]),
        "interval": "" if valid is None else f"free text: {percent(1.0 - valid)}",
    }


def _predicted(scores: dict[str, Any]) -> Cell:
    low, high = scores.get("predicted_minimum"), scores.get("predicted_maximum")
    return {
        "value": number(scores.get("predicted_sd"), 1),
        "interval": "" if low is None else f"{number(low, 0)} to {number(high, 0)}",
    }


def _truth(of_part: dict[str, Any], numeric: bool) -> str:
    count = f"{of_part['num_subjects']} subjects"
    if numeric:
        return (
            f"{count}; true values: SD {number(of_part['sd'], 1)}, range "
            f"{number(of_part['minimum'], 0)} to {number(of_part['maximum'], 0)}"
        )
    shown = ", ".join(f"{label}: {n}" for label, n in of_part["class_counts"].items())
    return f"{count}; {shown}"


def _sites(of_part: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Table of sites x systems (models, the reference and the floor first in the ranking)."""
    systems = of_part["systems"]
    sites: dict[str, int] = {}
    for scores in systems.values():
        for site, of_site in scores.get("by_site", {}).items():
            sites[site] = max(sites.get(site, 0), of_site["num_subjects"])
    if not sites:
        return None
    rows = [
        [
            site,
            str(count),
            *(
                number(systems[name].get("by_site", {}).get(site, {}).get(key))
                for name in of_part["ranking"]
            ),
        ]
        for site, count in sorted(sites.items())
    ]
    return {"heads": ["site", "n", *of_part["ranking"]], "rows": rows}
