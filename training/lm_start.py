"""What `train lm` does once before its steps: codes of windows, an earlier stage, the summary."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cortexicon.inference.predict import encoded_windows
from cortexicon.modeling import AVQLMForConditionalGeneration

from .arguments import TrainingError


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


@torch.no_grad()
def start_summary(model: AVQLMForConditionalGeneration, matrices) -> None:
    """Tell the summary what training scans hold: codes (tokens,), or what they were before."""
    table = model.connectome.quantizer.codebook
    vectors = torch.from_numpy(np.stack(matrices)).to(table.device)
    if not vectors.dtype.is_floating_point:
        vectors = table[vectors]
    rows = model.get_input_embeddings().weight[: model.config.bof_token_id]
    model.summary.start(vectors, float(rows.square().mean().sqrt()))
