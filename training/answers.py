"""What the language models besides AVQ's share: labels of answers, validation, files out."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cortexicon.inference.grammar import (
    READOUTS,
    Answers,
    answer_ids_of,
    prediction_rows,
    read_answers,
)

from .faults import disk_errors, write_text_whole

PREDICTED_PARTS = ("validation", "test", "test_sites")
# One entry for each token of a written answer: the tokens that share its credit, and how.
Shares = list[tuple[list[int], list[float]]]


class AnswerBook:
    """Token ids of valid answers, and the labels that training compares logits with.

    Near numbers share the credit (Gaussian, SD `number_sd`) where every number of the range is one
    token, for 41 is a better answer to 42 than 7 is; else the written tokens take all.
    """

    def __init__(self, answer_ids: Callable[[str], list[int]], number_sd: float):
        self.answer_ids = answer_ids
        self.number_sd = number_sd
        self._valid: dict[str, list[tuple[int, ...]]] = {}

    def valid(self, target: dict[str, Any]) -> list[tuple[int, ...]]:
        """Ids of every valid answer, in the order of `answers_of`."""
        if target["name"] not in self._valid:
            self._valid[target["name"]] = answer_ids_of(target, self.answer_ids)
        return self._valid[target["name"]]

    def labels(
        self, target: dict[str, Any], value: Any, told: np.ndarray | None = None
    ) -> tuple[list[int], Shares]:
        """Ids of the true answer, and for each of them the tokens that share the credit.

        `told`, float (answers,), are a teacher's probabilities of all valid answers. They share the
        credit of the first token, where it tells all answers apart; else they are not used.
        """
        if told is not None:
            begins = [ids[0] for ids in self.valid(target)]
            if len(set(begins)) == len(begins):
                reply, true = self.labels(target, value)
                return reply, [(begins, told.tolist()), *true[1:]]
        if target["kind"] == "class":
            reply = self.answer_ids(str(value))
            return reply, [([token], [1.0]) for token in reply]
        low, high = target["minimum"], target["maximum"]
        value = min(max(float(value), low), high)
        valid = self.valid(target)
        reply = list(valid[round(value) - low])
        shares: Shares = [([token], [1.0]) for token in reply]
        one_token = len({len(ids) for ids in valid}) == 1 and len({i[1:] for i in valid}) == 1
        if one_token and self.number_sd > 0:
            grid = np.arange(low, high + 1)
            near = np.flatnonzero(np.abs(grid - value) <= 4 * self.number_sd + 1)
            share = np.exp(-0.5 * ((grid[near] - value) / self.number_sd) ** 2)
            shares[0] = ([valid[k][0] for k in near], (share / share.sum()).tolist())
        return reply, shares


def validation_scores(
    answers: Mapping[str, Answers], targets: Sequence[dict[str, Any]], people: pd.DataFrame
) -> dict[str, float]:
    """Error of every readout, by `eval_mae_NAME_READOUT` or `eval_error_NAME_READOUT`.

    The best of a target's readouts stands under the name without the readout.
    """
    scores = {}
    for target in targets:
        name, found = target["name"], answers[target["name"]]
        truth = people.loc[found.subject_ids, name]
        known = truth.notna().to_numpy()
        errors = {}
        for readout in READOUTS[target["kind"]]:
            values = read_answers(found, target, readout)[known]
            if target["kind"] == "number":
                wrong = np.abs(values - truth[known].to_numpy(float))
            else:
                wrong = values != truth[known].astype(str).to_numpy()
            errors[f"{error_name(target)}_{readout}"] = float(wrong.mean())
        scores.update(errors)
        scores[error_name(target)] = min(errors.values())
    return scores


def error_name(target: dict[str, Any]) -> str:
    """Under which name the target's error on validation subjects stands in the log."""
    return f"eval_{'mae' if target['kind'] == 'number' else 'error'}_{target['name']}"


def choose_readouts(targets: Sequence[dict[str, Any]], scores: Mapping[str, float]) -> None:
    """Set each target's `readout` to the one with the smallest error on validation subjects."""
    for target in targets:
        errors = {
            readout: scores[f"{error_name(target)}_{readout}"]
            for readout in READOUTS[target["kind"]]
        }
        target["readout"] = min(errors, key=errors.__getitem__)


def permuted_labels(people: pd.DataFrame, subjects: Sequence[str], seed: int) -> pd.DataFrame:
    """The control: the rows of `subjects` dealt out among them, each row staying whole."""
    shuffled = people.copy()
    order = np.random.default_rng([seed, 17]).permutation(len(subjects))
    dealt = people.loc[[subjects[k] for k in order]]
    shuffled.loc[list(subjects)] = dealt.to_numpy()
    return shuffled.astype(people.dtypes.to_dict())


def others_of(subjects: Sequence[str], seed: int) -> dict[str, str]:
    """The control: another subject of the same list for each, no one their own."""
    order = [subjects[k] for k in np.random.default_rng([seed, 18]).permutation(len(subjects))]
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))


def write_predictions_of(
    answers: Mapping[str, Mapping[str, Answers]],
    targets: Sequence[dict[str, Any]],
    people: pd.DataFrame,
    path: Path,
    every_path: Path,
    *,
    system: str,
    fold: int,
) -> None:
    """Two files of predictions: of the chosen readouts, and of all of them.

    Parameters
    ----------
    answers : mapping
        Part of the split -> name of a target -> Answers.
    path, every_path : Path
        In the second every readout is a system of its own.
    """
    chosen, every = [], []
    for part, by_target in answers.items():
        for target in targets:
            found = by_target[target["name"]]
            facts: dict[str, Any] = {"fold": fold, "part": part}
            chosen.append(
                prediction_rows(found, target, target["readout"], people, system=system, **facts)
            )
            every += [
                prediction_rows(
                    found, target, readout, people, system=f"{system} ({readout})", **facts
                )
                for readout in READOUTS[target["kind"]]
            ]
    write_table(path, pd.concat(chosen, ignore_index=True))
    write_table(every_path, pd.concat(every, ignore_index=True))


def write_cost(path: str, parameters: int, tokens_per_scan: int | None) -> None:
    """What a benchmark wants to know of a system's cost, as JSON; nowhere where `path` is empty."""
    if not path:
        return
    cost: dict[str, int] = {"parameters": parameters}
    if tokens_per_scan is not None:
        cost["tokens_per_scan"] = tokens_per_scan
    write_text_whole(Path(path), json.dumps(cost) + "\n")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV file so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with disk_errors(path.parent, path.name):
        table.to_csv(part, index=False)
        part.replace(path)
