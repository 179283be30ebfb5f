"""What a language model of codes can learn before and beside clinical questions: data and losses.

Three kinds, each a function that makes rows and one that makes their loss or score:

* code modelling: the next code, or hidden codes, with the unigram perplexity beside it;
* descriptions computed from the scan (networks, motion), never from the participants table;
* questions in many wordings, some of them held out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from cortexicon.tokenization import AVQProcessor

from .arguments import TrainingError

#: Cross entropy leaves positions with this label out.
IGNORED = -100

#: Wordings by column of the participants table; the last ones are for tests only, never trained.
QUESTIONS = {
    "age": (
        "Age?",
        "How old is this person?",
        "What is the age of this person in years?",
        "Give the age of the person who was scanned.",
        "How many years old was the participant?",
        "Estimate the age.",
        "Tell me the age of this participant.",
        "How old was the person in the scanner?",
    ),
    "sex": (
        "Sex?",
        "Is this person female or male?",
        "What is the sex of this person?",
        "Was a woman or a man scanned?",
        "Give the sex of the participant.",
        "Tell me whether this is a female or a male brain.",
        "Male or female?",
    ),
    "diagnosis": (
        "Diagnosis?",
        "Is this person a patient or a control?",
        "What is the diagnosis of this person?",
        "Give the diagnosis of the participant.",
        "Was a patient or a healthy control scanned?",
        "To which group does this person belong?",
        "Patient or control?",
    ),
}
#: Of other columns, filled with the column's name: the same for everybody.
_ANY = (
    "{name}?",
    "What is the {name} of this person?",
    "Give the {name} of the participant.",
    "Tell me the {name} of the person who was scanned.",
    "Estimate the {name}.",
    "How would you put the {name} of this participant?",
)
HELD_OUT = 2


def wordings_of(target: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Wordings of a target to train on, its own question first, and wordings that are held out."""
    name = target["name"]
    known = QUESTIONS.get(name)
    if known is None:
        known = tuple(text.replace("{name}", name.replace("_", " ")) for text in _ANY)
    own = target.get("question", known[0])
    held_out = [text for text in known[-HELD_OUT:] if text != own]
    return list(dict.fromkeys([own, *known[:-HELD_OUT]])), held_out


# ---------------------------------------------------------------------- code modelling


def next_code_rows(
    processor: AVQProcessor, codes: Sequence[np.ndarray], connectivity: Sequence[Any] | None = None
) -> dict[str, torch.Tensor]:
    """Rows of scans alone, in which every code is predicted from what stands before it.

    Parameters
    ----------
    codes : sequence of int64 arrays (windows, tokens), one per row; as many windows in each
    connectivity : sequence of int64 arrays (tokens,), optional

    Returns
    -------
    dict
        input_ids int64 (rows, sequence); labels int64 of the same shape, `IGNORED` but for codes.
        The model shifts labels itself.
    """
    more = [None] * len(codes) if connectivity is None else connectivity
    rows = [
        processor.scan_ids(windows if len(windows) else None, row)
        for windows, row in zip(codes, more, strict=True)
    ]
    ids = _stacked(rows)
    return {"input_ids": ids, "labels": ids.masked_fill(~_is_code(processor, ids), IGNORED)}


def masked_code_rows(
    processor: AVQProcessor,
    codes: Sequence[np.ndarray],
    connectivity: Sequence[Any] | None = None,
    share: float = 0.3,
    seed: int | Sequence[int] = 0,
) -> dict[str, torch.Tensor]:
    """Rows of a scan with hidden codes, then the whole scan, in which those alone are predicted.

    A causal model so reads what stands on both sides of a gap before it fills the gap.

    Parameters
    ----------
    codes, connectivity
        As in `next_code_rows`.
    share : float
        Of codes that are hidden, 0 < share < 1; as many in each row.
    """
    if not 0 < share < 1:
        raise TrainingError(f"share of hidden codes must lie between 0 and 1, found {share:g}.")
    whole = next_code_rows(processor, codes, connectivity)["input_ids"]
    is_code = _is_code(processor, whole)
    rng = np.random.default_rng(seed)
    hidden = torch.zeros_like(is_code)
    for row, present in enumerate(is_code):
        places = present.nonzero()[:, 0].numpy()
        count = max(1, round(share * len(places)))
        hidden[row, torch.from_numpy(rng.choice(places, count, replace=False))] = True
    blanked = whole.masked_fill(hidden, processor.tokenizer.fmri_token_id)
    labels = torch.full_like(whole, IGNORED)
    return {
        "input_ids": torch.cat([blanked, whole], 1),
        "labels": torch.cat([labels, whole.masked_fill(~hidden, IGNORED)], 1),
    }


