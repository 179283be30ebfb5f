"""Linear heads on frozen features, fitted in closed form."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import KFold

PENALTIES = np.logspace(-3, 3, 13)
INNER_FOLDS = 5


def fit_head(
    features: np.ndarray, values: pd.Series, target: dict[str, Any], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge regression from features to a target, its penalty chosen by inner folds.

    Numbers whose range is positive are regressed as logarithms, as `FMRIMAEModel.read_out` reads
    them. Classes are regressed on +1 and -1, each class weighing the same.

    Parameters
    ----------
    features : float array, shape (subjects, features)
    values : Series, (subjects,)
        NaN where unknown; those subjects are left out.
    target : dict
        With `kind`, and `minimum` or `classes`.
    seed : int
        Of the inner folds.

    Returns
    -------
    weight : float32 tensor, shape (outputs, features)
    bias : float32 tensor, shape (outputs,)
    """
    known = values.notna().to_numpy()
    features = features[known].astype(np.float64)
    if target["kind"] == "number":
        wanted = values[known].to_numpy(float)[:, None]
        wanted = np.log(wanted) if target["minimum"] > 0 else wanted
        shares = np.ones(len(wanted))
    else:
        labels = values[known].astype(str).to_numpy()
        member = labels[:, None] == np.array(target["classes"])[None]
        wanted = np.where(member, 1.0, -1.0)
        shares = (member / member.sum(0).clip(min=1)).sum(1)
    shares = shares / shares.mean()
    centre = np.average(features, axis=0, weights=shares)
    scale = features.std(0)
    scale[scale < 1e-8] = np.inf  # a feature that never moves gets no weight
    rows = (features - centre) / scale
    kernel = rows @ rows.T / rows.shape[1]

    def solve(train: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
        """Weights of the training rows, and the mean that they start from."""
        mean = np.average(wanted[train], axis=0, weights=shares[train])
        gram = kernel[np.ix_(train, train)] + penalty * np.diag(1.0 / shares[train])
        return np.linalg.solve(gram, wanted[train] - mean), mean

    errors = np.zeros(len(PENALTIES))
    folds = KFold(min(INNER_FOLDS, len(rows)), shuffle=True, random_state=seed)
    for train, held_out in folds.split(rows):
        for index, penalty in enumerate(PENALTIES):
            dual, mean = solve(train, penalty)
            found = kernel[np.ix_(held_out, train)] @ dual + mean
            errors[index] += (np.square(found - wanted[held_out]).mean(1) * shares[held_out]).sum()
    dual, mean = solve(np.arange(len(rows)), float(PENALTIES[errors.argmin()]))
    weight = (dual.T @ rows / rows.shape[1]) / scale
    bias = mean - weight @ centre
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def head_rows(
    found: torch.Tensor,
    target: dict[str, Any],
    subject_ids: Sequence[str],
    people: pd.DataFrame,
    **facts: Any,
) -> pd.DataFrame:
    """What a head said as rows of a file of predictions; `facts` are its system, fold and part."""
    values = found.detach().cpu().double().numpy()
    table = pd.DataFrame({"subject_id": list(subject_ids)})
    table["y"] = [people[target["name"]].get(subject) for subject in subject_ids]
    if target["kind"] == "number":
        table["y_hat"], table["score"] = values, np.nan
    else:
        classes = np.array(target["classes"])
        last = int(np.argsort(classes)[-1])
        others = np.delete(values, last, axis=1).max(1)
        table["y_hat"], table["score"] = classes[values.argmax(1)], values[:, last] - others
    table["target"] = target["name"]
    table["site"] = [people["site"].get(subject) for subject in subject_ids]
    for name, value in facts.items():
        table[name] = value
    columns = ["subject_id", "y", "y_hat", "system", "target", "fold", "part", "score", "site"]
    return table[table["y"].notna()][columns]
