"""A language model's clinical answers about the scans of a cohort."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cortexicon.cohorts import Cohort, CohortError, ParcelSeries
from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, TokenizationError

from .answers import pooled_answers
from .checkpoints import load_checkpoint
from .errors import InferenceError

SYSTEM = "AVQ + LLM"


class PromptCodes(NamedTuple):
    """Codes of the windows that a scan's prompts hold.

    Attributes
    ----------
    subject_ids : list of str
    codes : int64 array, shape (scans, prompts, windows, tokens)
        Of a model that reads features: what they were before quantisation, float32 (scans,
        prompts, windows, tokens, code_dim).
    skipped : dict of str to str
        Scans that could not be encoded, and why.
    connectivity : int64 array, shape (scans, tokens), or None
        Codes of the connectivity stream, where the model reads it; or float32 (scans, tokens,
        code_dim), as `codes`.
    """

    subject_ids: list[str]
    codes: np.ndarray
    skipped: dict[str, str]
    connectivity: np.ndarray | None = None

    @property
    def flat(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes (prompts of all scans, windows, tokens), and connectivity of each prompt."""
        scans, prompts, *window = self.codes.shape
        codes = self.codes.reshape(scans * prompts, *window)
        if self.connectivity is None:
            return codes, None
        return codes, np.repeat(self.connectivity, self.codes.shape[1], axis=0)


def window_starts(length: int, window: int, prompts: int, windows: int) -> np.ndarray:
    """First samples of `prompts` x `windows` windows spread evenly over a scan; prompts interleave.

    Every scan gives the same number of windows, however long it is, since their number would name
    its site.
    """
    starts = np.linspace(0, length - window, prompts * windows).round().astype(int)
    return starts.reshape(windows, prompts).T


@torch.inference_mode()
def encode_prompts(
    model: AVQLMForConditionalGeneration,
    extractor: AVQFeatureExtractor,
    cohort: Cohort,
    subject_ids: Sequence[str],
    prompts: int,
    windows: int,
    batch_size: int = 32,
    quiet: bool = False,
) -> PromptCodes:
    """Codes of `prompts` x `windows` windows of each scan, and of its connectivity if read.

    Scans that cannot be encoded are listed with the reason. With `windows` 0 there is one prompt a
    scan, of connectivity alone.
    """
    found: list[str] = []
    blocks: list[np.ndarray] = []
    matrices: list[tuple[np.ndarray, np.ndarray]] = []
    skipped: dict[str, str] = {}
    prompts = prompts if windows else 1
    for subject in tqdm(subject_ids, desc="encode", mininterval=2.0, disable=quiet):
        try:
            scan = cohort.series(subject)
            codes = scan_windows(model, extractor, scan, prompts, windows, batch_size)
            if model.connectome is not None:
                matrices.append(scan_matrix(extractor, scan))
        except (CohortError, InferenceError, TokenizationError) as error:
            skipped[subject] = str(error)
            continue
        found.append(subject)
        blocks.append(codes)
    codes = np.stack(blocks) if blocks else np.zeros((0, prompts, windows, 0), dtype=np.int64)
    if model.connectome is None:
        return PromptCodes(found, codes, skipped)
    more = np.zeros((0, model.connectome.config.num_tokens), dtype=np.int64)
    if matrices:
        more = encoded_matrices(model, extractor, matrices, batch_size)
    return PromptCodes(found, codes, skipped, more)


def scan_windows(
    model: AVQLMForConditionalGeneration,
    extractor: AVQFeatureExtractor,
    scan: ParcelSeries,
    prompts: int,
    windows: int,
    batch_size: int = 32,
) -> np.ndarray:
    """Codes int64 (prompts, windows, tokens) of windows spread evenly over one scan.

    Of a model that reads features: float32 (prompts, windows, tokens, code_dim).

    Raises
    ------
    InferenceError
        The scan is shorter than a window.
    TokenizationError
        The feature extractor refuses it.
    """
    where, length = f"{scan.subject_id}: ", extractor.window_length
    if not windows:
        return np.zeros((prompts, 0, 0), dtype=np.int64)
    values, mask = extractor.prepare_scan(
        scan.values, scan.tr, region_labels=scan.labels, atlas=scan.atlas, where=where
    )
    if len(values) < length:
        raise InferenceError(
            f"{where}{len(values) * extractor.sampling_interval:g} s, shorter than one "
            f"window of {length * extractor.sampling_interval:g} s"
        )
    starts = window_starts(len(values), length, prompts, windows).ravel()
    batch = torch.from_numpy(np.stack([values[s : s + length] for s in starts]))
    found = encoded_windows(model, batch, torch.from_numpy(mask), batch_size)
    return found.reshape(prompts, windows, *found.shape[1:])


def encoded_windows(
    model: AVQLMForConditionalGeneration,
    values: torch.Tensor,
    region_mask: torch.Tensor,
    batch_size: int = 32,
) -> np.ndarray:
    """Codes int64 (windows, tokens) of a scan's windows float32 (windows, time, regions).

    Of a model that reads features: what they were before quantisation, float32 (windows, tokens,
    code_dim). `region_mask` is bool (regions,).
    """
    masks = region_mask.to(model.device).expand(len(values), -1)
    features = model.config.fmri_input == "features"
    read = model.get_fmri_latents if features else model.get_fmri_tokens
    parts = [
        read(values[k : k + batch_size].to(model.device), None, masks[k : k + batch_size]).cpu()
        for k in range(0, len(values), batch_size)
    ]
    found = torch.cat(parts).numpy()
    return found if features else found - model.block("fmri")[0]


