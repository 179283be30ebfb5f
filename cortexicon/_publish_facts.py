"""Facts of a run for its card: whom it was trained on, what it scores, in all and by group."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from cortexicon._cards import scores_of
from cortexicon._connectome import pair_rows
from cortexicon.cohorts import Cohort, Split, load_cohort, load_split
from cortexicon.evaluation.connectivity import correlation_by_scan
from cortexicon.evaluation.connectome import PLAIN, plain_system, tokens_of
from cortexicon.evaluation.scores import interval_of
from cortexicon.inference import Checkpoint
from cortexicon.inference.connectome import cohort_matrices, decode_matrices, encode_matrices
from cortexicon.inference.exposure import (
    TrainingLatents,
    codec_latents,
    connectome_latents,
    training_subjects,
)
from cortexicon.model_cards import PublishError
from cortexicon.model_cards.facts import DataFacts, read_data_facts
from cortexicon.modeling import AVQConnectomeModel

SMALLEST_GROUP = 10
_AGES = (0, 12, 18, 30, 50, 200)
_MOTION = ("mean_fd", "func_mean_fd", "framewise_displacement")
# Principal components and k-means at the bits of the connectivity stream's usual 64 tokens.
_PLAIN = next(iter(PLAIN))
_TITLES = {
    "avq": "AVQ codec of fMRI series",
    "avq_connectome": "AVQ codec of functional connectivity",
    "avq_lm": "AVQ language model",
}


class RunFacts(NamedTuple):
    """What is known of the run behind a checkpoint.

    Attributes
    ----------
    values : dict
        Its run.json.
    results : dict
        results.json of the run's folder, or empty.
    cohort : Cohort
        Of training.
    split : Split
    name : str
        Of the cohort's folder.
    """

    values: dict[str, Any]
    results: dict[str, Any]
    cohort: Cohort
    split: Split
    name: str


def load(folder: Path) -> Cohort:
    """`load_cohort`, for whoever must not import cohorts before it is needed."""
    return load_cohort(folder)


def read_run(checkpoint: Path, cohort_folder: Path | None = None) -> RunFacts:
    """Facts of the run that wrote a checkpoint folder.

    Raises
    ------
    PublishError
        run.json is missing or broken, or the cohort is not that of training.
    """
    path = checkpoint / "run.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        arguments = values["arguments"]
        where, split_file = cohort_folder or Path(arguments["cohort"]), arguments["split"]
        expected = values["cohort_hash"], values["split_hash"]
        _ = values["seconds"], values["training_scans"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{path}: expected the facts of a finished training run, found {error!r}. Publish the "
            "folder that training wrote."
        ) from error
    if not where.exists():
        raise PublishError(
            f"{where}: the cohort of training is not there, so nobody can tell whether the codes "
            "hold one person. Give it with --cohort."
        )
    cohort = load_cohort(where)
    split = load_split(split_file, cohort)
    if (cohort.content_hash, split.hash) != expected:
        raise PublishError(
            f"{where}, {split_file}: expected cohort {expected[0][:12]} and split "
            f"{expected[1][:12]}, on which {checkpoint} was trained, found "
            f"{cohort.content_hash[:12]} and {split.hash[:12]}."
        )
    results = checkpoint.parent / "results.json"
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    return RunFacts(values, found, cohort, split, where.resolve().name)


def names_of(cohort: Cohort) -> list[str]:
    """Everything in a cohort's tables that names one person: subject ids and other unique text."""
    table = cohort.participants
    names = [str(one) for one in table.index]
    for column in table:
        values = table[column].dropna().astype(str)
        is_id = column.lower().endswith(("_id", "id")) and values.is_unique and len(values) > 1
        if is_id:
            names += [value.removesuffix(".0") for value in values]
    return sorted(set(names))


def facts_of_cohort(cohort: Cohort, asked: str | None, where: Path) -> DataFacts:
    """The facts that were asked for, or those of simulated cohorts.

    Raises
    ------
    PublishError
        Nobody said what the data are.
    """
    if asked is None and not is_simulated(cohort):
        raise PublishError(
            f"{where}: expected --data FILE with name, people, consent, preprocessing and licence "
            "of these data, for a card must state them. `abide1` comes along; "
            "model_cards/data/abide1.yaml is a pattern for others."
        )
    return read_data_facts(asked or "simulated")


