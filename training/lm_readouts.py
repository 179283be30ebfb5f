"""Readouts of the language model's answers: their losses, their scores, and which to use."""

import numpy as np
import torch

from cortexicon.inference.answers import pooled_answers, read_numbers
from cortexicon.inference.ask import COVERAGE, half_width


def start_heads(model, people) -> None:
    """Tell the heads the mean and spread of each number among training people (a table)."""
    numbers = {
        name: torch.tensor(people[name].dropna().to_numpy(dtype=np.float32))
        for name, target in model.heads.targets.items()
        if target["kind"] == "number"
    }
    model.heads.start(numbers)


def class_weights(people, targets, weight: float, balanced: bool) -> dict[tuple[str, str], float]:
    """What an answer of each (target, class) counts in the loss: `weight` on average over people.

    `balanced`: in all, every class counts the same, as the classifiers beside it do it.
    """
    found = {}
    for target in targets:
        if target["kind"] != "class":
            continue
        counts = people[target["name"]].dropna().astype(str).value_counts()
        for name, count in counts.items():
            share = counts.sum() / (len(counts) * count) if balanced else 1.0
            found[target["name"], str(name)] = weight * float(share)
    return found


def head_loss(heads, states, asked) -> torch.Tensor:
    """Mean over targets of the heads' losses at `states` (answers, width) of `asked` Answers."""
    losses = []
    for name in heads.targets:
        mine = [k for k, answer in enumerate(asked) if answer.target["name"] == name]
        if not mine:
            continue
        truth = torch.tensor([_wanted(asked[k]) for k in mine], device=states.device)
        weights = torch.tensor([asked[k].weight for k in mine], device=states.device)
        losses.append((weights * heads.loss(states[mine], name, truth)).mean())
    return torch.stack(losses).mean()


def _wanted(answer) -> float | list[float]:
    """A number, or the probability of each class: the teacher's, else the truth."""
    target, told = answer.target, answer.told
    if target["kind"] == "class":
        classes = [str(answer.value) == name for name in target["classes"]]
        return [float(share) for share in (classes if told is None else told)]
    if told is None:
        return float(answer.value)
    return float(read_numbers(told, {**target, "readout": "expectation"}))


def validate(
    model, processor, validation, participants, targets, batch_size: int
) -> dict[str, float]:
    """Error of every readout on the validation subjects.

    Numbers: mean absolute error. Classes: share of wrong answers, and log loss
    in nats, every class counting the same.
    """
    model.eval()
    scores = {}
    for target in targets:
        name = target["name"]
        truth = participants.loc[validation.subject_ids, name]
        known = truth.notna().to_numpy()
        answers = pooled_answers(model, processor, validation, target, batch_size)
        found = {}
        if target["kind"] == "number":
            wanted = truth[known].to_numpy(dtype=float)
            for readout in _readouts(model, target):
                values = answers.numbers({**target, "readout": readout})[known]
                errors = np.abs(values - wanted)
                found[readout] = float(errors.mean())
                width = half_width(errors)
                if width is not None:
                    scores[f"eval_half_width_{name}_{readout}"] = width
                scores[f"eval_mae_{name}_{readout}"] = found[readout]
            scores[f"eval_mae_{name}"] = min(found.values())
            continue
        places = np.array([target["classes"].index(str(value)) for value in truth[known]])
        for readout in _readouts(model, target):
            shares = answers.classes({**target, "readout": readout})[known]
            taken = -np.log(np.clip(shares[np.arange(len(places)), places], 1e-9, None))
            by_class = [taken[places == place].mean() for place in np.unique(places)]
            scores[f"eval_log_loss_{name}_{readout}"] = float(np.mean(by_class))
            found[readout] = float((shares.argmax(1) != places).mean())
        scores[f"eval_error_{name}"] = min(found.values())
    model.train()
    return scores


def _readouts(model, target) -> list[str]:
    words = ["expectation", "median", "mode"] if target["kind"] == "number" else ["options"]
    return words + (["head"] if model.heads is not None else [])


def choose_readouts(model, scores: dict[str, float]) -> None:
    """Set each target's readout to the best one on validation subjects.

    A number's interval is as wide as their errors say. They chose the readout, and perhaps the
    checkpoint, so that it may be somewhat narrow for others.
    """
    for target in model.config.targets:
        loss = "mae" if target["kind"] == "number" else "log_loss"
        target["readout"] = min(
            _readouts(model, target),
            key=lambda readout: scores[f"eval_{loss}_{target['name']}_{readout}"],
        )
        width = scores.get(f"eval_half_width_{target['name']}_{target['readout']}")
        if width is not None:
            target["interval"] = {"coverage": COVERAGE, "half_width": width}
