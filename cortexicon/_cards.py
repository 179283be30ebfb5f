"""Model cards of a run's checkpoints, from its results."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cortexicon.inference.predict import SYSTEM
from cortexicon.model_cards.write import write_model_card

# Part of the split -> what of it stands on a card, and the words for it.
_METRICS = {
    "test": {
        "mae": "mean absolute error",
        "r": "correlation",
        "balanced_accuracy": "balanced accuracy",
        "auc": "AUC",
    },
    "test_sites": {"mae": "mean absolute error", "auc": "AUC"},
}
_PARTS = {"test": "test", "test_sites": "unseen sites"}
_TITLES = {"avq": "AVQ codec", "lm": "AVQ language model"}


def write_cards(run: Path, results: Mapping[str, Any]) -> list[Path]:
    """Write README.md into the codec's and the language model's folder of a run.

    Parameters
    ----------
    run : pathlib.Path
        The run's folder.
    results : mapping
        What `collect_results` returned for it.

    Returns
    -------
    list of pathlib.Path
        The cards written; a stage whose checkpoint or facts are not there gets none.
    """
    cards = []
    for stage, title in _TITLES.items():
        facts = results["stages"].get(stage, {}).get("run", {})
        if "seconds" not in facts or not (run / stage / "config.json").is_file():
            continue  # not trained to the end
        cards.append(write_model_card(run / stage, _facts(run, stage, title, facts, results)))
    return cards


def _facts(
    run: Path, stage: str, title: str, facts: Mapping[str, Any], results: Mapping[str, Any]
) -> dict[str, Any]:
    reconstruction = results["reconstruction"] or {}
    # `simulate_cohort` names its parcellation so.
    simulated = str(reconstruction.get("atlas")).startswith("simulated")
    name = Path(facts["arguments"]["cohort"]).name
    return {
        "title": f"{title} ({run.resolve().name})",
        # Weights follow the terms of the data; those of a real cohort are for its owner to say.
        "license": "apache-2.0" if simulated else "other",
        "cohort": {
            "name": name,
            "simulated": simulated,
            "num_training_scans": facts["training_scans"],
            "content_hash": facts["cohort_hash"],
        },
        "training": {
            "command": facts["command"],
            "seconds": facts["seconds"],
            "seed": facts["arguments"]["seed"],
            "versions": facts["versions"],
            "commit": results["environment"]["commit"],
        },
        "scores": scores_of({"lm": "avq_lm"}.get(stage, stage), results),
    }


def scores_of(kind: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Held-out scores of a checkpoint, each beside baselines and chance, and with its command.

    Parameters
    ----------
    kind : {"avq", "avq_lm"}
        Model type.
    results : mapping
        What `collect_results` returned for the run; may be empty.
    """
    reconstruction = results.get("reconstruction")
    if not reconstruction:
        return []
    if kind == "avq":
        return _codec_scores(reconstruction, results.get("tokenizer_baseline") or {})
    return _clinical_scores(results["clinical"], reconstruction["command"])


def _codec_scores(ours: Mapping[str, Any], plain: Mapping[str, Any]) -> list[dict[str, Any]]:
    name = f"{plain.get('system')}, as many tokens"
    kept, plainly = ours["connectivity"], plain.get("connectivity", {})
    rows = [
        {"metric": "R2 of the reconstruction", **_found(ours, "r2")},
        {"metric": "connectivity kept (median correlation)", **_found(kept, "full")},
    ]
    rows[0]["beside"] = [
        _beside(name, plain, "r2"),
        _beside("Gaussian reference, as many bits", ours, "gaussian_reference_r2"),
        {"system": "each region's mean (chance)", "value": 0.0},
    ]
    rows[1]["beside"] = [
        _beside(name, plainly, "full"),
        _beside("training mean alone (chance)", kept, "training_mean_alone"),
    ]
    if "deviation" in kept:
        rows.append(
            {
                "metric": "connectivity kept, deviations from the training mean",
                **_found(kept, "deviation"),
                "beside": [
                    _beside(name, plainly, "deviation"),
                    {"system": "training mean alone (chance)", "value": 0.0},
                ],
            }
        )
    rows.append({"metric": "share of codes in use", "value": ours["usage"]})
    shared = {
        "unit": None,
        "part": "test",
        "num_subjects": ours["num_subjects"],
        "command": ours["command"],
    }
    return [
        shared | row | {"beside": [one for one in row.get("beside", ()) if one is not None]}
        for row in rows
    ]


def _clinical_scores(clinical: Mapping[str, Any], command: str) -> list[dict[str, Any]]:
    scores = []
    for target, result in clinical.items():
        for part, metrics in _METRICS.items():
            systems = result["parts"].get(part, {}).get("systems", {})
            ours = systems.get(SYSTEM, {})
            for key, name in metrics.items():
                # A constant prediction has no correlation: what is not finite is left out.
                if not _is_number(ours.get(key)):
                    continue
                others = {one: found for one, found in systems.items() if one != SYSTEM}
                beside = [_beside(one, found, key) for one, found in others.items()]
                scores.append(
                    {
                        "metric": f"{target}: {name}",
                        **_found(ours, key),
                        "unit": None,
                        "part": _PARTS[part],
                        "num_subjects": ours["num_subjects"],
                        "command": command,
                        "beside": [one for one in beside if one is not None],
                    }
                )
    return scores


def _found(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A value and its interval, where it has one."""
    bounds = values.get(f"{key}_interval")
    if bounds is None or not all(_is_number(one) for one in bounds):
        return {"value": values[key], "interval": None}
    return {"value": values[key], "interval": list(bounds)}


def _beside(system: str, values: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    """A row of another system, or None where it was not measured."""
    if not _is_number(values.get(key)):
        return None
    return {"system": system, **_found(values, key)}


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)