def without_summary(model) -> dict[str, torch.Tensor]:
    """Arguments with which a model says nothing of a scan's summary, for it holds every code."""
    held = getattr(model, "module", model).config.summary_patterns
    return {"connectivity_scores": torch.zeros(1, held)} if held else {}


def code_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of logits (rows, sequence, vocabulary) to the *next* position's labels."""
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


@torch.inference_mode()
def code_perplexity(
    model, batches: Sequence[dict[str, torch.Tensor]], stream: str = "fmri"
) -> float:
    """exp of the mean negative log-likelihood of a stream's codes, among the codes of its block.

    Comparable with `unigram_perplexity`, which knows of no text either.

    Parameters
    ----------
    model : AVQLMForConditionalGeneration
    batches : sequence of dict
        Of `next_code_rows` or `masked_code_rows`, of people that were not trained on.
    """
    first, count = model.block(stream)
    total, seen = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        labels = batch["labels"].to(model.device)[:, 1:] - first
        asked = (labels >= 0) & (labels < count)
        logits = model(input_ids=ids, **without_summary(model)).logits[:, :-1][asked]
        logits = logits[:, first : first + count].float()
        total += float(F.cross_entropy(logits, labels[asked], reduction="sum"))
        seen += int(asked.sum())
    if not seen:
        raise TrainingError(f"expected codes of stream {stream!r} to score, found none.")
    return math.exp(total / seen)


def unigram_perplexity(
    training: np.ndarray, held_out: np.ndarray, num_codes: int, added: float = 1.0
) -> float:
    """Perplexity of held-out codes under the frequencies of training codes.

    Parameters
    ----------
    training, held_out : int64 arrays of any shape
    added : float
        Added to each count; the best of five values around it on half the training codes is what
        an honest opponent would take, see `best_unigram_perplexity`.
    """
    counts = np.bincount(training.ravel(), minlength=num_codes) + added
    share = counts / counts.sum()
    return float(np.exp(-np.log(share[held_out.ravel()]).mean()))


def best_unigram_perplexity(training: np.ndarray, held_out: np.ndarray, num_codes: int) -> float:
    """`unigram_perplexity` with the smoothing that serves the held-out codes best.

    It looks at them, which the model must not: the opponent gets the better end.
    """
    return min(
        unigram_perplexity(training, held_out, num_codes, added)
        for added in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
    )


# ---------------------------------------------------------------------- descriptions