def data_facts(run: RunFacts, asked: str | None) -> DataFacts:
    """`facts_of_cohort` of a run's cohort."""
    return facts_of_cohort(run.cohort, asked, Path(run.values["arguments"]["cohort"]))


def is_simulated(cohort: Cohort) -> bool:
    """Whether `simulate_cohort` made it, by the name of its parcellation."""
    return str(cohort.atlas).startswith("simulated")


def latents_of(
    run: RunFacts,
    checkpoint: Checkpoint | None = None,
    connectome: AVQConnectomeModel | None = None,
) -> TrainingLatents:
    """Training latents of a codec of either stream; give one of the two."""
    subjects = training_subjects(run.values, run.split, run.cohort)
    if connectome is not None:
        return connectome_latents(connectome, run.cohort, subjects)
    assert checkpoint is not None
    arguments = run.values["arguments"]
    others = [load_cohort(Path(one)) for one in arguments.get("more_cohorts") or []]
    flipped = bool(arguments.get("flip_sign") or arguments.get("reverse_time"))
    return codec_latents(checkpoint, [run.cohort, *others], subjects, flipped)


def card_facts(
    run: RunFacts, checkpoint: Path, model: PreTrainedModel, data: DataFacts
) -> dict[str, Any]:
    """What `write_model_card` takes, save licence and repository."""
    values, kind = run.values, model.config.model_type
    # The commit that trained, where the run says so; else the one that scored.
    commit = values.get("commit") or run.results.get("environment", {}).get("commit")
    scores = scores_of(kind, run.results)
    tables: list[dict[str, Any]] = []
    if kind == "avq" and run.results.get("reconstruction"):
        per_person = run.results["reconstruction"]["r2_per_subject"]
        tables = [group_table("R2 of the reconstruction", per_person, run.cohort.participants)]
    elif kind == "avq_lm":
        tables = _prediction_groups(checkpoint.parent, run.cohort.participants)
    elif kind == "avq_connectome":
        assert isinstance(model, AVQConnectomeModel)
        scores, tables = _connectome_scores(run, checkpoint, model)
    return {
        "title": f"{_TITLES[kind]}: {data.name.partition(',')[0]}, {run.cohort.atlas}",
        "cohort": {
            "name": run.name,
            "simulated": is_simulated(run.cohort),
            "num_training_scans": values["training_scans"],
            "content_hash": values["cohort_hash"],
        },
        "training": {
            "command": values["command"],
            "seconds": values["seconds"],
            "seed": values["arguments"].get("seed", 0),
            "versions": values["versions"],
            "commit": commit,
        },
        "scores": scores,
        "groups": [table for table in tables if table["rows"]],
    }


def title_of_both(run: RunFacts, data: DataFacts) -> str:
    """Title of a repository that holds both streams."""
    return (
        f"AVQ codec of fMRI series and connectivity: {data.name.partition(',')[0]}, "
        f"{run.cohort.atlas}"
    )


def group_table(
    metric: str, per_person: Mapping[str, float | None], people: pd.DataFrame, part: str = "test"
) -> dict[str, Any]:
    """Means of a score of single people by sex, age band, site and head motion.

    Parameters
    ----------
    metric : str
    per_person : mapping of subject id to float
        None or NaN where it is not defined.
    people : pandas.DataFrame
        Participants table, indexed by subject id.
    part : str

    Returns
    -------
    dict
        ``metric``, ``part``, ``smallest`` and ``rows``: see `write_model_card`. Groups of fewer
        than `SMALLEST_GROUP` people are left out.
    """
    values = pd.Series(per_person, dtype=float).dropna()
    table = people.loc[[name for name in values.index if name in people.index]]
    values = values.loc[table.index]
    columns: dict[str, pd.Series] = {}
    if "sex" in table:
        columns["sex"] = table["sex"]
    if "age" in table:
        labels = ["under 12", "12 to 17", "18 to 29", "30 to 49", "50 and over"]
        columns["age"] = pd.cut(table["age"].astype(float), _AGES, right=False, labels=labels)
    columns["site"] = table["site"]
    motion = next((name for name in _MOTION if name in table), None)
    if motion is not None and table[motion].nunique() > 2:
        thirds = pd.qcut(table[motion].astype(float), 3, labels=["low", "middle", "high"])
        columns["motion (thirds)"] = thirds
    rows = []
    for by, groups in columns.items():
        for group in sorted(groups.dropna().unique(), key=str if by == "site" else _order(groups)):
            chosen = values[(groups == group).to_numpy()].to_numpy()
            if len(chosen) < SMALLEST_GROUP:
                continue
            low, high = interval_of(np.mean, [chosen])
            rows.append(
                {
                    "by": by,
                    "group": str(group),
                    "num_subjects": len(chosen),
                    "value": float(chosen.mean()),
                    "interval": [low, high],
                }
            )
    name = f"{metric}, mean over people"
    return {"metric": name, "part": part, "smallest": SMALLEST_GROUP, "rows": rows}


