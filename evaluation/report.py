"""One self-contained report.html per run: numbers, tables and pictures, for people."""

from __future__ import annotations

import base64
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from .clinical import NUMERIC_FLOOR, NUMERIC_REFERENCE
from .errors import EvaluationError
from .rendering import Picture, render_figures
from .rendering_clinical import PART_NAMES, UNITS
from .report_tables import codec_rows, models_of, number, percent, target_tables
from .results import collect_results, read_json

# Names of the pictures of two sections; the others belong to the codec.
TRAINING = ("training_codec", "domain", "training_language")
CLINICAL = ("systems", "predictions", "moves", "code_networks")
LIMITS = (
    "This is research software. No number here supports a decision about a single person.",
    "The interval of a score covers the choice of test subjects, not that of training subjects, "
    "of the split, or of the seed.",
    "A model can guess age or diagnosis from the scanner. Compare with the rows 'site mean' and "
    "'scan length + TR + site', and look at the held-out sites before believing the held-out "
    "subjects.",
    "R² says how much of the signal's variance survives the codes, not whether the surviving part "
    "is the one a clinical question needs; see the connectivity deviation and the systems.",
    "Accuracy of the domain classifier near one half is no proof of alignment by itself.",
)


def write_report(run_folder: str | Path) -> Path:
    """Draw the figures, fill the template and write RUN/report.html.

    Uses RUN/results.json, and makes it with `collect_results` if it is not there. What the run
    lacks is named in the report.

    Returns
    -------
    Path
        The report. It loads nothing from anywhere: pictures and style are inside.

    Raises
    ------
    EvaluationError
        If the folder does not exist, or one of its files is broken.
    """
    from jinja2 import Environment, StrictUndefined

    run = Path(run_folder)
    if not run.is_dir():
        raise EvaluationError(f"{run}: expected the folder of a run; it does not exist.")
    if not (run / "results.json").is_file():
        collect_results(run)
    results = read_json(run / "results.json")
    pictures = [_with_data(picture) for picture in render_figures(run)]
    clinical = tuple(p["name"] for p in pictures if p["name"].startswith(CLINICAL))
    targets = [target_tables(name, scored) for name, scored in results["clinical"].items()]
    templates = files(__package__) / "templates"
    template = (templates / "report.html.jinja").read_text("utf-8")
    page = (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(template)
        .render(
            style=(templates / "report.css").read_text("utf-8"),
            title=f"Cortexicon: {run.resolve().name}",
            subtitle=_subtitle(results),
            cards=_cards(results),
            summary=_summary(results),
            missing=results["missing"],
            codec_rows=codec_rows(results),
            mean_alone=_mean_alone(results),
            targets=targets,
            codec_pictures=[p for p in pictures if p["name"] not in (*TRAINING, *clinical)],
            clinical_pictures=[p for p in pictures if p["name"] in clinical],
            training_pictures=[p for p in pictures if p["name"] in TRAINING],
            stage_rows=_stage_rows(results),
            limits=LIMITS,
            commands=[(s, _command(c)) for s, c in results["commands"].items()],
            facts=_facts(results),
        )
    )
    path = run / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _with_data(picture: Picture) -> dict[str, str]:
    data = base64.b64encode(picture.path.read_bytes()).decode("ascii") if picture.path else ""
    return {
        "name": picture.name,
        "title": picture.title,
        "caption": picture.caption,
        "data": data,
        "problem": picture.problem,
    }


def _subtitle(results: dict[str, Any]) -> str:
    reconstruction = results["reconstruction"] or {}
    pieces = []
    if reconstruction:
        pieces.append(f"{reconstruction['num_subjects']} held-out scans decoded")
    for name, scored in results["clinical"].items():
        if "test" in scored["parts"]:
            pieces.append(f"{name} of {scored['parts']['test']['num_subjects']} unseen subjects")
    if results["cohort_hash"]:
        pieces.append(f"cohort {results['cohort_hash'][:12]}")
    if results["environment"]["commit"]:
        pieces.append(f"commit {results['environment']['commit'][:10]}")
    return " · ".join(pieces)


def _cards(results: dict[str, Any]) -> list[dict[str, str]]:
    cards = []
    codec = results["reconstruction"]
    if codec:
        cards += [
            {"value": number(codec["r2"], 3), "label": "reconstruction R², held-out scans"},
            {
                "value": number(codec["connectivity"].get("deviation")),
                "label": "personal connectivity kept (correlation of the deviation)",
            },
            {"value": percent(codec["codebook"]["usage"]), "label": "of the codebook in use"},
        ]
    for target, scored in results["clinical"].items():
        of_part = scored["parts"].get("test")
        if not of_part or not (models := models_of(of_part)):
            continue
        scores = of_part["systems"][models[0]]
        if scored["kind"] == "number":
            unit = f" ({UNITS[target]})" if target in UNITS else ""
            cards.append(
                {
                    "value": number(scores.get("mae")),
                    "label": f"{target}: mean absolute error{unit}, {models[0]}",
                }
            )
        else:
            cards.append(
                {"value": number(scores.get("auc")), "label": f"{target}: AUC, {models[0]}"}
            )
    return cards


