"""One scan and a question in plain words in, an answer in text out: a number with its interval."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cortexicon.cohorts import Cohort, ParcelSeries, load_cohort
from cortexicon.cohorts.atlases import Atlas
from cortexicon.modeling import AVQLMForConditionalGeneration
from cortexicon.tokenization import AVQFeatureExtractor, AVQProcessor

from .answers import answers_of, pooled_answers, prompt_rows, scan_arguments
from .errors import InferenceError
from .examination import examine
from .predict import PromptCodes, connectivity_codes, scan_windows

#: Share of people whose true value the interval shall hold.
COVERAGE = 0.9
#: Words that say nothing about what is asked.
_FILLERS = frozenset(
    re.findall(r"\w+", "a an the is are was of this that person subject scan what which how")
)


class ScanAnswer(NamedTuple):
    """What the model says about one scan.

    Attributes
    ----------
    text : str
        A sentence for people: the answer, and its interval or probability.
    value : float, str or None
        Number or class; None where the question is about nothing that the model was trained on.
    low, high : float or None
        Interval of a number.
    coverage : float or None
        Its nominal coverage.
    probability : float or None
        Of a class.
    target : str or None
        Column that the question was taken to ask for.
    asked : str
        The question as it stood in the prompt.
    free : str
        What the model writes without constraint, from its first prompt.
    """

    text: str
    value: float | str | None
    low: float | None
    high: float | None
    coverage: float | None
    probability: float | None
    target: str | None
    asked: str
    free: str


def ask(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    scan: ParcelSeries,
    question: str,
    batch_size: int = 32,
) -> ScanAnswer:
    """Answer a question about one scan, from several prompts of windows pooled to one answer.

    A question about a trained target is answered under its grammar, with an interval: from the
    errors on validation people where the checkpoint stores them (split conformal), else from the
    distribution of the answer, which is no promise. Any other question gets what the model writes.

    Parameters
    ----------
    model : AVQLMForConditionalGeneration
    processor : AVQProcessor
    scan : ParcelSeries
    question : str

    Raises
    ------
    InferenceError
        The scan is shorter than a window, or there is no question.
    TokenizationError
        Regions of another atlas, and whatever else the feature extractor refuses.
    """
    if not question.strip():
        raise InferenceError("expected a question, found an empty text.")
    prompts = scan_prompts(model, processor.feature_extractor, scan, batch_size)
    target = target_of(question, model.config.targets or [])
    asked = question
    if target is not None and len(wordings(target)) == 1:
        asked = target["question"]  # the only wording that the model has learned to read
    free = free_answers(model, processor, prompts, asked, batch_size=batch_size)[0]
    if target is None:
        return ScanAnswer(free or "(nothing)", None, None, None, None, None, None, asked, free)
    answers = pooled_answers(model, processor, prompts, target, batch_size, asked)
    if target["kind"] == "class":
        shares = answers.classes(target)[0]
        value, share = answers_of(target)[int(shares.argmax())], float(shares.max())
        text = f"{target['name']}: {value} (probability {share:.2f})"
        return ScanAnswer(text, value, None, None, None, share, target["name"], asked, free)
    number = float(answers.numbers(target)[0])
    low, high, coverage = interval_of(number, answers.probabilities[0], target)
    text = f"{target['name']}: {number:.0f} ({coverage:.0%} interval {low:.0f} to {high:.0f})"
    return ScanAnswer(text, number, low, high, coverage, None, target["name"], asked, free)


def scan_prompts(
    model: AVQLMForConditionalGeneration,
    extractor: AVQFeatureExtractor,
    scan: ParcelSeries,
    batch_size: int = 32,
) -> PromptCodes:
    """Codes of one scan, as many prompts of them as the model pools."""
    config = model.config
    prompts = config.prompts_per_scan if config.windows_per_prompt else 1
    codes = scan_windows(model, extractor, scan, prompts, config.windows_per_prompt, batch_size)
    connectivity = None
    if model.connectome is not None:
        connectivity = connectivity_codes(model, extractor, scan)[None]
    return PromptCodes([scan.subject_id], codes[None], {}, connectivity)


def wordings(target: dict[str, Any]) -> list[str]:
    """Questions that the model was trained to answer with this target."""
    return list(dict.fromkeys([target["question"], *target.get("paraphrases", [])]))


def target_of(question: str, targets: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The trained target that a question in plain words asks for, or None.

    One of its wordings, else the target whose wordings and name share most words with the question
    (at least half of the question's own that say something).
    """
    for target in targets:
        if question.strip().lower() in (wording.strip().lower() for wording in wordings(target)):
            return target
    words = _words(question)
    scores = []
    for target in targets:
        known = set().union(*(_words(wording) for wording in wordings(target)))
        known |= _words(target["name"].replace("_", " "))
        if target["kind"] == "class":
            known |= set().union(*(_words(name) for name in target["classes"]))
        known |= _COMMON_WORDS.get(target["name"], frozenset())
        scores.append(len(words & known) / max(1, len(words)))
    best = max(range(len(scores)), key=scores.__getitem__, default=None)
    if best is None or scores[best] < 0.5 or scores.count(scores[best]) > 1:
        return None
    return targets[best]


