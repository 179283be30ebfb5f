"""Answers of any language model under a grammar that allows only valid ones."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from .answers import answers_of, read_numbers

READOUTS = {
    "number": ("expectation", "median", "mode", "generated"),
    "class": ("options", "generated"),
}


class Answers(NamedTuple):
    """What a model answers about scans.

    Attributes
    ----------
    subject_ids : list of str
    probabilities : float64 array, shape (scans, answers)
        Of each valid answer, in the order of `answers_of(target)`.
    generated : float64 array, shape (scans, answers)
        Share of the scan's prompts that end in this answer when the likeliest allowed token is
        taken each time.
    free : float64 array, shape (scans,)
        Share of the scan's prompts whose likeliest first token, of all, begins a valid answer.
    """

    subject_ids: list[str]
    probabilities: np.ndarray
    generated: np.ndarray
    free: np.ndarray


def grammar_answers(
    subject_ids: Sequence[str],
    next_logits: Callable[[tuple[int, ...]], torch.Tensor],
    answers: Sequence[tuple[int, ...]],
) -> Answers:
    """Probability of every valid answer, one prompt a scan.

    At each token the probabilities are shared among those that continue some valid answer, so any
    tokenizer will do. The model is asked once for every beginning that leaves a choice.

    Parameters
    ----------
    subject_ids : sequence of str
    next_logits : function
        From the ids of the answer's beginning to logits of the next token, float (scans,
        vocabulary).
    answers : sequence of tuples of int
        Token ids of each valid answer; none is the beginning of another (end them all alike).
    """
    rows = len(subject_ids)
    probabilities = np.ones((rows, len(answers)))
    generated = np.ones((rows, len(answers)), dtype=bool)
    free = np.zeros(rows)
    beginnings = {answer[:length] for answer in answers for length in range(len(answer))}
    for beginning in sorted(beginnings, key=lambda ids: (len(ids), ids)):
        size = len(beginning)
        inside = [k for k, answer in enumerate(answers) if answer[:size] == beginning]
        following = sorted({answers[k][size] for k in inside if len(answers[k]) > size})
        if len(following) == 1 and beginning:
            continue  # nothing to choose
        logits = next_logits(beginning).float()
        share = torch.softmax(logits[:, following], dim=-1).double().cpu().numpy()
        best = share.argmax(1)
        column = {token: place for place, token in enumerate(following)}
        for k in inside:
            place = column[answers[k][size]]
            probabilities[:, k] *= share[:, place]
            generated[:, k] &= best == place
        if not beginning:
            free = np.isin(logits.argmax(-1).cpu().numpy(), following).astype(float)
    return Answers(list(subject_ids), probabilities, generated.astype(float), free)


def joined_answers(parts: Sequence[Answers]) -> Answers:
    """Answers about other scans each, as one."""
    return Answers(
        [subject for part in parts for subject in part.subject_ids],
        *(np.concatenate([getattr(part, name) for part in parts]) for name in Answers._fields[1:]),
    )


def pooled_answers(prompts: Sequence[Answers]) -> Answers:
    """Answers to several prompts about the same scans, as one answer a scan."""
    return Answers(
        prompts[0].subject_ids,
        *(np.mean([getattr(part, name) for part in prompts], 0) for name in Answers._fields[1:]),
    )


def read_answers(answers: Answers, target: dict[str, Any], readout: str) -> np.ndarray:
    """One number or class of each scan, (scans,).

    Numbers: `expectation` over all of them, `median`, `mode` (the likeliest), or `generated`
    (token by token). Classes: `options` (the likeliest as a whole) or `generated`.
    """
    share = answers.generated if readout == "generated" else answers.probabilities
    if target["kind"] == "class":
        return np.array(target["classes"])[share.argmax(1)]
    words = "expectation" if readout == "generated" else readout
    return read_numbers(share, {**target, "readout": words})


def prediction_rows(
    answers: Answers,
    target: dict[str, Any],
    readout: str,
    participants: pd.DataFrame,
    *,
    system: str,
    fold: int,
    part: str,
) -> pd.DataFrame:
    """Answers as rows of a file of predictions (`cortexicon.evaluation.predictions`).

    Scans whose target is unknown are left out.
    """
    table = pd.DataFrame({"subject_id": answers.subject_ids})
    name = target["name"]
    table["y"] = [participants[name].get(subject) for subject in answers.subject_ids]
    table["y_hat"] = read_answers(answers, target, readout)
    table["system"], table["target"] = system, name
    table["fold"], table["part"] = fold, part
    table["score"] = np.nan
    if target["kind"] == "class":
        last = int(np.argsort(np.array(target["classes"]))[-1])
        table["score"] = answers.probabilities[:, last]
    table["site"] = [participants["site"].get(subject) for subject in answers.subject_ids]
    table["free_answer_valid"] = answers.free
    return table[table["y"].notna()]


def answer_ids_of(
    target: dict[str, Any], answer_ids: Callable[[str], list[int]]
) -> list[tuple[int, ...]]:
    """Token ids of every valid answer of a target, by a tokenizer's `answer_ids`."""
    return [tuple(answer_ids(answer)) for answer in answers_of(target)]