def describe_scan(values: np.ndarray, networks: Sequence[str]) -> list[str]:
    """Sentences computed from a scan's region series; nothing of them is about the person.

    Parameters
    ----------
    values : float array, shape (time, regions)
        z-scored; NaN and constant regions are left out.
    networks : sequence of str
        Network of each region, such as the `network` column of regions.tsv.

    Returns
    -------
    list of str
        How closely regions are coupled (mean correlation below 0.2, above 0.25, or between), which
        pair of networks rises together most, which least, which network holds together most, and
        how restless the signal was (DVARS: of the whole brain, frame to frame).

    Raises
    ------
    TrainingError
        Fewer than two networks, or another number of names than of regions.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(networks) != values.shape[1]:
        raise TrainingError(
            f"expected a network for each of {values.shape[1]} regions, found {len(networks)}."
        )
    kept = np.isfinite(values).all(0) & (values.std(0) > 0)
    names = np.array([str(name) for name in networks])[kept]
    values = (values[:, kept] - values[:, kept].mean(0)) / values[:, kept].std(0)
    known = sorted({name for name in names if name and name.lower() not in ("nan", "none")})
    if len(known) < 2:
        raise TrainingError(f"expected regions of at least two networks, found {known}.")
    correlation = values.T @ values / len(values)
    between = {}
    within = {}
    for place, one in enumerate(known):
        block = correlation[np.ix_(names == one, names == one)]
        if len(block) > 1:
            within[one] = float((block.sum() - np.trace(block)) / (block.size - len(block)))
        for other in known[place + 1 :]:
            between[one, other] = float(correlation[np.ix_(names == one, names == other)].mean())
    together, apart = max(between, key=between.__getitem__), min(between, key=between.__getitem__)
    mean = float(correlation[np.triu_indices(len(correlation), 1)].mean())
    coupled = "loosely" if mean < 0.2 else "closely" if mean > 0.25 else "moderately"
    sentences = [
        f"Regions are {coupled} coupled throughout the brain.",
        f"The {_plain(together[0])} and {_plain(together[1])} networks rise and fall together.",
        f"The {_plain(apart[0])} and {_plain(apart[1])} networks go their own ways.",
    ]
    if within:
        tightest = max(within, key=within.__getitem__)
        sentences.append(f"The {_plain(tightest)} network holds together most.")
    # White noise has a mean squared step of 2 in z units; slow signals have less.
    restless = float(np.square(np.diff(values, axis=0)).mean())
    steps = np.sqrt(np.square(np.diff(values, axis=0)).mean(1))
    jumps = float((steps > 2 * np.median(steps)).mean())
    pace = "slow" if restless < 0.7 else "fast" if restless > 1.3 else "even"
    motion = "no sudden jumps" if jumps == 0 else "few jumps" if jumps < 0.03 else "many jumps"
    sentences.append(f"The signal is {pace}, with {motion}.")
    return sentences


def paired_text_rows(
    processor: AVQProcessor,
    codes: Sequence[np.ndarray],
    texts: Sequence[str],
    connectivity: Sequence[Any] | None = None,
    text_first: bool = False,
) -> dict[str, torch.Tensor]:
    """Rows of a scan and its description; what comes second is predicted.

    Parameters
    ----------
    codes, connectivity
        As in `next_code_rows`.
    texts : sequence of str
        One per row (see `describe_scan`), tokenised as plain text.
    text_first : bool
        The text, then the scan: what text in, scan out learns from. Else the scan, then the text.

    Returns
    -------
    dict
        input_ids, labels and attention_mask int64 (rows, sequence), padded on the right.
    """
    more = [None] * len(codes) if connectivity is None else connectivity
    tokenizer = processor.tokenizer
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows, labels = [], []
    for windows, row, text in zip(codes, more, texts, strict=True):
        scan = processor.scan_ids(windows if len(windows) else None, row)
        words = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        first, second = (words, scan) if text_first else (scan, [*words, *end])
        rows.append(first + second)
        labels.append([IGNORED] * len(first) + second)
    longest = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    lengths = torch.tensor([len(row) for row in rows])
    return {
        "input_ids": _stacked([row + [pad] * (longest - len(row)) for row in rows]),
        "labels": _stacked([row + [IGNORED] * (longest - len(row)) for row in labels]),
        "attention_mask": (torch.arange(longest)[None] < lengths[:, None]).long(),
    }


def _plain(name: str) -> str:
    """DorsalAttention -> dorsal attention."""
    spaced = "".join(f" {c.lower()}" if c.isupper() else c for c in name.replace("_", " "))
    return " ".join(spaced.split())


def _is_code(processor: AVQProcessor, ids: torch.Tensor) -> torch.Tensor:
    return ids >= processor.tokenizer.fmri_offset  # both blocks follow the markers


def _stacked(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise TrainingError(
            f"rows of one batch must be equally long, found {sorted(lengths)} tokens: give every "
            "scan as many windows."
        )
    return torch.tensor([list(row) for row in rows], dtype=torch.int64)
