"""`cortexicon alignment`: a codec, its text model and a split in; the table of probes out."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cortexicon.cohorts import Cohort
from cortexicon.evaluation import EvaluationError, write_json
from cortexicon.evaluation.alignment import (
    CodecRows,
    alignment_table,
    classifier_accuracy,
    render_alignment,
    table_text,
)
from cortexicon.inference import Checkpoint, encode_cohort, fit_to_atlas, load_checkpoint
from cortexicon.modeling.alignment_avq import tensor_sha256


def evaluate_alignment(
    checkpoints: Mapping[str, Path],
    text_model: str,
    cohort: Cohort,
    parts: Mapping[str, Sequence[str]],
    json_path: Path,
    batch_size: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """Probe checkpoints against the rows they are read against; write and return the table.

    Parameters
    ----------
    checkpoints : dict of str to pathlib.Path
        ``codes``, and where there are such ``adversary_off`` and ``not_reversed``.
    text_model : str
        Folder or Hub id of the language model that all of them were trained with.
    cohort : Cohort
    parts : dict of str to list of str
        One fold of its split. Codes are counted in its training part; the training classifier is
        judged on its validation part.
    json_path : pathlib.Path
        Receives the table; the figure goes beside it (.png).
    batch_size : int
        Windows per forward pass.
    seed : int

    Raises
    ------
    EvaluationError
        A text model without counts of its tokens, or one that a checkpoint was not trained with.
    """
    table, counts = read_text_side(text_model, checkpoints["codes"])
    codecs: dict[str, CodecRows] = {}
    fingerprints: dict[str, str] = {}
    for name, folder in checkpoints.items():
        checkpoint = fit_to_atlas(load_checkpoint(folder), cohort)
        known = checkpoint.codec.config.text_table_sha256
        if known != tensor_sha256(table):
            raise EvaluationError(
                f"{folder} was aligned with the embedding table of "
                f"{checkpoint.codec.config.text_model_id!r} (sha256 {str(known)[:12]}), found "
                f"another one in {text_model} (sha256 {tensor_sha256(table)[:12]}). Give the "
                "language model that it was trained with."
            )
        codecs[name] = _codec_rows(checkpoint, cohort, parts, table, counts, batch_size)
        fingerprints[name] = checkpoint.codec.codebook_fingerprint()
    result = alignment_table(codecs, table, counts, seed=seed)
    result |= {
        "checkpoints": {name: str(folder) for name, folder in checkpoints.items()},
        "codebook_fingerprints": fingerprints,
        "text_model": text_model,
        "text_table_sha256": tensor_sha256(table),
        "cohort_hash": cohort.content_hash,
        "command": shlex.join(["cortexicon", *sys.argv[1:]]),
        "seed": seed,
    }
    write_json(json_path, result)
    render_alignment(codecs, table, counts, result, json_path.with_suffix(".png"))
    print(table_text(result))
    return result


def read_text_side(text_model: str, checkpoint: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding table float32 (types, width) of a text model, and how often each type occurs.

    The counts stand beside the model, or, after `cortexicon align`, beside the checkpoint.

    Raises
    ------
    EvaluationError
        Neither folder has them.
    """
    paths = [folder / "token_counts.safetensors" for folder in (Path(text_model), checkpoint)]
    found = [path for path in paths if path.is_file()]
    if not found:
        raise EvaluationError(
            f"{text_model}: expected token_counts.safetensors beside the language model, or beside "
            f"the checkpoint {checkpoint}, found neither. `cortexicon train text` writes it, and "
            "`cortexicon align` for a model from elsewhere."
        )
    model = AutoModelForCausalLM.from_pretrained(text_model, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach(), load_file(found[0])["counts"]


def _codec_rows(
    checkpoint: Checkpoint,
    cohort: Cohort,
    parts: Mapping[str, Sequence[str]],
    table: torch.Tensor,
    text_counts: torch.Tensor,
    batch_size: int,
) -> CodecRows:
    """What the table needs of one checkpoint."""
    codec = checkpoint.codec
    counted = [
        _count_codes(checkpoint, cohort, list(parts[part]), batch_size)
        for part in ("train", "validation")
    ]
    accuracy = None
    with torch.inference_mode():
        projected = codec.project_codebook().float().cpu()
        if codec.config.domain_weight > 0:
            accuracy = classifier_accuracy(
                codec.classify(projected),
                counted[1],
                codec.classify(table),
                text_counts,
            )
    return CodecRows(codec.quantizer.codebook.clone(), projected.clone(), counted[0], accuracy)


def _count_codes(
    checkpoint: Checkpoint, cohort: Cohort, subjects: list[str], batch_size: int
) -> np.ndarray:
    """Occurrences int64 (codes,) in the scans of `subjects`."""
    counts = np.zeros(checkpoint.codec.config.num_codes, dtype=np.int64)
    extractor = checkpoint.processor.feature_extractor
    for scan in encode_cohort(checkpoint.codec, extractor, cohort, subjects, batch_size):
        counts += np.bincount(scan.codes.ravel(), minlength=len(counts))
    return counts
