"""A language model's clinical answers about the scans of a cohort."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cortexicon.cohorts import Cohort, CohortError, ParcelSeries
from cortexicon.modeling import AVQLMForConditionalGeneration, AVQModel
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor, TokenizationError

from .checkpoints import load_checkpoint
from .errors import InferenceError

SYSTEM = "AVQ + LLM"


class PromptCodes(NamedTuple):
    """Codes of the windows that a scan's prompts hold.

    Attributes
    ----------
    subject_ids : list of str
    codes : int64 array, shape (scans, prompts, windows, tokens)
    skipped : dict of str to str
        Scans that could not be encoded, and why.
    connectivity : int64 array, shape (scans, tokens), or None
        Codes of the connectivity stream, where the model reads it.
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


def answers_of(target: dict[str, Any]) -> list[str]:
    """All valid answers of a target of `AVQLMConfig.targets`: its whole numbers, or its classes."""
    if target["kind"] == "number":
        return [str(value) for value in range(target["minimum"], target["maximum"] + 1)]
    return list(target["classes"])


def prompt_rows(
    processor: AVQProcessor,
    codes: np.ndarray,
    connectivity: np.ndarray | None,
    question: str,
) -> list[list[int]]:
    """Ids of one prompt per row of codes (prompts, windows, tokens), all of one length."""
    rows = []
    for row, windows in enumerate(codes):
        more = None if connectivity is None else connectivity[row]
        rows.append(processor.prompt_ids(windows if len(windows) else None, question, more))
    return rows


