"""Prompts that say what they must not: the answer, what stands for it, or who has which length.

A prompt may tell people apart by the codes of their scans and by nothing else. So, for one
question, all prompts have the same number of tokens of each kind, and their text is the same for
everybody; where it is not, it must hold no value of the person's row in the participants table.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cortexicon.tokenization import AVQTokenizer

from .arguments import TrainingError

#: Draws of people that say how often a text names a value by chance.
_PERMUTATIONS = 200
_WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?")


class LeakError(TrainingError):
    """A prompt that gives something away."""


def refuse_leaks(
    prompts: Mapping[str, Mapping[str, Sequence[int]]],
    tokenizer: AVQTokenizer,
    participants: pd.DataFrame,
) -> None:
    """Refuse prompts that say more about a person than the codes of the scan do.

    Parameters
    ----------
    prompts : mapping of question to mapping of subject to ids
        Whole prompts up to where the answer begins, without padding.
    tokenizer : AVQTokenizer
    participants : pandas.DataFrame
        Indexed by subject; every column counts: targets, site, TR, scan length and the rest.

    Raises
    ------
    LeakError
        The number of tokens differs between people; a question is a template; a text holds a value
        of the person's own row, or goes with a column of the table.
    """
    for question, rows in prompts.items():
        refuse_template(question)
        _refuse_lengths(question, rows, tokenizer, participants)
        texts = {
            subject: tokenizer.decode(
                [token for token in ids if token < tokenizer.bof_token_id],
                skip_special_tokens=False,
            )
            for subject, ids in rows.items()
        }
        refuse_telling_texts(texts, participants, recoded=True)


def refuse_template(question: str) -> None:
    """A question is the same for everybody: no field that a person's value would fill."""
    found = re.search(r"\{[^{}]*\}|%\(\w+\)s|\$\{?\w+", question)
    if found:
        raise LeakError(
            f"question {question!r} holds the field {found[0]!r}: what fills it differs between "
            "people and tells about them. Ask everybody in the same words."
        )


def refuse_telling_texts(
    texts: Mapping[str, str],
    participants: pd.DataFrame,
    allowed: Iterable[str] = (),
    recoded: bool = False,
) -> None:
    """Refuse texts, one per person, that name a value of the person's row.

    Parameters
    ----------
    texts : mapping of subject to str
    participants : pandas.DataFrame
    allowed : iterable of str
        Columns that texts may name, such as motion measured in the scan.
    recoded : bool
        Also refuse texts that go with a column without naming its values. Not for descriptions
        that are computed from the scan, which may go with age as the scan does.

    Raises
    ------
    LeakError
        With the column and an example.
    """
    if len(set(texts.values())) < 2:
        return  # what is the same for all says nothing about anyone
    subjects = list(texts)
    table = participants.loc[subjects].drop(columns=list(allowed), errors="ignore")
    shared = set.intersection(*(_words(text) for text in texts.values()))
    own = [_words(texts[subject]) - shared for subject in subjects]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(subjects)) for _ in range(_PERMUTATIONS)]
    for subject, words in zip(subjects, own, strict=True):
        if _words(subject) & words and subject.lower() in texts[subject].lower():
            raise LeakError(f"the prompt of {subject} holds the subject's name.")
    for column in table.columns:
        values = [_spellings(value) for value in table[column]]
        if len({frozenset(value) for value in values}) < 2:
            continue
        hits = np.array([[bool(value & words) for value in values] for words in own])
        named = hits.diagonal().sum()
        chance = [hits[np.arange(len(order)), order].sum() for order in orders]
        if named > max(chance) and named - np.mean(chance) > 0.02 * len(subjects):
            example = subjects[int(hits.diagonal().argmax())]
            raise LeakError(
                f"texts name the person's own {column}: {named} of {len(subjects)} do, by chance "
                f"{np.mean(chance):.0f} would, e.g. {example}: {texts[example][:80]!r} "
                f"({column} {table.at[example, column]}). Leave it out of the prompt."
            )
    for column in table.columns if recoded else ():
        if _goes_with(list(texts.values()), table[column], orders):
            raise LeakError(
                f"the wording of prompts goes with {column}: who knows the words knows it. Ask "
                "everybody in the same words, or draw the wording at random."
            )


def _refuse_lengths(
    question: str,
    rows: Mapping[str, Sequence[int]],
    tokenizer: AVQTokenizer,
    participants: pd.DataFrame,
) -> None:
    """Text, markers, placeholders and both blocks of codes: as many for each person."""
    kinds: dict[str, dict[str, int]] = {}
    for subject, ids in rows.items():
        array = np.asarray(ids)
        marker = (array >= tokenizer.bof_token_id) & (array < tokenizer.fmri_offset)
        second = tokenizer.connectivity_offset
        counts = {
            "tokens": len(array),
            "markers": int((marker & (array != tokenizer.fmri_token_id)).sum()),
            "hidden codes": int((array == tokenizer.fmri_token_id).sum()),
            "codes of the dynamics": int(
                ((array >= tokenizer.fmri_offset) & (array < second)).sum()
            ),
            "codes of the connectivity": int((array >= second).sum()),
        }
        for kind, count in counts.items():
            kinds.setdefault(kind, {})[subject] = count
    for kind, counted in kinds.items():
        few, many = min(counted, key=counted.__getitem__), max(counted, key=counted.__getitem__)
        if counted[few] == counted[many]:
            continue
        sites = ""
        if "site" in participants:
            sites = f" (sites {participants.at[few, 'site']}, {participants.at[many, 'site']})"
        raise LeakError(
            f"prompts of {question!r} differ in their number of {kind}: {counted[few]} for {few}, "
            f"{counted[many]} for {many}{sites}. The length of a scan alone gives away its site; "
            "give every prompt as many windows."
        )


def _goes_with(texts: list[str], column: pd.Series, orders: list[np.ndarray]) -> bool:
    """Whether knowing the text helps to guess the column, more than in all permutations."""
    wording = pd.factorize(np.array(texts))[0]
    if wording.max() + 1 > len(texts) / 2:
        return False  # everybody has a text of their own: nothing can be counted
    values: Any = column
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > 10:
        values = pd.qcut(column, 5, labels=False, duplicates="drop")
    classes = pd.factorize(values, use_na_sentinel=False)[0]

    def guessed(labels: np.ndarray) -> float:
        table = np.zeros((wording.max() + 1, classes.max() + 1))
        np.add.at(table, (wording, labels), 1)
        return float(table.max(1).sum())

    by_chance = [guessed(classes[order]) for order in orders]
    least = max(max(by_chance), float(np.mean(by_chance)) + 0.05 * len(texts))
    return guessed(classes) > least


def _words(text: Any) -> set[str]:
    return {word.lower() for word in _WORD.findall(str(text))}


def _spellings(value: Any) -> set[str]:
    """How a value may stand in a text: its words, and a number also rounded."""
    if isinstance(value, (bool, np.bool_)) or value is None or value != value:
        return set()
    if isinstance(value, (int, float, np.number)):
        number = float(value)
        return {f"{number:g}", f"{round(number)}", f"{number:.1f}", f"{number:.2f}"}
    return {word for word in _words(value) if len(word) > 1 or str(value).lower() == word}