def connectivity_codes(
    model: AVQLMForConditionalGeneration, extractor: AVQFeatureExtractor, scan: ParcelSeries
) -> np.ndarray:
    """Connectivity codes int64 (tokens,) of one whole scan at its own TR.

    Of a model that reads features: what they were before quantisation, float32 (tokens, code_dim).

    Raises
    ------
    TokenizationError
        Other regions than the extractor's, or too many without a signal.
    """
    return encoded_matrices(model, extractor, [scan_matrix(extractor, scan)])[0]


def scan_matrix(
    extractor: AVQFeatureExtractor, scan: ParcelSeries
) -> tuple[np.ndarray, np.ndarray]:
    """Fisher-z matrix (regions, regions) of a whole scan, and which regions have a signal.

    Raises
    ------
    TokenizationError
        As `connectivity_codes`.
    """
    found: tuple[np.ndarray, np.ndarray] = extractor.connectivity(
        scan.values,
        region_labels=scan.labels,
        atlas=scan.atlas,
        where=f"{scan.subject_id}: ",
    )
    return found


@torch.inference_mode()
def encoded_matrices(
    model: AVQLMForConditionalGeneration,
    extractor: AVQFeatureExtractor,
    matrices: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_size: int = 32,
) -> np.ndarray:
    """Connectivity codes int64 (scans, tokens) of what `scan_matrix` made.

    Of a model that reads features: what they were before quantisation, float32 (scans, tokens,
    code_dim).
    """
    places = torch.tensor(np.asarray(extractor.region_coordinates, dtype=np.float32))[None]
    features = model.config.fmri_input == "features"
    read = model.get_fmri_latents if features else model.get_fmri_tokens
    parts = []
    for first in range(0, len(matrices), batch_size):
        values, masks = (
            np.stack(part) for part in zip(*matrices[first : first + batch_size], strict=True)
        )
        arguments = (torch.from_numpy(values), places, torch.from_numpy(masks))
        parts.append(read(*(part.to(model.device) for part in arguments), stream="fc").cpu())
    found = torch.cat(parts).numpy()
    return found if features else found - model.block("fc")[0]


class LanguageCheckpoint(NamedTuple):
    """A language model of codes and its processor, ready to answer."""

    model: AVQLMForConditionalGeneration
    processor: AVQProcessor


def load_language_model(folder: str | Path) -> LanguageCheckpoint:
    """Load the checkpoint of a language model.

    Raises
    ------
    InferenceError
        As `load_checkpoint`; the folder holds a codec.
    """
    loaded = load_checkpoint(folder)
    if not isinstance(loaded.model, AVQLMForConditionalGeneration):
        raise InferenceError(
            f"{folder} is a codec and answers no questions. "
            "Give the folder that `cortexicon train lm` wrote."
        )
    return LanguageCheckpoint(loaded.model, loaded.processor)


def predict_cohort(
    checkpoint: str | Path,
    cohort: Cohort,
    subject_ids: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    batch_size: int = 32,
    quiet: bool = False,
) -> pd.DataFrame:
    """Answers of an LLM checkpoint about every scan, one row per subject and target.

    Parameters
    ----------
    checkpoint : path
        Folder of an AVQ-LM.
    cohort : Cohort
    subject_ids : list of str, optional
        Default: all.
    targets : list of str, optional
        Names of trained targets. Default: all.

    Returns
    -------
    DataFrame
        Columns subject_id, site, y, y_hat, system, target, score and probability (classes: that of
        the class that sorts last) and free_answer_valid (share of a scan's prompts whose
        unconstrained answer begins a valid one).

    Raises
    ------
    InferenceError
        Not a language model, or a target that it was not trained to answer.
    """
    loaded = load_language_model(checkpoint)
    config = loaded.model.config
    known = {target["name"]: target for target in config.targets or []}
    chosen = list(known) if targets is None else list(targets)
    for name in chosen:
        if name not in known:
            raise InferenceError(
                f"{checkpoint} was not trained to answer {name!r}; "
                f"it knows {', '.join(known) or 'no target'}."
            )
    prompts = encode_prompts(
        loaded.model,
        loaded.processor.feature_extractor,
        cohort,
        cohort.subject_ids if subject_ids is None else subject_ids,
        config.prompts_per_scan,
        config.windows_per_prompt,
        batch_size,
        quiet,
    )
    for reason in prompts.skipped.values():
        print(f"left out: {reason}")
    people = cohort.participants
    tables = []
    for name in chosen:
        target = known[name]
        answers = pooled_answers(loaded.model, loaded.processor, prompts, target, batch_size)
        table = pd.DataFrame({"subject_id": prompts.subject_ids})
        table["site"] = [people["site"].get(subject) for subject in prompts.subject_ids]
        truth = people[name] if name in people else pd.Series(dtype=object)
        table["y"] = [truth.get(subject) for subject in prompts.subject_ids]
        if target["kind"] == "number":
            table["y_hat"], table["score"] = answers.numbers(target), np.nan
            table["probability"] = np.nan
        else:
            classes, shares = np.array(target["classes"]), answers.classes(target)
            table["y_hat"] = classes[shares.argmax(1)]
            table["score"] = shares[:, int(np.argsort(classes)[-1])]
            table["probability"] = table["score"]
        table["free_answer_valid"] = answers.free
        table["system"], table["target"] = SYSTEM, name
        tables.append(table)
    columns = ["subject_id", "site", "y", "y_hat", "system", "target", "score", "probability"]
    columns.append("free_answer_valid")
    return (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )
