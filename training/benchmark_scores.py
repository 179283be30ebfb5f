"""From the cells of a benchmark to results.json and the report."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import yaml

from cortexicon.cohorts import Cohort
from cortexicon.evaluation import EvaluationError, read_predictions, write_json
from cortexicon.evaluation.baselines import KERNEL_RIDGE, PERMUTED, is_numeric_target
from cortexicon.evaluation.benchmark_report import write_benchmark_report
from cortexicon.evaluation.benchmark_scores import score_view
from cortexicon.evaluation.results import environment

from .benchmark_suite import Suite, System

if TYPE_CHECKING:
    from .benchmark import Cell, View

COLUMNS = ["subject_id", "site", "target", "system", "seed", "y", "y_hat", "score", "probability"]


def write_results(
    suite: Suite, cohort: Cohort, views: Sequence["View"], cells: Sequence["Cell"], out: Path
) -> None:
    """Score every cell that has predictions; write results.json and report.html to `out`."""
    from .benchmark import read_outcome

    facts: dict[str, dict[str, Any]] = {}
    tables: dict[str, list[pd.DataFrame]] = {view.entry.name: [] for view in views}
    states: list[dict[str, Any]] = []
    spent: dict[str, list[dict[str, Any]]] = {}
    whose: dict[str, tuple[str, str]] = {}
    for cell in cells:
        outcome = read_outcome(cell, out) or {"status": "missing"}
        rows = None
        if outcome["status"] == "finished":
            try:
                files = sorted((out / "cells" / cell.hash / "predictions").glob("*.csv"))
                rows = cell_rows(files, cell, cohort, suite.targets)
            except EvaluationError as error:
                outcome = {**outcome, "status": "failed", "error": str(error)}
                write_json(out / "cells" / cell.hash / "outcome.json", outcome)
        states.append(
            {
                **{"hash": cell.hash, "system": cell.system.name, "control": cell.control},
                **{"scheme": cell.split.scheme, "fold": cell.fold, "seed": cell.seed},
                **{k: v for k, v in outcome.items() if k in ("status", "error", "seconds")},
            }
        )
        if rows is None:
            continue
        for name in rows["system"].unique():
            facts.setdefault(name, _facts(cell.system, name, cell.control))
            whose[name] = (cell.system.name, cell.control)
            spent.setdefault(name, []).append(outcome)
        for view in views:
            if view.split.hash == cell.split.hash:
                tables[view.entry.name].append(rows[rows["part"] == view.entry.part])
    for system in suite.systems:
        if system.kind == "file":
            facts[system.name] = _facts(system, system.name, "")
            for view in views:
                tables[view.entry.name].append(outside_rows(system, view, cohort, suite.targets))
    for name, outcomes in spent.items():
        facts[name]["cost"] = _cost(outcomes)
        mine = [cell for cell in cells if (cell.system.name, cell.control) == whose[name]]
        plain = facts[name]["ranked"] and not facts[name]["control"]
        if plain and len(outcomes) < len(mine):
            # Other folds are other people: its score cannot stand beside those of whole systems.
            so_far = f"{len(outcomes)} of {len(mine)} cells so far"
            facts[name] |= {"ranked": False, "reason": so_far}
    scored: dict[str, dict[str, Any]] = {}
    pooled: dict[str, pd.DataFrame] = {}
    for view in views:
        parts = [table for table in tables[view.entry.name] if len(table)]
        if parts:
            pooled[view.entry.name] = pd.concat(parts, ignore_index=True)[COLUMNS]
            scored[view.entry.name] = score_view(
                pooled[view.entry.name], facts, suite.num_resamples
            )
    results = {
        "title": suite.title,
        "suite": yaml.safe_load(suite.path.read_text(encoding="utf-8")),
        "command": shlex.join(["cortexicon", *sys.argv[1:]]),
        "environment": environment(),
        "cohort": {
            "hash": cohort.content_hash,
            "atlas": cohort.atlas,
            "num_regions": len(cohort.labels),
            "num_scans": len(cohort),
        },
        "splits": {
            view.entry.name: {
                **{"scheme": view.split.scheme, "part": view.entry.part, "hash": view.split.hash},
                "num_folds": len(view.entry.folds or view.split.folds),
            }
            for view in views
        },
        "systems": facts,
        "cells": states,
        "scores": scored,
    }
    write_json(out / "results.json", results)
    score_table(scored, facts).to_csv(out / "scores.csv", index=False, float_format="%.4g")
    write_benchmark_report(out, pooled)


def score_table(
    scored: dict[str, dict[str, Any]], facts: dict[str, dict[str, Any]]
) -> pd.DataFrame:
    """One row for each split, target and system: the score with its interval, and what it is."""
    rows = []
    for split, targets in scored.items():
        for target, found in targets.items():
            score = "mae" if found["kind"] == "number" else "auc"
            for name in (*found["ranking"], *found["unranked"], *found["controls"]):
                mine = found["systems"][name]
                low, high = mine.get(f"{score}_interval") or (None, None)
                gap = mine.get("difference_to_reference_interval") or (None, None)
                passes = found["controls"].get(name, {}).get("passes")
                rows.append(
                    {
                        **{"split": split, "target": target, "system": name},
                        **{"ranked": facts[name]["ranked"] and not facts[name]["control"]},
                        **{"control_passes": passes, "subjects": mine["num_subjects"]},
                        **{"seeds": mine["num_seeds"], "score": score},
                        **{"value": mine.get(score), "low": low, "high": high, "r": mine.get("r")},
                        **{"predicted_sd": mine.get("predicted_sd")},
                        **{"minus_reference": mine.get("difference_to_reference")},
                        **{"minus_reference_low": gap[0], "minus_reference_high": gap[1]},
                        **{"p_holm": mine.get("p_reference_holm")},
                    }
                )
    return pd.DataFrame(rows)


def _facts(system: System, name: str, control: str) -> dict[str, Any]:
    """What a table says of a system besides its scores."""
    control = "permuted labels" if name == PERMUTED else control
    return {
        **{"kind": system.kind, "ranked": system.ranked, "reason": system.reason},
        **{"seen": system.seen, "what": system.what, "control": control},
        "control_of": (KERNEL_RIDGE if name == PERMUTED else system.name) if control else "",
    }


def _cost(outcomes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What one cell of a system costs: mean seconds, largest memory, what its commands told."""
    told: dict[str, Any] = {}
    for outcome in outcomes:
        told |= outcome.get("cost", {})
    return {
        "seconds": float(np.mean([outcome["seconds"] for outcome in outcomes])),
        "peak_memory_mb": max(outcome["peak_memory_mb"] for outcome in outcomes),
        **told,
    }


