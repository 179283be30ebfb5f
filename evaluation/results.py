"""Gathers one run folder into results.json: every number, and what it takes to get it again."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from .clinical import score_clinical
from .errors import EvaluationError
from .json_files import write_json

STAGES = ("text", "avq", "lm")
RECONSTRUCTION_FILE = "evaluation/reconstruction.json"
TOKENIZER_FILE = "evaluation/tokenizer_baseline.json"
EXAMPLES_FILE = "evaluation/reconstruction_examples.npz"
PACKAGES = (
    "cortexicon",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "matplotlib",
    "nilearn",
)


def collect_results(run_folder: str | Path, num_resamples: int = 1000) -> dict[str, Any]:
    """Score the run's files of predictions, gather its stages, and write RUN/results.json.

    Parameters
    ----------
    run_folder : path
        Read are `evaluation/reconstruction.json` (`evaluate_reconstruction`),
        `evaluation/tokenizer_baseline.json` (`tokenizer_baseline`), `predictions/*.csv`,
        `split.json`, and of each stage (text, avq, lm) `run.json` and `training_log.jsonl`.
    num_resamples : int
        Bootstrap resamples.

    Returns
    -------
    dict
        As written: `reconstruction`, `tokenizer_baseline`, `clinical`, `stages` (each with its
        `run.json` and the last value of everything logged), `cohort_hash`, `split_hash`,
        `seconds`, `commands`, `environment`, and `missing`, which names what was not found.

    Raises
    ------
    EvaluationError
        If the folder does not exist, a JSON file of it is broken, stages disagree on cohort or
        split, or a file of predictions is refused.
    """
    run = Path(run_folder)
    if not run.is_dir():
        raise EvaluationError(f"{run}: expected the folder of a run; it does not exist.")
    missing: list[str] = []

    def read_or_name(relative: str) -> dict[str, Any] | None:
        if not (run / relative).is_file():
            missing.append(relative)
            return None
        return read_json(run / relative)

    results: dict[str, Any] = {
        "reconstruction": read_or_name(RECONSTRUCTION_FILE),
        "tokenizer_baseline": read_or_name(TOKENIZER_FILE),
    }
    files = sorted((run / "predictions").glob("*.csv"))
    if not files:
        missing.append("predictions/*.csv")
    results["clinical"] = score_clinical(files, num_resamples=num_resamples) if files else {}
    stages: dict[str, Any] = {}
    for stage in STAGES:
        facts = read_or_name(f"{stage}/run.json")
        log = read_log(run / stage / "training_log.jsonl")
        if not log:
            missing.append(f"{stage}/training_log.jsonl")
        if facts is not None or log:
            stages[stage] = {"run": facts or {}, "last_logged": last_logged(log)}
    results["stages"] = stages
    split = read_or_name("split.json")
    # Text has no cohort; where a stage names one, all must name the same.
    for name in ("cohort_hash", "split_hash"):
        found = {stage: facts["run"].get(name) for stage, facts in stages.items()}
        if split is not None:
            found["split.json"] = split.get("hash" if name == "split_hash" else name)
        found = {stage: value for stage, value in found.items() if value}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{stage}: {str(value)[:12]}" for stage, value in found.items())
            raise EvaluationError(
                f"{run}: the stages were run on different data ({name} is {listed}); "
                "run them again on one cohort and one split."
            )
        results[name] = next(iter(found.values()), None)
    results["seconds"] = {
        stage: facts["run"]["seconds"]
        for stage, facts in stages.items()
        if "seconds" in facts["run"]
    }
    results["commands"] = {
        stage: facts["run"]["command"]
        for stage, facts in stages.items()
        if "command" in facts["run"]
    }
    results["environment"] = environment()
    results["missing"] = missing
    write_json(run / "results.json", results)
    return results


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object; `EvaluationError` names the file if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path}: expected a JSON file, could not read it ({error})."
        ) from error
    if not isinstance(value, dict):
        raise EvaluationError(f"{path}: expected a JSON object, found a {type(value).__name__}.")
    return value


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Read a training log, one JSON object per line; empty if the file is absent.

    A last line cut off by a killed process is left out; a broken line before it is refused.
    """
    path = Path(path)
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise EvaluationError(
                f"{path}, line {number}: expected a JSON object, found {line[:60]!r}."
            ) from error
    return records


def last_logged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The last value of every key that occurs in a log."""
    last: dict[str, Any] = {}
    for record in records:
        last |= record
    return last


def environment() -> dict[str, Any]:
    """Python, package versions, machine and the commit of the checkout (None outside of one)."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str | None:
    """Ask git about the checkout this file lies in; None without git or outside of a checkout."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None  # installed: an enclosing repository of somebody else is not ours
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