def _order(groups: pd.Series) -> Any:
    """A sort key that keeps the order of categories, and that of text elsewhere."""
    if isinstance(groups.dtype, pd.CategoricalDtype):
        place = {name: number for number, name in enumerate(groups.cat.categories)}
        return place.__getitem__
    return str


def _prediction_groups(run_folder: Path, people: pd.DataFrame) -> list[dict[str, Any]]:
    """Tables of the language model's answers, from its files of predictions."""
    tables = []
    for path in sorted((run_folder / "predictions").glob("language-model_*.csv")):
        rows = pd.read_csv(path, dtype={"subject_id": str})
        rows = rows[rows["part"] == "test"].set_index("subject_id")
        if not len(rows):
            continue
        target = rows["target"].iloc[0]
        if pd.api.types.is_numeric_dtype(rows["y"]):
            name, score = f"{target}: absolute error", (rows["y"] - rows["y_hat"]).abs()
        else:
            name, score = f"{target}: share answered rightly", rows["y"] == rows["y_hat"]
        tables.append(group_table(name, score.astype(float).to_dict(), people))
    return tables


def _connectome_scores(
    run: RunFacts, checkpoint: Path, model: AVQConnectomeModel
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Correlation of decoded with raw matrices of the test people, measured here."""
    parts = run.split[int(run.values["arguments"].get("fold", 0))]
    tested, people = list(parts["test"]), list(parts["train"])
    if run.values["arguments"].get("fit_validation"):
        people += parts["validation"]
    raw = cohort_matrices(run.cohort, tested)
    fitted = cohort_matrices(run.cohort, people)
    upper = np.triu_indices(raw.matrices.shape[1], 1)
    rows = pair_rows(raw)
    training = pair_rows(fitted)
    mean = np.nanmean(training, axis=0)
    codes = encode_matrices(model, raw, run.cohort.coordinates)
    decoded = {
        "ours": decode_matrices(model, codes, run.cohort.coordinates)[:, *upper],
        f"{_PLAIN}: {tokens_of(_PLAIN)} tokens": plain_system(training, _PLAIN)(rows),
        "training mean alone (chance)": np.broadcast_to(mean, rows.shape),
    }
    found = {
        "connectivity stream: correlation with the raw matrix": {
            name: correlation_by_scan(rows, one) for name, one in decoded.items()
        },
        "connectivity stream: correlation of deviations from the training mean": {
            name: correlation_by_scan(rows - mean, one - mean) for name, one in decoded.items()
        },
    }
    shown = checkpoint.name if checkpoint.is_absolute() else checkpoint
    scores, tables = [], []
    for metric, systems in found.items():
        values = np.array(systems.pop("ours"), float)
        beside = []
        for name, others in systems.items():
            level = np.array(others, float)
            if np.isfinite(level).all():
                interval = interval_of(np.median, [level])
                beside.append(
                    {"system": name, "value": float(np.median(level)), "interval": interval}
                )
            else:  # the mean deviates from itself in nothing
                beside.append({"system": name, "value": 0.0})
        scores.append(
            {
                "metric": f"{metric}, median",
                "value": float(np.median(values)),
                "interval": interval_of(np.median, [values]),
                "unit": None,
                "part": "test",
                "num_subjects": len(tested),
                "command": f"cortexicon publish {shown} OWNER/NAME --dry-run",
                "beside": beside,
            }
        )
        per_person = dict(zip(tested, values.tolist(), strict=True))
        tables.append(group_table(metric, per_person, run.cohort.participants))
    return scores, tables
