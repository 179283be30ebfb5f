"""Model cards of a run's checkpoints, from its results."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cortexicon.model_cards import write_model_card

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
        "scores": _scores(stage, reconstruction, results["clinical"]),
    }


def _scores(
    stage: str, reconstruction: Mapping[str, Any], clinical: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Held-out scores of one stage, each with the command that measured it."""
    if not reconstruction:
        return []
    shared = {"part": "test", "command": reconstruction["command"]}
    if stage == "avq":
        values = {
            "R2 of the reconstruction": reconstruction["r2"],
            "connectivity kept (median correlation)": reconstruction["connectivity"]["full"],
            "share of codes in use": reconstruction["usage"],
        }
        count = reconstruction["num_subjects"]
        return [
            {"metric": metric, "value": value, "unit": None, "num_subjects": count, **shared}
            for metric, value in values.items()
        ]
    scores = []
    for target, result in clinical.items():
        for system, found in result["parts"].get("test", {}).get("systems", {}).items():
            for key in ("mae", "r", "balanced_accuracy", "auc"):
                # A constant prediction has no correlation: NaN is left out, not written.
                if found.get(key) is not None and math.isfinite(found[key]):
                    scores.append(
                        {
                            "metric": f"{target}, {system}: {key}",
                            "value": found[key],
                            "unit": None,
                            "num_subjects": found["num_subjects"],
                            **shared,
                        }
                    )
    return scores
