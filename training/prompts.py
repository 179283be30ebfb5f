"""Training rows of the language model: one scan, then several questions with their answers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from cortexicon.tokenization import AVQProcessor

from .answers import AnswerBook
from .arguments import TrainingError


@dataclass
class Answer:
    """A question about one scan.

    Attributes
    ----------
    question : str
    target : dict
        Says what answers are valid, as in `AVQLMConfig.targets`.
    value : float or str
        The true number or class.
    weight : float
        What it counts in the loss.
    told : float64 array (answers,), optional
        A teacher's probabilities of the valid answers, in place of the true one.
    """

    question: str
    target: dict[str, Any]
    value: Any
    weight: float = 1.0
    told: np.ndarray | None = None


def checked_targets(targets: list[dict[str, Any]], participants) -> list[dict[str, Any]]:
    """Targets of a configuration, completed and compared with the participants' columns.

    Raises
    ------
    TrainingError
        A column that does not exist, a kind that is none, values outside the declared range or
        classes.
    """
    checked = []
    for target in targets:
        target = dict(target)
        name = target.get("name")
        if name not in participants:
            raise TrainingError(
                f"targets: the participants have no column {name!r}; "
                f"they have {', '.join(map(str, participants.columns))}."
            )
        values = participants[name].dropna()
        if target.get("kind") == "number":
            if not pd.api.types.is_numeric_dtype(values):
                raise TrainingError(f"targets: {name} holds text; its kind must be 'class'.")
            for bound in ("minimum", "maximum"):
                if not isinstance(target.get(bound), int):
                    raise TrainingError(
                        f"targets: {name} needs whole numbers `minimum` and `maximum`."
                    )
            outside = values[
                (values < target["minimum"] - 0.5) | (values >= target["maximum"] + 0.5)
            ]
            if len(outside):
                raise TrainingError(
                    f"targets: {len(outside)} values of {name} lie outside "
                    f"{target['minimum']}..{target['maximum']}, e.g. {outside.iloc[0]} of "
                    f"{outside.index[0]}. Widen the range, or mend the table."
                )
        elif target.get("kind") == "class":
            target["classes"] = sorted(str(value) for value in values.unique())
        else:
            raise TrainingError(
                f"targets: kind of {name} must be 'number' or 'class', "
                f"found {target.get('kind')!r}."
            )
        target.setdefault("question", f"What is the {name} of this person?")
        target.setdefault("readout", "expectation")
        checked.append(target)
    return checked


class RowBuilder:
    """Turns scans and answers into input tensors in which no question sees another.

    Every question follows the scan directly, in position and in attention: what the model learns
    from a row of many questions is what it meets in a prompt of one.
    """

    def __init__(self, processor: AVQProcessor, number_sd: float):
        self.processor = processor
        self.book = AnswerBook(processor.answer_ids, number_sd)
        self._cache: dict[str, list[int]] = {}

    def _text(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = self.processor.tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=True
            )
        return self._cache[text]

    def batch(
        self,
        codes: list[np.ndarray],
        answers: list[list[Answer]],
        connectivity: list[np.ndarray] | None = None,
    ) -> dict[str, Any]:
        """Inputs of one training step.

        Parameters
        ----------
        codes : list of int64 arrays (windows, tokens), one per row
            0 windows: the row holds connectivity alone. What codes were before quantisation,
            float32 with `code_dim` as a last axis, leaves placeholders.
        answers : list of lists of Answer, one list per row
        connectivity : list of int64 arrays (tokens,), one per row, optional
            Or float32 (tokens, code_dim).

        Returns
        -------
        dict
            input_ids, position_ids int64 (rows, sequence); attention_mask bool
            (rows, 1, sequence, sequence); places int64 (labels, 2): row and position whose next
            token is scored; labels: list of (ids, shares); first: list of the places, one per
            answer, that score its first token.
        """
        rows: list[tuple] = []
        places: list[tuple[int, int]] = []
        labels: list[tuple[list[int], list[float]]] = []
        first: list[int] = []
        for row, (windows, asked) in enumerate(zip(codes, answers, strict=True)):
            more = None if connectivity is None else connectivity[row]
            ids = self._scan_ids(windows, more)
            scan = len(ids)
            positions, segments = list(range(scan)), [0] * scan
            for segment, answer in enumerate(asked, start=1):
                text = self._text(self.processor.prompt_template(answer.question))
                reply, shares = self.book.labels(answer.target, answer.value, answer.told)
                if answer.target["kind"] == "class":
                    shares = [
                        (tokens, [answer.weight * one for one in part]) for tokens, part in shares
                    ]
                first.append(len(places))
                for offset in range(len(reply)):
                    places.append((row, len(ids) + len(text) + offset - 1))
                labels += shares
                ids = ids + text + reply[:-1]
                positions += range(scan, scan + len(text) + len(reply) - 1)
                segments += [segment] * (len(text) + len(reply) - 1)
            rows.append((ids, positions, segments))
        length = max(len(ids) for ids, _, _ in rows)
        input_ids = torch.zeros(len(rows), length, dtype=torch.int64)
        position_ids = torch.zeros(len(rows), length, dtype=torch.int64)
        segment_ids = torch.full((len(rows), length), -1, dtype=torch.int64)
        for row, (ids, positions, segments) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            position_ids[row, : len(ids)] = torch.tensor(positions)
            segment_ids[row, : len(ids)] = torch.tensor(segments)
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        visible = same | ((segment_ids[:, None, :] == 0) & (segment_ids[:, :, None] > 0))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": (visible & causal)[:, None],
            "places": torch.tensor(places),
            "labels": labels,
            "first": first,
        }

    def _scan_ids(self, windows: np.ndarray, connectivity: np.ndarray | None) -> list[int]:
        latent = len(windows) and windows.dtype.kind == "f"
        blank = connectivity is not None and connectivity.dtype.kind == "f"
        return self.processor.scan_ids(
            None if latent or not len(windows) else windows,
            None if blank else connectivity,
            len(windows) if latent else 0,
            blank,
        )


def answer_loss(logits: torch.Tensor, labels: list[tuple[list[int], list[float]]]) -> torch.Tensor:
    """Mean cross entropy of next-token logits (labels, vocabulary) to the labels' token shares."""
    device = logits.device
    rows = torch.tensor([row for row, (ids, _) in enumerate(labels) for _ in ids], device=device)
    tokens = torch.tensor([token for ids, _ in labels for token in ids], device=device)
    shares = torch.tensor([share for _, shares in labels for share in shares], device=device)
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return -(log_probabilities[rows, tokens] * shares).sum() / len(labels)