def _summary(results: dict[str, Any]) -> list[str]:
    sentences = []
    codec, plain = results["reconstruction"], results["tokenizer_baseline"]
    if codec:
        sentences.append(
            f"Each {codec['window_seconds']:.0f} s of scan become {codec['tokens_per_window']} "
            f"codes ({codec['bits_per_second']:.1f} bits per second). Decoded again, they explain "
            f"{percent(codec['r2'])} of the variance of the signal of people the codec never saw."
        )
        if plain:
            gap = codec["r2"] - plain["r2"]
            sentences.append(
                f"A tokenizer that learns nothing but {plain['system']} explains "
                f"{percent(plain['r2'])} with {plain['tokens_per_window']} codes: the learned "
                f"codec is {'ahead' if gap > 0 else 'behind'} by {number(abs(gap), 3)}."
            )
        deviation = codec["connectivity"].get("deviation")
        if deviation is not None:
            sentences.append(
                "Of what sets one person's connectivity apart from the average, the decoded "
                f"signal keeps a correlation of {number(deviation)} (1 would be all of it)."
            )
    for target, scored in results["clinical"].items():
        for part, name in PART_NAMES.items():
            if part in scored["parts"]:
                sentences += _clinical_sentences(
                    target, scored["kind"], scored["parts"][part], name
                )
    unread = [
        target
        for target, scored in results["clinical"].items()
        if not any(models_of(of_part) for of_part in scored["parts"].values())
    ]
    if unread:
        sentences.append(f"Only baselines predicted {', '.join(unread)}; no model did in this run.")
    return sentences or ["This run holds nothing that could be scored yet."]


def _clinical_sentences(target: str, kind: str, of_part: dict[str, Any], name: str) -> list[str]:
    systems, models = of_part["systems"], models_of(of_part)
    if not models or systems[models[0]].get("num_subjects", 0) == 0:
        return []
    best = systems[models[0]]
    who = f"{target}, {name} ({best['num_subjects']} people): '{models[0]}'"
    if kind == "classes":
        return [f"{who} has an AUC of {number(best['auc'])}; 0.5 would be guessing."]
    unit = f" {UNITS[target]}" if target in UNITS else ""
    sentence = f"{who} errs by {number(best['mae'])}{unit} on average"
    floor, reference = systems.get(NUMERIC_FLOOR), systems.get(NUMERIC_REFERENCE)
    if floor and reference:
        sentence += (
            f"; giving everybody the median errs by {number(floor['mae'])}, kernel ridge on "
            f"connectivity by {number(reference['mae'])}"
        )
    if best.get("gain_share") is not None:
        sentence += f". It recovers {percent(best['gain_share'])} of kernel ridge's gain"
    _, highest = best.get("difference_to_floor_interval") or (None, None)
    if highest is not None and highest >= 0:
        sentence += "; it is not reliably better than the median"
    return [sentence + "."]


def _mean_alone(results: dict[str, Any]) -> str:
    codec = results["reconstruction"] or {}
    alone = codec.get("connectivity", {}).get("training_mean_alone")
    if alone is None:
        return ""
    return (
        f"The training mean alone correlates {number(alone)} with the full matrix: only the "
        "deviation says something about the person."
    )


def _stage_rows(results: dict[str, Any]) -> list[list[str]]:
    rows = []
    for stage, facts in results["stages"].items():
        seconds = facts["run"].get("seconds")
        rows.append(
            [
                {"text": "text warm-up", "avq": "codec", "lm": "language model"}[stage],
                "–" if seconds is None else f"{int(seconds) // 60} min {int(seconds) % 60:02d} s",
                str(facts["run"].get("seed", "–")),
                str(facts["last_logged"].get("step", "–")),
            ]
        )
    return rows


def _command(command: Any) -> str:
    return " ".join(map(str, command)) if isinstance(command, list) else str(command)


def _facts(results: dict[str, Any]) -> list[tuple[str, str]]:
    environment = results["environment"]
    commit = environment["commit"] or "not a checkout"
    if environment["commit"] and environment["uncommitted_changes"]:
        commit += " with uncommitted changes"
    packages = ", ".join(f"{k} {v}" for k, v in environment["packages"].items() if v)
    return [
        ("cohort (content hash)", results["cohort_hash"] or "not recorded"),
        ("split (hash)", results["split_hash"] or "not recorded"),
        ("commit", commit),
        ("Python", f"{environment['python']}, {environment['platform']}"),
        ("packages", packages),
    ]