#: How people ask for the commonest columns of a participants table.
_COMMON_WORDS = {
    "age": frozenset({"old", "age", "years", "young"}),
    "sex": frozenset({"sex", "gender", "male", "female", "man", "woman"}),
    "diagnosis": frozenset({"diagnosis", "patient", "control", "healthy", "disorder"}),
}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - _FILLERS


def interval_of(
    number: float, probabilities: np.ndarray, target: dict[str, Any]
) -> tuple[float, float, float]:
    """Lower and upper end of a number's interval, and its nominal coverage.

    Parameters
    ----------
    number : float
    probabilities : float array, shape (answers,)
        Pooled over prompts.
    target : dict
        With `interval` (`half_width`, `coverage`) where validation people gave one.
    """
    stored = target.get("interval")
    if stored is not None:
        low, high = number - stored["half_width"], number + stored["half_width"]
        coverage = stored["coverage"]
    else:
        cumulative = probabilities.cumsum() / probabilities.sum()
        tail = (1 - COVERAGE) / 2
        low = target["minimum"] + float(np.searchsorted(cumulative, tail))
        high = target["minimum"] + float(np.searchsorted(cumulative, 1 - tail))
        low, high, coverage = min(low, number), max(high, number), COVERAGE
    return max(low, target["minimum"]), min(high, target["maximum"]), coverage


def half_width(errors: np.ndarray, coverage: float = COVERAGE) -> float | None:
    """Half width of a split conformal interval from absolute errors on people not trained on.

    None where they are too few for the coverage.
    """
    rank = int(np.ceil(coverage * (len(errors) + 1)))
    if rank > len(errors):
        return None
    return float(np.sort(errors)[rank - 1])


@torch.inference_mode()
def free_answers(
    model: AVQLMForConditionalGeneration,
    processor: AVQProcessor,
    prompts: PromptCodes,
    question: str,
    max_new_tokens: int = 16,
    batch_size: int = 32,
) -> list[str]:
    """What the model writes after each prompt when nothing forbids anything, greedily."""
    codes, connectivity = prompts.flat
    rows = prompt_rows(processor, codes, connectivity, question)
    answers = []
    for first in range(0, len(rows), batch_size):
        part = slice(first, first + batch_size)
        ids = torch.tensor(rows[part], device=model.device)
        scan = scan_arguments(codes[part], None if connectivity is None else connectivity[part])
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **scan,
        )
        texts = processor.tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def invalid_rate(answers: Sequence[str], target: dict[str, Any]) -> float:
    """Share of free answers that are none of the target's valid ones, letter by letter."""
    valid = set(answers_of(target))
    return sum(answer.strip() not in valid for answer in answers) / max(1, len(answers))


def scan_to_ask(
    path: Path,
    processor: AVQProcessor,
    subject: str | None = None,
    atlas: Atlas | None = None,
    tr: float | None = None,
) -> ParcelSeries:
    """The one scan at a path: a file that `prepare` reads, or one person of a cohort.

    Raises
    ------
    InferenceError
        None or several scans, an unknown subject, or a volume without an atlas.
    """
    if (path / "cohort.json").is_file() or (path / "timeseries" / "bold.parquet").is_file():
        return _of_cohort(load_cohort(path), subject, path)
    found = examine(path, atlas, tr, processor.feature_extractor)
    if found.needs_atlas:
        raise InferenceError(
            f"{path} is a volume: name the atlas to read its regions with, --atlas NAME."
        )
    scans = [scan for scan in found.scans if subject in (None, scan.subject_id)]
    if len(scans) == 1:
        return scans[0]
    if not scans and found.unreadable:
        name, reason = next(iter(found.unreadable.items()))
        raise InferenceError(f"{path}: {name} cannot be used: {reason}")
    raise InferenceError(f"{path}: expected one scan, found {len(scans)}. Name one, --subject ID.")


def _of_cohort(cohort: Cohort, subject: str | None, path: Path) -> ParcelSeries:
    subjects = cohort.subject_ids
    if subject is None and len(subjects) == 1:
        return cohort.series(subjects[0])
    if subject is None:
        raise InferenceError(
            f"{path}: expected one scan, found a cohort of {len(subjects)}. Name one of its "
            f"people, --subject {subjects[0]}."
        )
    return cohort.series(subject)
