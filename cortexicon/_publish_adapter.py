"""A PEFT adapter: staged and checked, for the rows of codes that it may hold too."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from cortexicon import _publish_facts as gather
from cortexicon.inference import load_checkpoint
from cortexicon.model_cards import PublishError, check_licenses, stage_adapter, weights_license
from cortexicon.model_cards.checks import (
    card_complaints,
    refuse,
    secret_complaints,
    subject_id_complaints,
)
from cortexicon.model_cards.facts import read_data_facts

from ._publish_checkpoint import check_rows, streams_of

_CODEC = re.compile(r"(?:^|\.)(?:avq|connectome)\.")
_TABLE = re.compile(r"lora_embedding_|trainable_tokens|(?:wte|embed_tokens|embed_in|lm_head)\.")
_NO_ROWS = (
    "Privacy of the codebook: the adapter holds nothing of a codec and no row of a code; the codes "
    "are those of the base checkpoint, which were compared with its training latents when it was "
    "published."
)


def stage(source: Path, folder: Path, arguments: argparse.Namespace) -> str:
    """Write the folder that is pushed; the name of the tag for its weights.

    Raises
    ------
    PublishError
        A check failed; it says which.
    """
    base, _, revision = (arguments.base or "").partition("@")
    if not revision or arguments.data is None:
        raise PublishError(
            f"{source}: an adapter needs --base OWNER/NAME@REVISION, the checkpoint that it "
            "changes, and --data, the facts of the data that it was fitted on."
        )
    if not (source / "adapter_model.safetensors").is_file():
        raise PublishError(
            f"{source}: expected an adapter with adapter_model.safetensors, found none."
        )
    data = read_data_facts(arguments.data)
    license_id = arguments.license or weights_license(data.license)
    check_licenses(data.license, license_id)
    facts = {
        "title": arguments.repository.partition("/")[2],
        "license": license_id,
        "data": data._asdict(),
        "repository": arguments.repository,
        "revision": revision,
        "privacy": privacy_of(source, arguments.cohort),
    }
    tag = stage_adapter(source, folder, base, facts)
    ids = () if arguments.cohort is None else gather.names_of(gather.load(arguments.cohort))
    refuse(
        source,
        [
            *subject_id_complaints(folder, ids),
            *secret_complaints(folder),
            *card_complaints(folder),
        ],
    )
    return tag


def privacy_of(source: Path, cohort: Path | None) -> str:
    """What the card says of the codes, after a comparison where the adapter holds rows of them."""
    tensors = load_file(source / "adapter_model.safetensors")
    inside = [name for name in tensors if _CODEC.search(name)]
    if inside:
        raise PublishError(
            f"{source}: expected an adapter of the language model, found {inside[0]}, which "
            "changes the codec: codes would mean something else than those of the base. Publish "
            "the whole checkpoint instead."
        )
    tables = {name: values for name, values in tensors.items() if _TABLE.search(name)}
    if not tables:
        return _NO_ROWS
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    folder = Path(config.get("base_model_name_or_path") or "")
    if not (folder / "run.json").is_file():
        raise PublishError(
            f"{source}: it trains rows of the vocabulary ({next(iter(tables))}), and rows of codes "
            "must be compared with training latents first. Expected in base_model_name_or_path of "
            f"adapter_config.json the folder of the base with its run.json, found {str(folder)!r}."
        )
    checkpoint = load_checkpoint(folder)
    streams = streams_of(checkpoint, gather.read_run(folder, cohort))
    moved = False
    for name, values in tables.items():
        table = _table_with(checkpoint.model.get_input_embeddings().weight, name, values, config)
        moved |= check_rows(source, checkpoint, table, streams)
    if not moved:
        return _NO_ROWS
    return (
        "Privacy of the codebook: the adapter's rows of codes were compared with the training "
        "latents of the base checkpoint, carried into text space; none is one person's."
    )


def _table_with(table: Any, name: str, values: Any, config: dict[str, Any]) -> Any:
    """The base's table of embeddings with what one tensor of the adapter puts there."""
    if "trainable_tokens" in name:
        indices = config["trainable_token_indices"]
        if isinstance(indices, dict):
            indices = next(rows for path, rows in indices.items() if path in name)
        changed = table.detach().clone()
        changed[indices] = values.to(changed)
        return changed
    if values.shape != table.shape:
        raise PublishError(
            f"{name}: expected rows of the vocabulary, {tuple(table.shape)}, found "
            f"{tuple(values.shape)}, which nobody can compare with training latents. Train rows by "
            "`trainable_token_indices` (AVQLMForConditionalGeneration.lora_arguments), or merge "
            "the adapter and publish the whole checkpoint."
        )
    return values
