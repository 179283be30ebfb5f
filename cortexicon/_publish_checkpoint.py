"""A codec, both codecs of a run, or a language model: staged, checked, with card and results."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from cortexicon import _publish_facts as gather
from cortexicon.inference import Checkpoint, load_checkpoint
from cortexicon.inference.exposure import (
    COSINE,
    SUBJECTS,
    Exposure,
    TrainingLatents,
    find_exposed,
    find_exposed_rows,
)
from cortexicon.model_cards import (
    PublishError,
    check_clean_load,
    check_folder,
    check_licenses,
    stage_checkpoint,
    weights_license,
    without_places,
    without_subjects,
    write_eval_results,
    write_license,
    write_model_card,
)
from cortexicon.model_cards.checks import refuse
from cortexicon.model_cards.stage import CONNECTOME
from cortexicon.modeling import AVQConnectomeModel


def stage(
    source: Path, connectome: Path | None, folder: Path, arguments: argparse.Namespace
) -> str:
    """Write the folder that is pushed; the name of the tag for its weights.

    Parameters
    ----------
    source, connectome : pathlib.Path
        Checkpoint, and the second stream that goes beside it.
    folder : pathlib.Path
        New.
    arguments : argparse.Namespace
        Of `cortexicon publish`.

    Raises
    ------
    PublishError
        A check failed; it says which.
    """
    sources = {"": source} | ({} if connectome is None else {CONNECTOME: connectome})
    runs = {name: gather.read_run(where, arguments.cohort) for name, where in sources.items()}
    run = runs[""]
    if any(one.split.hash != run.split.hash for one in runs.values()):
        raise PublishError(
            f"{connectome}: its split is not that of {source}, so test people of one stream may be "
            "training people of the other. Train both with one split, or publish each by itself."
        )
    data = gather.data_facts(run, arguments.data)
    license_id = arguments.license or weights_license(data.license)
    check_licenses(data.license, license_id)
    loaded = stage_checkpoint(source, folder, connectome)
    privacy = [
        _check_exposure(where, loaded.models[name], runs[name]) for name, where in sources.items()
    ]
    parts = {
        name: gather.card_facts(runs[name], where, loaded.models[name], data)
        for name, where in sources.items()
    }
    facts = parts[""] | {
        "license": license_id,
        "data": data._asdict(),
        "repository": arguments.repository,
        "revision": loaded.revision,
        "privacy": "\n\n".join(privacy),
    }
    if connectome is not None:
        second = parts[CONNECTOME]
        facts |= {
            "title": gather.title_of_both(run, data),
            "scores": facts["scores"] + second["scores"],
            "groups": facts["groups"] + second["groups"],
            "connectome_training": second["training"],
            "connectome_scans": _scans_in_words(runs[CONNECTOME].values),
        }
    facts = without_places(facts)
    write_model_card(folder, facts)
    dataset = f"{arguments.repository.partition('/')[0]}/{run.name}"
    write_eval_results(folder, facts, dataset)
    write_license(folder, license_id, data)
    for name, one in runs.items():
        results = {"scores": parts[name]["scores"], "groups": parts[name]["groups"]}
        results |= one.results if not name else {}
        for file, values in (("results.json", results), ("run.json", one.values)):
            cleaned = without_places(without_subjects(values, one.cohort.subject_ids))
            text = json.dumps(cleaned, indent=1)
            (folder / name / file).write_text(text + "\n", encoding="utf-8")
    refuse(source, check_folder(folder, gather.names_of(run.cohort)))
    for name, model in loaded.models.items():
        check_clean_load(folder, model, name)
    return loaded.revision


def _scans_in_words(values: Mapping[str, Any]) -> str:
    """How many scans the connectivity stream was fitted on."""
    more = values.get("more_matrices")
    also = f", and {more} more matrices for the covariance alone" if more else ""
    return f"{values['training_scans']}{also}"


class Stream(NamedTuple):
    """One stream of a checkpoint beside what its codebook was fitted on.

    Attributes
    ----------
    codec : AVQModel or AVQConnectomeModel
    latents : TrainingLatents
    values : dict
        run.json of the run that fitted it.
    """

    codec: Any
    latents: TrainingLatents
    values: dict[str, Any]


def streams_of(checkpoint: Checkpoint, run: gather.RunFacts) -> dict[str, Stream]:
    """Streams of a codec or language model by the names of its modules: "avq", "connectome"."""
    latents = gather.latents_of(run, checkpoint=checkpoint)
    found = {"avq": Stream(checkpoint.codec, latents, run.values)}
    connectome = getattr(checkpoint.model, "connectome", None)
    if connectome is not None:
        # The stream inside was fitted by a run of its own, on people that this one may not name.
        own = gather.read_run(Path(run.values["arguments"]["connectome"]), run.cohort.path)
        latents = gather.latents_of(own, connectome=connectome)
        found["connectome"] = Stream(connectome, latents, own.values)
    return found


def _check_exposure(source: Path, model: PreTrainedModel, run: gather.RunFacts) -> str:
    """What the card says of the codes' privacy, one line a codebook.

    Raises
    ------
    PublishError
        A code, or a language model's row of one, is one person's.
    """
    if isinstance(model, AVQConnectomeModel):
        latents = gather.latents_of(run, connectome=model)
        return checked(source, find_exposed(model.quantizer, latents), run.values, "connectome")
    checkpoint = load_checkpoint(source)
    streams = streams_of(checkpoint, run)
    if checkpoint.model_type == "avq_lm":
        check_rows(source, checkpoint, checkpoint.model.get_input_embeddings().weight, streams)
    return "\n\n".join(
        checked(source, find_exposed(one.codec.quantizer, one.latents), one.values, name)
        for name, one in streams.items()
    )


def check_rows(
    source: Path, checkpoint: Checkpoint, table: torch.Tensor, streams: Mapping[str, Stream]
) -> bool:
    """Compare rows of codes with latents, where training has moved them from P(codebook).

    Parameters
    ----------
    source : pathlib.Path
        For messages.
    checkpoint : Checkpoint
        Language model whose codecs the rows are of.
    table : float, (vocabulary, text_width)
    streams : mapping
        Of `streams_of`.

    Returns
    -------
    bool
        Whether any rows had moved.

    Raises
    ------
    PublishError
        A row is, in effect, one person's.
    """
    config, moved = checkpoint.model.config, False
    offsets = {"avq": config.fmri_offset, "connectome": config.connectivity_offset}
    for name, stream in streams.items():
        codec = stream.codec
        rows = table.detach()[offsets[name] :][: codec.config.num_codes]
        if not torch.equal(rows, codec.project_codebook()):
            moved = True
            advice = "Train without rows of codes (train_code_rows, trainable_token_indices)."
            checked(source, find_exposed_rows(codec, rows, stream.latents), {}, name, advice)
    return moved


_BOOKS = {"avq": "windows", "connectome": "connectivity"}
_PROTECT = "Run `cortexicon protect` on the codec, score it, and publish again."


def checked(
    source: Path, found: Exposure, values: Mapping[str, Any], stream: str, advice: str = _PROTECT
) -> str:
    """The sentence for the card, or a refusal; `stream` is "avq" or "connectome"."""
    if found.exposed:
        raise PublishError(
            f"{source}: {len(found.exposed)} of {found.num_codes} codes (such as "
            f"{found.exposed[0]}) lie within cosine {COSINE} of one training latent, and fewer "
            f"than {SUBJECTS} people map to them: they are, in effect, one person's. {advice}"
        )
    protected = int(values.get("protected_codes", 0))
    return (
        f"Privacy of the codebook of {_BOOKS[stream]}: no code lies within cosine {COSINE} of a "
        f"single training latent unless {SUBJECTS} or more people map to it ({found.num_codes} "
        f"codes against {found.num_latents} latents of {found.num_subjects} people; highest cosine "
        f"{found.highest_cosine:.4f}"
        + (f"; {protected} codes were moved to means of several people" if protected else "")
        + ")."
    )