@torch.inference_mode()
def answer_probabilities(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    codes: np.ndarray,
    target: dict[str, Any],
    batch_size: int = 32,
    connectivity: np.ndarray | None = None,
    question: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Probability of every valid answer, under a grammar that allows no other.

    At each token of an answer the probabilities are shared among the tokens that continue some
    valid answer, so any tokenizer will do, whether it writes 42 as one token or as two.

    Parameters
    ----------
    codes : int64 array, shape (prompts, windows, tokens)
        With 0 windows the prompts hold connectivity alone.
    target : dict
        One of `AVQLMConfig.targets`.
    connectivity : int64 array, shape (prompts, tokens), optional
        Codes of the connectivity stream.
    question : str, optional
        In place of the target's own.

    Returns
    -------
    probabilities : float64 array, shape (prompts, answers)
        In the order of `answers_of`.
    free : bool array, shape (prompts,)
        Whether the likeliest first token of all the vocabulary begins a valid answer.
    """
    answers = [tuple(processor.answer_ids(answer)) for answer in answers_of(target)]
    prompts = prompt_rows(processor, codes, connectivity, question or target["question"])
    probabilities = np.ones((len(prompts), len(answers)))
    free = np.zeros(len(prompts), dtype=bool)
    prefixes = sorted(
        {answer[:length] for answer in answers for length in range(len(answer))}, key=len
    )
    for prefix in prefixes:
        inside = [index for index, answer in enumerate(answers) if answer[: len(prefix)] == prefix]
        following = sorted(
            {answers[index][len(prefix)] for index in inside if len(answers[index]) > len(prefix)}
        )
        if len(following) == 1:
            continue  # nothing to choose
        column = {token: place for place, token in enumerate(following)}
        for first in range(0, len(prompts), batch_size):
            rows = [prompt + list(prefix) for prompt in prompts[first : first + batch_size]]
            ids = torch.tensor(rows, device=model.device)
            logits = model(input_ids=ids, logits_to_keep=1).logits[:, -1].float()
            share = torch.softmax(logits[:, following], dim=-1).double().cpu().numpy()
            for index in inside:
                probabilities[first : first + len(rows), index] *= share[
                    :, column[answers[index][len(prefix)]]
                ]
            if not prefix:
                best = logits.argmax(-1).cpu().numpy()
                free[first : first + len(rows)] = np.isin(best, following)
    return probabilities, free


def read_numbers(probabilities: np.ndarray, target: dict[str, Any]) -> np.ndarray:
    """Numbers from answer probabilities (..., answers) by the target's readout.

    The readout is `expectation` or `mode`.
    """
    values = np.arange(target["minimum"], target["maximum"] + 1, dtype=float)
    if target.get("readout", "expectation") == "mode":
        return values[probabilities.argmax(-1)]
    return probabilities @ values


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
    matrices: list[np.ndarray] = []
    skipped: dict[str, str] = {}
    prompts = prompts if windows else 1
    for subject in tqdm(subject_ids, desc="encode", mininterval=2.0, disable=quiet):
        try:
            scan = cohort.series(subject)
            codes = scan_windows(model.avq, extractor, scan, prompts, windows, batch_size)
            if model.connectome is not None:
                matrices.append(connectivity_codes(model, extractor, scan))
        except (CohortError, InferenceError, TokenizationError) as error:
            skipped[subject] = str(error)
            continue
        found.append(subject)
        blocks.append(codes)
    codes = np.stack(blocks) if blocks else np.zeros((0, prompts, windows, 0), dtype=np.int64)
    if model.connectome is None:
        return PromptCodes(found, codes, skipped)
    empty = np.zeros((0, model.connectome.config.num_tokens), dtype=np.int64)
    return PromptCodes(found, codes, skipped, np.stack(matrices) if found else empty)


def scan_windows(
    codec: AVQModel,
    extractor: AVQFeatureExtractor,
    scan: ParcelSeries,
    prompts: int,
    windows: int,
    batch_size: int = 32,
) -> np.ndarray:
    """Codes int64 (prompts, windows, tokens) of windows spread evenly over one scan.

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
    batch = torch.from_numpy(np.stack([values[s : s + length] for s in starts])).to(codec.device)
    masks = torch.from_numpy(mask).to(codec.device).expand(len(batch), -1)
    parts = [
        codec.encode(rows, region_mask=present, codes_only=True).codes
        for rows, present in zip(batch.split(batch_size), masks.split(batch_size), strict=True)
    ]
    return torch.cat(parts).cpu().numpy().reshape(prompts, windows, -1)


def connectivity_codes(
    model: AVQLMForConditionalGeneration, extractor: AVQFeatureExtractor, scan: ParcelSeries
) -> np.ndarray:
    """Connectivity codes int64 (tokens,) of one whole scan at its own TR.

    Raises
    ------
    TokenizationError
        Other regions than the extractor's, or too many without a signal.
    """
    matrix, mask = extractor.connectivity(
        scan.values,
        region_labels=scan.labels,
        atlas=scan.atlas,
        where=f"{scan.subject_id}: ",
    )
    places = torch.tensor(np.asarray(extractor.region_coordinates, dtype=np.float32))
    ids = model.get_fmri_tokens(
        torch.from_numpy(matrix)[None].to(model.device),
        places[None].to(model.device),
        torch.from_numpy(mask)[None].to(model.device),
        stream="fc",
    )
    return (ids - model.block("fc")[0])[0].cpu().numpy()


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
        Columns subject_id, site, y, y_hat, system, target, score (classes: probability of the class
        that sorts last) and free_answer_valid (share of a scan's prompts whose unconstrained answer
        begins a valid one).

    Raises
    ------
    InferenceError
        Not a language model, or a target that it was not trained to answer.
    """
    loaded = load_checkpoint(checkpoint)
    if not isinstance(loaded.model, AVQLMForConditionalGeneration):
        raise InferenceError(
            f"{checkpoint} is a codec and answers no questions. "
            "Give the folder that `cortexicon train lm` wrote."
        )
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
        flat, connectivity = prompts.flat
        probabilities, free = answer_probabilities(
            loaded.model, loaded.processor, flat, target, batch_size, connectivity
        )
        answers = probabilities.shape[1]
        probabilities = probabilities.reshape(*prompts.codes.shape[:2], answers)
        # NOTE: prompts of one scan are pooled as probabilities, so `mode` is the mode of the pooled
        # answer.
        pooled = probabilities.mean(1)
        table = pd.DataFrame({"subject_id": prompts.subject_ids})
        table["site"] = [people["site"].get(subject) for subject in prompts.subject_ids]
        truth = people[name] if name in people else pd.Series(dtype=object)
        table["y"] = [truth.get(subject) for subject in prompts.subject_ids]
        if target["kind"] == "number":
            table["y_hat"], table["score"] = read_numbers(pooled, target), np.nan
        else:
            classes = np.array(target["classes"])
            table["y_hat"] = classes[pooled.argmax(1)]
            table["score"] = pooled[:, int(np.argsort(classes)[-1])]
        table["free_answer_valid"] = free.reshape(len(table), -1).mean(1)
        table["system"], table["target"] = SYSTEM, name
        tables.append(table)
    columns = ["subject_id", "site", "y", "y_hat", "system", "target", "score", "free_answer_valid"]
    return (
        pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)
    )
