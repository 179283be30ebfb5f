"""What `train lm` does once: codes of windows, an earlier stage, the summary, adapters, leaks."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from cortexicon.inference.answers import prompt_rows
from cortexicon.inference.predict import encoded_windows
from cortexicon.modeling import AVQLMForConditionalGeneration

from .arguments import TrainingError
from .leaks import refuse_leaks
from .scan_patterns import (
    PatternFit,
    connections_of_values,
    fit_patterns,
    summary_columns,
)

if TYPE_CHECKING:
    from peft import PeftModel

#: People whose prompts are searched for leaks before training starts.
PEOPLE_SEARCHED = 200


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

    Raises
    ------
    TrainingError
        A class that only validation people have.
    """
    both = [*subject_ids, *validation.subject_ids]
    columns = [summary_columns(people.loc[names], targets) for names in (list(subject_ids), both)]
    names, others = ([name for name, _ in found] for found in columns)
    if names != others:
        raise TrainingError(
            f"summary_patterns: training people have {', '.join(names)}; together with validation "
            f"people it is {', '.join(others)}. Leave rare classes out, or split anew."
        )
    scans = list(matrices), [*matrices, *validation.connectivity]
    read = connections_of_values(model)
    found = [fit_patterns(model, *given, read) for given in zip(scans, columns, strict=True)]
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


@torch.no_grad()
def with_fresh_blocks(language_model: PreTrainedModel) -> PreTrainedModel:
    """The same architecture and embeddings, everything else as it was before it saw text."""
    fresh = AutoModelForCausalLM.from_config(language_model.config).to(torch.float32)
    fresh.get_input_embeddings().weight.copy_(language_model.get_input_embeddings().weight)
    return fresh


def with_lora(model: AVQLMForConditionalGeneration, rank: int) -> "PeftModel":
    """Freeze the language model but for adapters in all its linear layers and the markers' rows.

    The summary's map and the heads, which are new, are trained whole. The model is changed in
    place; what is returned can be `merged`.
    """
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(**model.lora_arguments(rank)))
    for part in (model.summary, model.heads):
        if part is not None:
            part.requires_grad_(True)
    return adapted


def merged(model: AVQLMForConditionalGeneration, adapted: "PeftModel | None"):
    """The model itself, or a copy into whose weights the adapters have been added."""
    if adapted is None:
        return model
    return copy.deepcopy(adapted).merge_and_unload()


def search_leaks(processor, scans, windows, matrices, targets, people, arguments) -> None:
    """Refuse to train on prompts that tell more than a scan's codes."""
    count, prompts = arguments.windows_per_prompt, {}
    for target in targets:
        rows = {}
        for scan, subject in enumerate(scans.subject_ids[:PEOPLE_SEARCHED]):
            codes = windows.codes[np.resize(windows.of_scan[scan], count)][None]
            more = None if matrices is None else matrices[scan][None]
            rows[subject] = prompt_rows(processor, codes, more, target["question"])[0]
        prompts[target["question"]] = rows
    refuse_leaks(prompts, processor.tokenizer, people)
