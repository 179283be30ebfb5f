"""One self-contained report.html of a benchmark: tables, pictures, controls, costs, commands."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from .baselines import DESCRIPTIONS
from .rendering import Picture
from .rendering_benchmark import draw_benchmark
from .rendering_clinical import UNITS
from .rendering_systems import plain_baseline, shown_name
from .report_tables import number, percent
from .results import read_json

LIMITS = (
    "This is research software. No number here supports a decision about a single person.",
    "An interval covers the choice of test subjects and, where there are several, of seeds or of a "
    "control's permutations. Folds share training subjects, so it is too narrow for the choice of "
    "training data.",
    "Within sites a system can guess from the scanner: read 'site mean' and 'scan length + TR + "
    "site', and the held-out sites, before believing the held-out subjects.",
    "A system that is not ranked is shown to prove that its code runs, not how well it predicts.",
    "'unknown' under 'test subjects' means that nobody has shown that a system's earlier training "
    "left them out.",
)
REASON = "Not ranked: "


def write_benchmark_report(out: str | Path, predictions: Mapping[str, pd.DataFrame]) -> Path:
    """Draw the figures and write OUT/report.html from OUT/results.json.

    Parameters
    ----------
    out : path
    predictions : mapping of str to DataFrame
        Split -> rows as `score_view` takes them; they stay where they are, only pictures of them
        go into the report.

    Returns
    -------
    Path
        The report. It loads nothing from anywhere: pictures and style are inside.
    """
    from jinja2 import Environment, StrictUndefined

    out = Path(out)
    results = read_json(out / "results.json")
    pictures = draw_benchmark(out, results, predictions)
    templates = files(__package__) / "templates"
    page = (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string((templates / "benchmark.html.jinja").read_text("utf-8"))
        .render(
            style=(templates / "report.css").read_text("utf-8"),
            title=results["title"],
            subtitle=_subtitle(results),
            summary=_summary(results),
            unfinished=_unfinished(results),
            controls=_control_rows(results),
            views=[
                {
                    "name": name,
                    "anchor": f"view{place}",
                    "note": _view_note(results["splits"][name]),
                    "targets": [
                        target_section(target, scored, results["systems"], pictures[name, target])
                        for target, scored in targets.items()
                    ],
                }
                for place, (name, targets) in enumerate(results["scores"].items())
            ],
            systems=_system_rows(results["systems"]),
            limits=LIMITS,
            command=results["command"],
            facts=_facts(results),
        )
    )
    path = out / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def target_section(
    target: str,
    scored: Mapping[str, Any],
    facts: Mapping[str, Any],
    pictures: list[Picture],
) -> dict[str, Any]:
    """Table, per-site table and pictures of one target, as the template takes them."""
    numeric = scored["kind"] == "number"
    unit = f" ({UNITS[target]})" if target in UNITS else ""
    score = (
        [(f"MAE{unit}", "mae", 2), ("r", "r", 2), ("R²", "r2", 2)]
        if numeric
        else [("AUC", "auc", 3), ("balanced accuracy", "balanced_accuracy", 3)]
    )
    against = "kernel ridge" if numeric else "SVM"
    heads = ["system", "n", "seeds", "invalid", *(head for head, _, _ in score)]
    heads += [f"{'MAE' if numeric else 'AUC'} minus {against}'s", "p (Holm)"]
    if numeric:
        heads += ["MAE minus the median's", "SD (range) predicted", "MAE, bias-corrected*"]
    rows = []
    for name in (*scored["ranking"], *scored["unranked"]):
        scores = scored["systems"][name]
        cells = [
            _plain(str(scores["num_subjects"])),
            _plain(str(scores["num_seeds"])),
            _plain(str(scores["num_invalid"])),
            *(_cell(scores, key, digits) for _, key, digits in score),
            _cell(scores, "difference_to_reference", 2 if numeric else 3),
            _plain(_p(scores)),
        ]
        if numeric:
            low, high = scores["predicted_minimum"], scores["predicted_maximum"]
            cells += [
                _cell(scores, "difference_to_floor"),
                {
                    "value": number(scores["predicted_sd"], 1),
                    "interval": f"{number(low, 0)} to {number(high, 0)}",
                },
                _plain(number(scores["mae_bias_corrected"])),
            ]
        ranked = facts[name]["ranked"]
        note = facts[name]["what"] or DESCRIPTIONS.get(name, "")
        rows.append(
            {
                "name": shown_name(name, facts),
                "note": note if ranked else f"{REASON}{facts[name]['reason']}. {note}",
                "ours": ranked and not plain_baseline(name, facts),
                "unranked": not ranked,
                "cells": cells,
            }
        )
    return {
        "name": target,
        "truth": _truth(scored, numeric),
        "heads": heads,
        "rows": rows,
        "numeric": numeric,
        "sites": _sites(scored, facts),
        "pictures": [_with_data(picture) for picture in pictures],
    }


def _plain(value: str) -> dict[str, str]:
    return {"value": value, "interval": ""}


def _cell(scores: Mapping[str, Any], key: str, digits: int = 2) -> dict[str, str]:
    low, high = scores.get(f"{key}_interval") or (None, None)
    known = low is not None and high is not None
    return {
        "value": number(scores.get(key), digits),
        "interval": f"{number(low, digits)} to {number(high, digits)}" if known else "",
    }


def _p(scores: Mapping[str, Any]) -> str:
    p = scores.get("p_reference_holm", scores.get("p_reference"))
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _truth(scored: Mapping[str, Any], numeric: bool) -> str:
    count = f"{scored['num_subjects']} subjects"
    if numeric:
        return (
            f"{count}; true values: SD {number(scored['sd'], 1)}, range "
            f"{number(scored['minimum'], 0)} to {number(scored['maximum'], 0)}"
        )
    return f"{count}; " + ", ".join(f"{k}: {n}" for k, n in scored["class_counts"].items())


def _sites(scored: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any] | None:
    key = "mae" if scored["kind"] == "number" else "auc"
    names = [*scored["ranking"], *scored["unranked"]]
    sizes: dict[str, int] = {}
    for name in names:
        for site, scores in scored["systems"][name].get("by_site", {}).items():
            sizes[site] = max(sizes.get(site, 0), scores["num_subjects"])
    if not sizes:
        return None
    rows = [
        [
            site,
            str(count),
            *(
                number(scored["systems"][name].get("by_site", {}).get(site, {}).get(key))
                for name in names
            ),
        ]
        for site, count in sorted(sizes.items())
    ]
    return {"heads": ["site", "n", *(shown_name(name, facts) for name in names)], "rows": rows}


def _with_data(picture: Picture) -> dict[str, str]:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii") if picture.path else ""
    return {**picture._asdict(), "path": "", "data": data}


def _subtitle(results: Mapping[str, Any]) -> str:
    cohort, environment = results["cohort"], results["environment"]
    pieces = [
        f"{cohort['num_scans']} scans, {cohort['num_regions']} regions of {cohort['atlas']}",
        f"cohort {cohort['hash'][:12]}",
    ]
    if environment["commit"]:
        pieces.append(f"commit {environment['commit'][:10]}")
    return " · ".join(pieces)


def _summary(results: Mapping[str, Any]) -> list[str]:
    """For each table: the best system, the reference, and the best model."""
    sentences = []
    facts = results["systems"]
    for view, targets in results["scores"].items():
        for target, scored in targets.items():
            numeric = scored["kind"] == "number"
            key, label = ("mae", "error") if numeric else ("auc", "AUC")
            unit = f" {UNITS[target]}" if target in UNITS else ""
            if not scored["ranking"]:
                continue
            best = scored["ranking"][0]
            text = (
                f"{target}, {view}: the best of {len(scored['ranking'])} ranked rows is '{best}' "
                f"({label} {number(scored['systems'][best].get(key))}{unit})"
            )
            models = [name for name in scored["ranking"] if not plain_baseline(name, facts)]
            if models and models[0] != best:
                value = number(scored["systems"][models[0]].get(key))
                text += f"; the best model is '{models[0]}' ({value}{unit})"
            elif not models:
                text += "; no model is among them, only baselines"
            sentences.append(text + ".")
    failed = [row for row in _control_rows(results) if row["verdict"] == "FAILS"]
    if failed:
        named = ", ".join(f"{row['name']} ({row['target']}, {row['view']})" for row in failed)
        sentences.append(f"Controls that fail; do not believe their systems' figures: {named}.")
    return sentences or ["Nothing could be scored yet."]


def _unfinished(results: Mapping[str, Any]) -> list[str]:
    lines = []
    for cell in results["cells"]:
        if cell["status"] != "finished":
            name = ": ".join(part for part in (cell["system"], cell["control"]) if part)
            error = " ".join(cell.get("error", "").split())
            lines.append(
                f"{name}, {cell['scheme']}, fold {cell['fold']}, seed {cell['seed']}: "
                f"{cell['status']}{f', {error[:200]}' if error else ''}"
            )
    return lines


def _control_rows(results: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for view, targets in results["scores"].items():
        for target, scored in targets.items():
            for name, verdict in scored["controls"].items():
                figure = verdict["figure"]
                passes = verdict["passes"]
                cell = _cell(verdict, figure, 3 if figure == "auc" else 2)
                rows.append(
                    {
                        **{"name": name, "view": view, "target": target},
                        "draws": str(scored["systems"][name]["num_seeds"]),
                        "figure": "AUC" if figure == "auc" else "MAE minus the median's",
                        "value": f"{cell['value']} [{cell['interval']}]",
                        "verdict": {True: "passes", False: "FAILS", None: "unknown"}[passes],
                    }
                )
    return rows


def _view_note(split: Mapping[str, Any]) -> str:
    schemes = {
        "site_stratified": "every site in every fold: a system may know the scanner",
        "leave_sites_out": "whole sites are held out: nobody of a test site was trained on",
        "holdout": "one fold",
        "hash": "one fold, by a hash of the subject",
    }
    return (
        f"{split['num_folds']} fold{'s' if split['num_folds'] > 1 else ''}, part "
        f"'{split['part']}', {schemes[split['scheme']]}; split {split['hash'][:12]}"
    )


def _system_rows(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, told in facts.items():
        cost = told.get("cost", {})
        whole = name in DESCRIPTIONS
        rows.append(
            {
                "name": shown_name(name, facts),
                "note": told["what"] or DESCRIPTIONS.get(name, ""),
                "unranked": not told["ranked"],
                "cells": [
                    told["kind"],
                    told["seen"],
                    told["reason"] or ("control" if told["control"] else ""),
                    _count(cost.get("parameters")),
                    _count(cost.get("trainable_parameters")),
                    _count(cost.get("tokens_per_scan")),
                    number(cost.get("seconds"), 0) + (" (all standard rows)" if whole else ""),
                    _count(cost.get("peak_memory_mb")),
                ],
            }
        )
    return rows


def _count(value: Any) -> str:
    return "–" if value is None else f"{value:,}"


def _facts(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    environment = results["environment"]
    commit = environment["commit"] or "not a checkout"
    if environment["commit"] and environment["uncommitted_changes"]:
        commit += " with uncommitted changes"
    cells = results["cells"]
    done = sum(cell["status"] == "finished" for cell in cells)
    packages = ", ".join(f"{k} {v}" for k, v in environment["packages"].items() if v)
    return [
        ("cells", f"{done} of {len(cells)} finished ({percent(done / max(1, len(cells)))})"),
        ("cohort (content hash)", results["cohort"]["hash"]),
        ("commit", commit),
        ("Python", f"{environment['python']}, {environment['platform']}"),
        ("packages", packages),
    ]
