"""Fills a checkpoint's README.md from what a run measured, and from nothing else."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCardData,
    eval_result_entries_to_yaml,
)

import cortexicon

from .errors import CardError

KINDS = ("avq", "avq_lm", "avq_connectome")


def write_model_card(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write README.md into a checkpoint folder.

    Parameters
    ----------
    folder : path
        A checkpoint of a codec, of either stream, or of a language model; its config.json gives
        sizes, layout and atlas.
    facts : mapping
        ``title`` : str.
        ``cohort`` : mapping with ``name``, ``simulated`` (bool), ``num_training_scans`` and
        ``content_hash``.
        ``training`` : mapping with ``command``, ``seconds``, ``seed``, ``versions`` (name to
        version) and ``commit`` (None outside a repository).
        ``scores`` : list of mappings with ``metric``, ``value``, ``unit``, ``part``,
        ``num_subjects`` and ``command``, and optionally ``interval`` ([low, high]) and ``beside``
        (baselines and chance: mappings with ``system``, ``value`` and optionally ``interval``);
        may be empty, and the card then says so.
        ``license`` : str, as the Hub spells it.
        Optional: ``connectome_training`` (as ``training``) and ``connectome_scans`` (str) of a
        second stream in the subfolder ``connectome``, ``data`` (fields of `DataFacts`), ``groups``
        (list of mappings with ``metric``, ``part``, ``smallest`` and ``rows`` of ``by``, ``group``,
        ``num_subjects``, ``value``, ``interval``), ``repository``, ``revision``, ``privacy`` (str).

    Returns
    -------
    pathlib.Path
        The file written; it appears whole or not at all.

    Raises
    ------
    CardError
        A fact is missing, a score is not a finite number, or the folder is no checkpoint of ours.
    """
    folder = Path(folder)
    config = _config(folder)
    scores = [_score(score) for score in facts.get("scores", ())]
    optional: dict[str, Any] = {
        "data": None,
        "groups": [],
        "repository": None,
        "revision": None,
        "privacy": None,
        "connectome_training": None,
        "connectome_scans": None,
    }
    lm = config if config["model_type"] == "avq_lm" else None
    codec, second = config.get("avq_config", config), folder / "connectome"
    connectome = config.get("connectome_config")
    if (second / "config.json").is_file():
        connectome = _config(second)
    try:
        body = render(
            "checkpoint.md.jinja",
            {
                **optional,
                **facts,
                "scores": scores,
                "kind": config["model_type"],
                "codec": codec,
                "tokens": _tokens(codec),
                "connectome": connectome,
                "lm": lm,
                "prompt_parts": _prompt_parts(lm) if lm else [],
                "starts": _starts(lm, codec) if lm else [],
            },
        )
        header = _header(facts, scores)
    except KeyError as error:
        raise CardError(f"{folder}: {_missing(error)}") from error
    except CardError as error:
        raise CardError(f"{folder}: {error}") from error
    return write_whole(folder / "README.md", f"---\n{header}\n---\n\n{body}")


def write_eval_results(folder: Path, facts: Mapping[str, Any], dataset: str) -> Path | None:
    """Write the scores as `.eval_results/cortexicon.yaml`, the form that succeeds `model-index`.

    Parameters
    ----------
    folder : pathlib.Path
    facts : mapping
        As for `write_model_card`.
    dataset : str
        ``OWNER/NAME`` of the cohort on the Hub.

    Returns
    -------
    pathlib.Path or None
        None when nothing was scored.
    """
    scores = [_score(score) for score in facts.get("scores", ())]
    if not scores:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=slug(f"{score['metric']} {score['part']}"),
            value=score["value"],
            notes=f"{score['num_subjects']} people; {score['command']}",
        )
        for score in scores
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    (folder / ".eval_results").mkdir(exist_ok=True)
    return write_whole(folder / ".eval_results" / "cortexicon.yaml", text)


def render(template: str, values: Mapping[str, Any]) -> str:
    """A template of this room, filled in; a value that is missing is an error, never a gap."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; every text comes from our own run files
    )
    environment.globals.update(interval=_interval, version=cortexicon.__version__)
    try:
        return environment.get_template(template).render(dict(values))
    except jinja2.UndefinedError as error:
        raise CardError(_missing(error)) from error


def write_whole(path: Path, text: str) -> Path:
    """Write a text file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def slug(text: str) -> str:
    """Lower-case words joined by underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _missing(error: Exception) -> str:
    return (
        f"expected every fact of the card, found one missing: {error}. "
        "Take the facts from the run's run.json and results.json."
    )


def _interval(bounds: Sequence[float] | None) -> str:
    return f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""


def _config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint of ours."""
    path = folder / "config.json"
    if not path.is_file():
        raise CardError(f"{folder}: expected a checkpoint folder with config.json, found none.")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") not in KINDS:
        raise CardError(
            f"{path}: expected model_type {' or '.join(map(repr, KINDS))}, found "
            f"{config.get('model_type')!r}."
        )
    return config


def _tokens(codec: Mapping[str, Any]) -> int | None:
    """Tokens of one window of the training atlas; None for the other stream."""
    if codec["model_type"] != "avq":
        return None
    patches = codec["window_length"] // codec["patch_length"]
    if codec["token_layout"] == "grid":
        return int(patches * len(codec["region_labels"] or ()))
    return int(patches * codec["num_latents"])


def _prompt_parts(lm: Mapping[str, Any]) -> list[str]:
    """What a prompt holds of a scan, in words."""
    windows = lm["windows_per_prompt"]
    parts = [f"{windows} window{'s' if windows > 1 else ''}"] if windows else []
    return parts + (["the connectivity"] if lm.get("connectome_config") else [])


def _starts(lm: Mapping[str, Any], codec: Mapping[str, Any]) -> list[int]:
    """First samples of as many windows as a prompt holds, one after the other."""
    return [number * codec["window_length"] for number in range(lm["windows_per_prompt"])]


def _score(score: Mapping[str, Any]) -> dict[str, Any]:
    """A score with a plain float, or an error: what was not measured is not on the card."""
    # NOTE: NumPy scalars would become Python objects in the YAML header; float() makes them plain.
    value = float(score["value"])
    if not math.isfinite(value):
        raise CardError(
            f"score {score.get('metric')!r}: expected a finite number, found {value}. "
            "Leave out what could not be measured."
        )
    if not score.get("command"):
        raise CardError(f"score {score.get('metric')!r}: expected the command that measured it.")
    beside = [
        {"interval": None, **other}
        for other in score.get("beside", ())
        if math.isfinite(other["value"])
    ]
    return {"interval": None, **score, "value": value, "beside": beside}


def _header(facts: Mapping[str, Any], scores: list[dict[str, Any]]) -> str:
    """The YAML header that the Hub reads, with the scores as a model index."""
    results = [
        EvalResult(
            task_type="other",
            dataset_type=facts["cohort"]["name"],
            dataset_name=f"{facts['cohort']['name']} ({score['part']})",
            metric_type=score["metric"],
            metric_value=score["value"],
        )
        for score in scores
    ]
    data = ModelCardData(
        license=facts["license"],
        library_name="transformers",
        tags=["fmri", "neuroimaging", "vector-quantization"],
        model_name=facts["title"] if results else None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()
