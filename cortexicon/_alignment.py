"""`cortexicon alignment`: a codec, its text model and a split in; the table of probes out.

The codec is one of windows or one of connectivity.
"""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
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
from cortexicon.inference import (
    cohort_matrices,
    encode_cohort,
    encode_matrices,
    fit_to_atlas,
    load_checkpoint,
    load_connectome,
)
from cortexicon.inference.connectome import check_atlas, is_connectome
from cortexicon.modeling import AVQConnectomeModel, AVQModel
from cortexicon.modeling.alignment_avq import tensor_sha256

#: subjects -> codes of their scans, int64
Encoder = Callable[[list[str]], np.ndarray]


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
        Windows or matrices per forward pass.
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
        codec, encode = _codec(folder, cohort, batch_size)
        known = codec.config.text_table_sha256
        if known != tensor_sha256(table):
            raise EvaluationError(
                f"{folder} was aligned with the embedding table of "
                f"{codec.config.text_model_id!r} (sha256 {str(known)[:12]}), found "
                f"another one in {text_model} (sha256 {tensor_sha256(table)[:12]}). Give the "
                "language model that it was trained with."
            )
        codecs[name] = _codec_rows(codec, encode, parts, table, counts)
        fingerprints[name] = codec.codebook_fingerprint()
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


def _codec(
    folder: Path, cohort: Cohort, batch_size: int
) -> tuple[AVQModel | AVQConnectomeModel, Encoder]:
    """A checkpoint of either stream, and how it encodes scans of the cohort."""
    if is_connectome(folder):
        model = load_connectome(folder)
        check_atlas(model, cohort, folder)

        def encode(subjects: list[str]) -> np.ndarray:
            scans = cohort_matrices(cohort, subjects)
            return encode_matrices(model, scans, cohort.coordinates, batch_size=batch_size)

        return model, encode
    checkpoint = fit_to_atlas(load_checkpoint(folder), cohort)
    extractor = checkpoint.processor.feature_extractor

    def encode_windows(subjects: list[str]) -> np.ndarray:
        scans = encode_cohort(checkpoint.codec, extractor, cohort, subjects, batch_size)
        return np.concatenate([scan.codes.ravel() for scan in scans])

    return checkpoint.codec, encode_windows


def _codec_rows(
    codec: AVQModel | AVQConnectomeModel,
    encode: Encoder,
    parts: Mapping[str, Sequence[str]],
    table: torch.Tensor,
    text_counts: torch.Tensor,
) -> CodecRows:
    """What the table needs of one checkpoint."""
    size = codec.config.num_codes
    counted = [
        np.bincount(encode(list(parts[part])).ravel(), minlength=size)
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
