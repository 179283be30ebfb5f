"""Text in, scan out: a language model writes codes, the codec makes region series of them."""

from typing import Any, NamedTuple

import numpy as np
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQProcessor

from .errors import InferenceError

#: z-scored series do not go beyond this; what a decoder says beyond it is cut off.
LARGEST_SD = 8.0


class WrittenScan(NamedTuple):
    """A scan that nobody had.

    Attributes
    ----------
    values : float32 array, shape (time, regions)
        z-score units, `tr` seconds apart.
    codes : int64 array, shape (windows, tokens)
    tr : float
    """

    values: np.ndarray
    codes: np.ndarray
    tr: float


def write_scan(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    prompt: str,
    coordinates: np.ndarray | None = None,
    windows: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> WrittenScan:
    """Let the model write the codes of a scan after a text, and decode them.

    Parameters
    ----------
    model : AVQLMForConditionalGeneration
    processor : AVQProcessor
    prompt : str
        Such as a description of the scan. It enters as plain text, whatever it holds.
    coordinates : float array, shape (regions, 3), mm MNI, optional
        Regions to decode into: any atlas. Default: the checkpoint's own.
    windows : int
        Windows to write, one after the other.
    temperature : float
        0: the likeliest code each time.
    seed : int
        The same seed gives the same scan.

    Raises
    ------
    InferenceError
        An empty prompt, no window, more windows than the language model has positions for, or a
        temperature below 0.
    """
    if not prompt.strip():
        raise InferenceError("expected a text to write a scan after, found an empty one.")
    if temperature < 0:
        raise InferenceError(f"expected a temperature of at least 0, found {temperature:g}.")
    config, tokenizer = model.config, processor.tokenizer
    tokens = config.avq_config.tokens_per_window
    ids = tokenizer.encode(prompt, add_special_tokens=False, split_special_tokens=True)
    needed = len(ids) + windows * (tokens + 1) + 1
    available = getattr(config.text_config, "max_position_embeddings", needed)
    if not windows >= 1 or needed > available:
        most = (available - len(ids) - 1) // (tokens + 1)
        raise InferenceError(
            f"expected 1 to {max(0, most)} windows after this text (the language model has "
            f"{available} positions, a window takes {tokens + 1}), found {windows}."
        )
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    first, _ = model.block("fmri")
    written = []
    row = [*ids, config.bof_token_id]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(windows):
            codes = model.generate_codes(torch.tensor([row], device=model.device), **options)
            written.append(codes[0].cpu().numpy())
            row += [*(codes[0] + first).tolist(), config.sep_token_id]
    codes = np.stack(written)
    places = None
    if coordinates is not None:
        places = torch.tensor(np.asarray(coordinates, dtype=np.float32))[None].to(model.device)
    with torch.inference_mode():
        series = model.decode_fmri_tokens(torch.from_numpy(codes).to(model.device) + first, places)
    values = series.flatten(0, 1).clamp(-LARGEST_SD, LARGEST_SD).cpu().numpy()
    return WrittenScan(values, codes, float(config.avq_config.sampling_interval))