def cell_rows(
    files: Sequence[Path], cell: "Cell", cohort: Cohort, targets: Sequence[str]
) -> pd.DataFrame:
    """Predictions of a cell, checked: of test subjects of its fold, and of nobody else.

    Those of validation subjects, by which a system may have chosen its readout, are left out.

    Raises
    ------
    EvaluationError
        No file, a subject outside the part that the file names, training subjects or none that
        are scored, a true value that is not the cohort's (a control's may differ, and is replaced).
    """
    if not files:
        raise EvaluationError("the cell left no file of predictions; write to {out}.")
    rows = read_predictions(files)
    rows = rows[rows["target"].isin(targets)].copy()
    fold = cell.split[cell.fold]
    for part, mine in rows.groupby("part"):
        strangers = sorted(set(mine["subject_id"]) - set(fold.get(part, ())))
        if strangers or part not in ("validation", "test", "test_sites"):
            raise EvaluationError(
                f"predictions of part {part!r}: expected test subjects of fold {cell.fold} alone, "
                f"found {len(strangers)} others, the first {', '.join(strangers[:3]) or part}."
            )
    rows = rows[rows["part"] != "validation"].copy()
    if not len(rows):
        raise EvaluationError("the cell's files hold no prediction of a test subject.")
    rows = _with_truth(rows, cohort, check=not cell.control)
    rows["seed"] = _seeds(rows, cell.seed)
    if cell.system.kind == "command":
        name = cell.system.name
        rows["system"] = f"{name}: {cell.control}" if cell.control else name
    return rows


def outside_rows(
    system: System, view: "View", cohort: Cohort, targets: Sequence[str]
) -> pd.DataFrame:
    """Predictions of a system that was run elsewhere, checked against the folds of this benchmark.

    Raises
    ------
    EvaluationError
        A file that cannot be read, a true value that is not the cohort's, or a subject who is
        predicted in a fold that trained on them.
    """
    files = system.definition["files"]
    rows = read_predictions(files[view.entry.name] if isinstance(files, dict) else files)
    rows = rows[rows["target"].isin(targets) & (rows["part"] == view.entry.part)].copy()
    tested = {
        (str(fold), name)
        for fold in view.entry.folds or range(len(view.split))
        for name in view.split[fold].get(view.entry.part, ())
    }
    wrong = [
        f"{name} in fold {fold}"
        for fold, name in zip(rows["fold"], rows["subject_id"], strict=True)
        if (str(fold), name) not in tested
    ]
    if wrong:
        raise EvaluationError(
            f"{system.name}: expected predictions of subjects by the fold that tests them in "
            f"{view.entry.name!r}, found {len(wrong)} others, the first {wrong[0]}. "
            "Use the split file of this benchmark (RESULTS/splits)."
        )
    rows = _with_truth(rows, cohort, check=True)
    return rows.assign(system=system.name, seed=_seeds(rows, 0))


def _seeds(rows: pd.DataFrame, seed: int) -> list[str]:
    """The cell's seed, and behind it the draw where a file holds several."""
    return [f"{seed}.{draw}" if draw else str(seed) for draw in rows["draw"]]


def _with_truth(rows: pd.DataFrame, cohort: Cohort, check: bool) -> pd.DataFrame:
    """The cohort's own values as `y` and sites, after a look whether the file agrees."""
    people = cohort.participants
    for target, mine in rows.groupby("target"):
        column = people[target]
        truth = column.reindex(mine["subject_id"])
        if truth.isna().any():
            unknown = mine["subject_id"].to_numpy()[truth.isna().to_numpy()]
            raise EvaluationError(
                f"{target} of subject {unknown[0]} is unknown in the cohort, but was predicted."
            )
        if is_numeric_target(column):
            told = pd.to_numeric(mine["y"], errors="coerce").to_numpy(float)
            values = truth.to_numpy(float)
            differs = ~(np.abs(told - values) <= 1e-3 * np.maximum(1.0, np.abs(values)))
        else:
            differs = mine["y"].to_numpy(str) != truth.astype(str).to_numpy()
        if check and differs.any():
            first = int(np.flatnonzero(differs)[0])
            raise EvaluationError(
                f"{target} of subject {mine['subject_id'].iloc[first]}: the predictions say "
                f"{mine['y'].iloc[first]}, the cohort {truth.iloc[first]}."
            )
        rows.loc[mine.index, "y"] = truth.astype(str).to_numpy()
    rows["site"] = people["site"].astype(str).reindex(rows["subject_id"]).to_numpy()
    return rows
