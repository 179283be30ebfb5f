"""What `train lm` does once before its steps: codes of windows, an earlier stage, the summary."""

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cortexicon.inference.predict import encoded_windows
from cortexicon.modeling import AVQLMForConditionalGeneration

from .arguments import TrainingError
from .scan_patterns import PatternFit, fit_patterns, summary_columns


@dataclass
class EncodedWindows:
    """Codes of all training windows int64 (windows, tokens), and the windows of each scan."""

    codes: np.ndarray
    of_scan: list[np.ndarray]


@torch.inference_mode()
def encode_windows(model, scans, stride: int, quiet: bool) -> EncodedWindows:
    """Encode the windows that start every `stride` samples of every scan."""
    length = model.avq.config.window_length
    codes, of_scan = [], []
    count = 0
    for scan in tqdm(range(len(scans)), "encode training windows", mininterval=2.0, disable=quiet):
        series = scans.series[scan]
        starts = range(0, len(series) - length + 1, stride)
        windows = torch.from_numpy(np.stack([series[s : s + length] for s in starts]))
        mask = torch.from_numpy(scans.region_masks[scan])
        codes.append(encoded_windows(model, windows, mask, len(windows)))
        of_scan.append(np.arange(count, count + len(windows)))
        count += len(windows)
    return EncodedWindows(np.concatenate(codes), of_scan)


def take_language_model(model: AVQLMForConditionalGeneration, folder: str) -> None:
    """Start at the language model of an earlier stage, of the same codecs.

    Raises
    ------
    TrainingError
        No checkpoint of a language model, or one over another vocabulary of codes.
    """
    if not (Path(folder) / "model.safetensors").is_file():
        raise TrainingError(f"start: {folder} holds no trained language model.")
    earlier = AVQLMForConditionalGeneration.from_pretrained(folder)
    for stream in ("fmri", "fc") if model.connectome is not None else ("fmri",):
        codec, other = (m.connectome if stream == "fc" else m.avq for m in (model, earlier))
        if other is None or codec.codebook_fingerprint() != other.codebook_fingerprint():
            raise TrainingError(
                f"start: {folder} speaks the codes of another {stream!r} codec. Name the run that "
                "was trained with the same `avq` and `connectome`."
            )
    model.language_model.load_state_dict(earlier.language_model.state_dict())


def start_summary(
    model: AVQLMForConditionalGeneration, subject_ids, matrices, validation, people, targets, seed
) -> tuple[PatternFit, PatternFit]:
    """Fit the summary's patterns to training people, and say how large they stand in the prompt.

    Parameters
    ----------
    subject_ids, matrices : training people, and codes (tokens,) of each or what they were before
    validation : PromptCodes
    people : DataFrame
    targets : list of dict
    seed : int
        Of the map from scores to embeddings.

    Returns
    -------
    training, everyone : PatternFit
        Of training people, which the summary now holds, and of validation people too.
    """
    found = []
    for names, scans in (
        (list(subject_ids), list(matrices)),
        ([*subject_ids, *validation.subject_ids], [*matrices, *validation.connectivity]),
    ):
        found.append(fit_patterns(model, scans, summary_columns(people.loc[names], targets)))
    rows = model.get_input_embeddings().weight.detach()[: model.config.bof_token_id]
    model.summary.start(float(rows.square().mean().sqrt()), seed)
    model.summary.take(*found[0][:3])
    return found[0], found[1]


@contextmanager
def patterns_of_all(
    model: AVQLMForConditionalGeneration, training: PatternFit | None, everyone: PatternFit | None
):
    """Inside, the summary holds the patterns of training and validation people together.

    Validation people chose readouts by patterns that had not seen them; what is kept may.
    """
    if training is None or everyone is None:
        yield
        return
    model.summary.take(*everyone[:3])
    try:
        yield
    finally:
        model.summary.take(*training[:3])
