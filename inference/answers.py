"""What a language model answers about scans: probabilities of valid answers, numbers, classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQProcessor

if TYPE_CHECKING:
    from .predict import PromptCodes


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
    """Ids of one prompt per row of codes (prompts, windows, tokens), all of one length.

    Where codes or connectivity are what they were before quantisation, with `code_dim` as a last
    axis, placeholders stand in their places (see `scan_arguments`).
    """
    rows = []
    for row, windows in enumerate(codes):
        more = None if connectivity is None else connectivity[row]
        blank = [
            held is not None and held.dtype.kind == "f" and held.ndim == 3 - axis
            for axis, held in enumerate((windows, more))
        ]
        rows.append(
            processor.prompt_ids(
                None if blank[0] or not len(windows) else windows,
                question,
                None if blank[1] else more,
                num_windows=len(windows) if blank[0] else 0,
                connectivity=blank[1],
            )
        )
    return rows


def scan_arguments(codes: np.ndarray, connectivity: np.ndarray | None) -> dict[str, torch.Tensor]:
    """What the model is given beside prompts with placeholders; nothing for prompts of codes.

    Parameters
    ----------
    codes : float32 array, shape (prompts, windows, tokens, code_dim), or codes
    connectivity : float32 array, shape (prompts, tokens, code_dim), or codes, or None
    """
    arguments = {}
    if codes.dtype.kind == "f" and codes.ndim == 4 and codes.shape[1]:
        arguments["fmri_latents"] = torch.from_numpy(codes).flatten(0, 1)
    if connectivity is not None and connectivity.dtype.kind == "f":
        arguments["connectivity_latents"] = torch.from_numpy(connectivity)
    return arguments


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
        With 0 windows the prompts hold connectivity alone. Of a model that reads features: what
        codes were before quantisation, float32 (prompts, windows, tokens, code_dim).
    target : dict
        One of `AVQLMConfig.targets`.
    connectivity : int64 array, shape (prompts, tokens), optional
        Codes of the connectivity stream; or float32 (prompts, tokens, code_dim).
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
            part = slice(first, first + batch_size)
            scan = scan_arguments(codes[part], None if connectivity is None else connectivity[part])
            logits = model(input_ids=ids, logits_to_keep=1, **scan).logits[:, -1].float()
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

    The readout is `expectation`, `median` or `mode`.
    """
    values = np.arange(target["minimum"], target["maximum"] + 1, dtype=float)
    readout = target.get("readout", "expectation")
    if readout == "mode":
        return values[probabilities.argmax(-1)]
    return median(probabilities, values) if readout == "median" else probabilities @ values


def median(probabilities: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Medians (...) of distributions (..., values) over whole numbers, each spread over its unit.

    What has the least mean absolute error, where the probabilities are right.
    """
    edges = np.cumsum(probabilities, axis=-1) / probabilities.sum(-1, keepdims=True)
    place = (edges < 0.5).sum(-1, keepdims=True)
    above = np.take_along_axis(edges, place, -1)
    inside = np.take_along_axis(np.diff(edges, axis=-1, prepend=0.0), place, -1)
    return (values[place] + 0.5 - (above - 0.5) / np.maximum(inside, 1e-12))[..., 0]


@torch.inference_mode()
def head_answers(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    codes: np.ndarray,
    target: dict[str, Any],
    batch_size: int = 32,
    connectivity: np.ndarray | None = None,
    question: str | None = None,
) -> np.ndarray:
    """What the target's linear head reads from the state that would begin the answer.

    Arguments as in `answer_probabilities`.

    Returns
    -------
    float64 array, shape (prompts,) of numbers, or (prompts, classes) of probabilities
    """
    prompts = prompt_rows(processor, codes, connectivity, question or target["question"])
    found = []
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        scan = scan_arguments(codes[part], None if connectivity is None else connectivity[part])
        ids = torch.tensor(prompts[part], device=model.device)
        out = model(input_ids=ids, logits_to_keep=1, output_hidden_states=True, **scan)
        state = out.hidden_states[-1][:, -1]
        found.append(model.heads.read(state, target["name"]).double().cpu().numpy())
    return np.concatenate(found)


class ScanAnswers(NamedTuple):
    """Answers about scans, pooled over each scan's prompts.

    Attributes
    ----------
    probabilities : float64 array, shape (scans, answers)
        Of every valid answer, in the order of `answers_of`.
    free : float64 array, shape (scans,)
        Share of prompts whose unconstrained answer begins a valid one.
    head : float64 array, shape (scans,) or (scans, classes), or None
        What the head reads, where the model has heads.
    """

    probabilities: np.ndarray
    free: np.ndarray
    head: np.ndarray | None = None

    def numbers(self, target: dict[str, Any]) -> np.ndarray:
        """Numbers (scans,) by the target's readout: `expectation`, `median`, `mode` or `head`."""
        if target.get("readout") == "head" and self.head is not None:
            return self.head
        return read_numbers(self.probabilities, target)

    def classes(self, target: dict[str, Any]) -> np.ndarray:
        """Probabilities of classes (scans, classes) by the readout: `options` or `head`."""
        if target.get("readout") == "head" and self.head is not None:
            return self.head
        return self.probabilities


def pooled_answers(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    prompts: PromptCodes,
    target: dict[str, Any],
    batch_size: int = 32,
    question: str | None = None,
) -> ScanAnswers:
    """Answers about the scans of `prompts`, each the mean over the scan's prompts.

    Probabilities are pooled, so that `mode` is the mode of the pooled answer.
    """
    scans, count = prompts.codes.shape[:2]
    codes, connectivity = prompts.flat
    arguments = (model, processor, codes, target, batch_size, connectivity, question)
    probabilities, free = answer_probabilities(*arguments)
    head = None
    if model.heads is not None:
        head = head_answers(*arguments)
        head = head.reshape(scans, count, *head.shape[1:]).mean(1)
    return ScanAnswers(
        probabilities.reshape(scans, count, -1).mean(1), free.reshape(scans, count).mean(1), head
    )
