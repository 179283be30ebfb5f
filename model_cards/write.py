"""Fills a checkpoint's README.md from what a run measured, and from nothing else."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

_TEMPLATE = "checkpoint.md.jinja"


class CardError(ValueError):
    """Facts that cannot be put on a card; the text names the fact."""


def write_model_card(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write README.md into a checkpoint folder.

    Parameters
    ----------
    folder : path
        An AVQ or AVQ-LM checkpoint; its config.json gives sizes, layout and atlas.
    facts : mapping
        ``title`` : str.
        ``cohort`` : mapping with ``name``, ``simulated`` (bool), ``num_training_scans`` and
        ``content_hash``.
        ``training`` : mapping with ``command``, ``seconds``, ``seed``, ``versions`` (name to
        version) and ``commit`` (None outside a repository).
        ``scores`` : list of mappings with ``metric``, ``value``, ``unit``, ``part``,
        ``num_subjects`` and ``command``; may be empty, and the card then says so.
        ``license`` : str, as the Hub spells it.

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
    codec = config["avq_config"] if config["model_type"] == "avq_lm" else config
    scores = [_score(score) for score in facts.get("scores", ())]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; every text comes from our own run files
    )
    try:
        body = environment.get_template(_TEMPLATE).render(
            {
                **facts,
                "scores": scores,
                "codec": codec,
                "lm": config if codec is not config else None,
            }
        )
        header = _header(facts, scores)
    except (jinja2.UndefinedError, KeyError) as error:
        raise CardError(
            f"{folder}: expected every fact of the model card, found one missing: {error}. "
            "Take the facts from the run's run.json and results.json."
        ) from error
    path = folder / "README.md"
    temporary = folder / f".README.md.{os.getpid()}.tmp"
    temporary.write_text(f"---\n{header}\n---\n\n{body}", encoding="utf-8")
    os.replace(temporary, path)
    return path


def _config(folder: Path) -> dict[str, Any]:
    """config.json of an AVQ or AVQ-LM checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        raise CardError(f"{folder}: expected a checkpoint folder with config.json, found none.")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if config.get("model_type") not in ("avq", "avq_lm"):
        raise CardError(
            f"{path}: expected model_type 'avq' or 'avq_lm', found {config.get('model_type')!r}."
        )
    return config


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
    return {**score, "value": value}


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
