"""Baselines and controls for clinical variables, on the very fold the model was trained on.

Each writes a file of predictions, so that it is scored by the code that scores the model. They
are fitted on train + validation together: the model uses its validation part to choose when to
stop, the baselines choose their penalty by inner folds, so both have seen the same subjects. For
that reason no baseline predicts the validation part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.svm import SVC

from .connectivity import connectivity_features, standardised
from .errors import EvaluationError
from .predictions import write_predictions
from .scores import area_under_curve

if TYPE_CHECKING:
    from cortexicon.cohorts import Cohort

MEDIAN = "cohort median"
MAJORITY = "majority class"
SITE_MEAN = "site mean"
ACQUISITION = "scan length + TR + site"
MOTION = "motion"
KERNEL_RIDGE = "kernel ridge on connectivity"
SVM = "SVM on connectivity"
PERMUTED = "permuted labels (control)"
# What each row of the table is, for readers who do not know the field.
DESCRIPTIONS = {
    MEDIAN: "the training subjects' median, the same answer for everybody",
    MAJORITY: "the commonest class of training, the same answer for everybody",
    SITE_MEAN: "the training mean of the subject's site; the cohort median at an unseen site",
    ACQUISITION: "linear model of the acquisition alone: no brain signal",
    MOTION: "linear model of mean head motion alone",
    KERNEL_RIDGE: "kernel ridge on the Fisher-z correlation matrix of the raw series",
    SVM: "linear SVM on the Fisher-z correlation matrix of the raw series",
    PERMUTED: "the connectivity baseline trained on labels shuffled among all training subjects",
}
MOTION_COLUMNS = ("func_mean_fd", "mean_fd", "framewise_displacement")
PENALTIES = np.logspace(-3, 3, 13)
SVM_PENALTIES = (0.01, 0.1, 1.0, 10.0)
INNER_FOLDS = 5
#: Draws of the permuted labels.
PERMUTATIONS = 20
PREDICTED_PARTS = ("test", "test_sites")


def run_baselines(
    cohort: Cohort,
    split_fold: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    out_folder: str | Path,
    fold: int = 0,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> list[Path]:
    """Fit every baseline on one fold and write one file of predictions per system and target.

    Parameters
    ----------
    cohort : Cohort
    split_fold : mapping
        Part name -> subject ids: train, test, and where they exist validation and test_sites.
    targets : sequence of str
        Columns of `cohort.participants`; numeric columns are regressed, others classified.
        Subjects whose value is missing are left out.
    out_folder : path
    fold : int
        Number of the fold, written into the files and their names.
    seed : int
    permutations : int
        How often the permuted labels are drawn. They are dealt out among all training subjects, not
        within sites: within them they would still say what a site's people are like, and the
        control would find the site. One draw says little, since what it finds by chance it
        finds for all test subjects alike, and their number does not average that out.

    Returns
    -------
    list of Path
        `baseline_TARGET_SYSTEM_foldN.csv`, all under `out_folder`.

    Raises
    ------
    EvaluationError
        If a target is no column, or too few training subjects have it.
    """
    fitted, tested, _ = fold_subjects(split_fold)
    features = standardised(
        connectivity_features(cohort, fitted), connectivity_features(cohort, tested)
    )
    train_kernel, test_kernel = (gram(part, features[0]) for part in features)
    paths: list[Path] = []
    for rows in rows_of_targets(cohort, split_fold, targets):
        kernels = rows.kernels(train_kernel, test_kernel)
        predict = _regressions if rows.numeric else _classifications
        found = predict(
            rows.train, rows.test, rows.target, kernels, np.random.default_rng(seed), permutations
        )
        for system, (y_hat, score) in found.items():
            paths.append(write_baseline(out_folder, rows, system, fold, y_hat, score))
    return paths


class TargetRows(NamedTuple):
    """Who of a fold has a value of one target.

    Attributes
    ----------
    target : str
    numeric : bool
        Regressed if so, else classified.
    train, test : DataFrame
        Participants with a value; `train` holds train and validation.
    parts : list of str
        Part of each test row.
    in_train, in_test : bool arrays
        Which of all the fold's subjects they are.
    """

    target: str
    numeric: bool
    train: pd.DataFrame
    test: pd.DataFrame
    parts: list[str]
    in_train: np.ndarray
    in_test: np.ndarray

    def kernels(self, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of kernels over all the fold's subjects, the parts with a value."""
        return (
            train[np.ix_(self.in_train, self.in_train)],
            test[np.ix_(self.in_test, self.in_train)],
        )


def fold_subjects(split_fold: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str], list]:
    """Subjects that a baseline is fitted on, those that it is tested on, and the parts of these."""
    fitted = [*split_fold["train"], *split_fold.get("validation", ())]
    tested = [name for part in PREDICTED_PARTS for name in split_fold.get(part, ())]
    parts = [part for part in PREDICTED_PARTS for _ in split_fold.get(part, ())]
    return fitted, tested, parts


def rows_of_targets(
    cohort: Cohort, split_fold: Mapping[str, Sequence[str]], targets: Sequence[str]
) -> Iterator[TargetRows]:
    """The training and test rows of every target of a fold.

    Raises
    ------
    EvaluationError
        If a target is no column, or too few training subjects have it.
    """
    participants = cohort.participants
    absent = [target for target in targets if target not in participants]
    if absent:
        raise EvaluationError(
            f"Targets must be columns of the participants table; {', '.join(absent)} is not among "
            f"{', '.join(map(str, participants.columns))}."
        )
    fitted, tested, parts = fold_subjects(split_fold)
    for target in targets:
        column = participants[target]
        has_train = column.loc[fitted].notna().to_numpy()
        has_test = column.loc[tested].notna().to_numpy()
        if has_train.sum() < 2 * INNER_FOLDS or not has_test.any():
            raise EvaluationError(
                f"Target '{target}': {int(has_train.sum())} training and {int(has_test.sum())} "
                f"test subjects have a value; expected at least {2 * INNER_FOLDS} and 1."
            )
        yield TargetRows(
            target,
            is_numeric_target(column),
            participants.loc[np.array(fitted)[has_train]],
            participants.loc[np.array(tested)[has_test]],
            np.array(parts)[has_test].tolist(),
            has_train,
            has_test,
        )


def write_baseline(
    out_folder: str | Path,
    rows: TargetRows,
    system: str,
    fold: int,
    y_hat: np.ndarray,
    score: np.ndarray | None,
) -> Path:
    """Write `baseline_TARGET_SYSTEM_foldN.csv` for the test rows of one target.

    `y_hat` and `score` are (test,), or (draws, test).
    """
    draws = 1 if y_hat.ndim == 1 else len(y_hat)
    name = re.sub(r"[^a-z0-9]+", "-", f"{rows.target} {system}".lower()).strip("-")
    truth = rows.test[rows.target].to_numpy()
    return write_predictions(
        Path(out_folder) / f"baseline_{name}_fold{fold}.csv",
        np.tile(rows.test.index.astype(str), draws),
        np.tile(truth.astype(float) if rows.numeric else truth.astype(str), draws),
        y_hat.ravel(),
        system=system,
        target=rows.target,
        fold=fold,
        part=rows.parts * draws,
        score=None if score is None else score.ravel(),
        site=np.tile(rows.test["site"].astype(str).to_numpy(), draws),
        draw=None if draws == 1 else np.repeat(np.arange(draws), len(rows.test)),
    )


def is_numeric_target(column: pd.Series) -> bool:
    """Whether a column is a number to regress; strings, categories and booleans are classes."""
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


_Predictions = dict[str, tuple[np.ndarray, np.ndarray | None]]


def _regressions(
    train: pd.DataFrame,
    test: pd.DataFrame,
    target: str,
    kernels: tuple[np.ndarray, np.ndarray],
    generator: np.random.Generator,
    permutations: int,
) -> _Predictions:
    y = train[target].to_numpy(float)
    median = float(np.median(y))
    by_site = train.groupby("site", observed=True)[target].mean().astype(float)
    site_mean = test["site"].astype(object).map(by_site).astype(float).fillna(median)
    found: _Predictions = {
        MEDIAN: (np.full(len(test), median), None),
        SITE_MEAN: (site_mean.to_numpy(), None),
    }
    for system, (train_x, test_x) in _table_features(train, test).items():
        forward, backward = _log_if_positive(y)
        model = RidgeCV(alphas=PENALTIES * len(y)).fit(train_x, forward(y))
        found[system] = backward(model.predict(test_x)), None
    found[KERNEL_RIDGE] = kernel_ridge(kernels[0], y, kernels[1], generator), None
    drawn = [
        kernel_ridge(kernels[0], generator.permutation(y), kernels[1], generator)
        for _ in range(permutations)
    ]
    found[PERMUTED] = np.stack(drawn), None
    return found


def _classifications(
    train: pd.DataFrame,
    test: pd.DataFrame,
    target: str,
    kernels: tuple[np.ndarray, np.ndarray],
    generator: np.random.Generator,
    permutations: int,
) -> _Predictions:
    y = train[target].astype(str).to_numpy()
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) != 2 or counts.min() < INNER_FOLDS:
        raise EvaluationError(
            f"Target '{target}': expected two classes with at least {INNER_FOLDS} training "
            f"subjects each; found {dict(zip(classes.tolist(), counts.tolist(), strict=True))}."
        )
    majority = np.full(len(test), classes[counts.argmax()])
    found: _Predictions = {MAJORITY: (majority, np.zeros(len(test)))}
    for system, (train_x, test_x) in _table_features(train, test).items():
        model = LogisticRegressionCV(
            Cs=list(PENALTIES[::2]),
            cv=INNER_FOLDS,
            class_weight="balanced",
            scoring="roc_auc",
            max_iter=500,
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
        ).fit(train_x, y)
        found[system] = model.predict(test_x), model.decision_function(test_x)
    found[SVM] = support_vectors(kernels[0], y, kernels[1], generator)
    drawn = [
        support_vectors(kernels[0], generator.permutation(y), kernels[1], generator)
        for _ in range(permutations)
    ]
    y_hat, score = (np.stack(part) for part in zip(*drawn, strict=True))
    found[PERMUTED] = y_hat, score
    return found


def _table_features(
    train: pd.DataFrame, test: pd.DataFrame
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Standardised features of acquisition and of motion; a site not seen in training has none."""

    def scaled(columns: Sequence[pd.Series], others: Sequence[pd.Series]) -> list[np.ndarray]:
        return standardised(
            np.column_stack([c.to_numpy(float) for c in columns]),
            np.column_stack([c.to_numpy(float) for c in others]),
        )

    sites = sorted(train["site"].astype(str).unique())
    duration = [rows["n_timepoints"] * rows["tr"] for rows in (train, test)]
    numbers = scaled(
        [train["n_timepoints"], train["tr"], duration[0]],
        [test["n_timepoints"], test["tr"], duration[1]],
    )
    found = {
        ACQUISITION: tuple(
            np.column_stack(
                [part, *(rows["site"].astype(str).to_numpy() == site for site in sites)]
            )
            for part, rows in zip(numbers, (train, test), strict=True)
        )
    }
    motion = next((name for name in MOTION_COLUMNS if name in train), None)
    if motion is not None and train[motion].notna().any():
        logs = [np.log(rows[motion].astype(float).clip(lower=1e-3)) for rows in (train, test)]
        found[MOTION] = tuple(scaled([train[motion], logs[0]], [test[motion], logs[1]]))
    return found  # type: ignore[return-value]


def _log_if_positive(y: np.ndarray) -> tuple:
    """Age and the like are learned as logarithms: an error of a year means more in a child."""
    return (np.log, np.exp) if (y > 0).all() else (np.asarray, np.asarray)


def gram(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Linear kernel, scaled so that its diagonal is about 1; float64 (rows, columns)."""
    return (rows @ columns.T).astype(np.float64) / rows.shape[1]


def kernel_ridge(
    train_kernel: np.ndarray,
    y: np.ndarray,
    test_kernel: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Kernel ridge on log(y) where y is positive; the penalty with the least MAE of inner folds.

    Parameters
    ----------
    train_kernel : float64, (train, train)
    y : float, (train,)
    test_kernel : float64, (test, train)
    generator : numpy Generator
        Draws the inner folds.

    Returns
    -------
    float64, (test,)
    """
    forward, backward = _log_if_positive(y)
    lowest, highest = forward(y).min(), forward(y).max()

    def solve(kernel: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Predictions for all penalties, (penalties, queries)."""
        eigenvalues, vectors = np.linalg.eigh(kernel)
        mean = values.mean()
        rotated = vectors.T @ (values - mean)
        shrunk = rotated / (eigenvalues + PENALTIES[:, None])  # (penalties, train)
        # No extrapolation beyond the ages seen: exp would turn it into nonsense.
        return backward(np.clip(mean + shrunk @ (queries @ vectors).T, lowest, highest))

    error = np.zeros(len(PENALTIES))
    folds = KFold(INNER_FOLDS, shuffle=True, random_state=int(generator.integers(2**31)))
    for inner, held_out in folds.split(y):
        predicted = solve(
            train_kernel[np.ix_(inner, inner)],
            forward(y[inner]),
            train_kernel[np.ix_(held_out, inner)],
        )
        error += np.abs(predicted - y[held_out]).sum(axis=1)
    return solve(train_kernel, forward(y), test_kernel)[error.argmin()]


def support_vectors(
    train_kernel: np.ndarray,
    y: np.ndarray,
    test_kernel: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Linear SVM with balanced classes; the penalty with the highest AUC of inner folds.

    Returns
    -------
    y_hat : array of labels, (test,)
    score : float64, (test,)
        Distance from the boundary, positive towards the class that sorts last.
    """
    last = np.unique(y)[-1]
    scores = np.zeros((len(SVM_PENALTIES), len(y)))
    folds = StratifiedKFold(INNER_FOLDS, shuffle=True, random_state=int(generator.integers(2**31)))
    for inner, held_out in folds.split(y, y):
        for row, penalty in enumerate(SVM_PENALTIES):
            model = SVC(C=penalty, kernel="precomputed", class_weight="balanced")
            model.fit(train_kernel[np.ix_(inner, inner)], y[inner])
            scores[row, held_out] = model.decision_function(train_kernel[np.ix_(held_out, inner)])
    best = int(np.argmax([area_under_curve(y == last, row) for row in scores]))
    model = SVC(C=SVM_PENALTIES[best], kernel="precomputed", class_weight="balanced")
    model.fit(train_kernel, y)
    return model.predict(test_kernel), model.decision_function(test_kernel)
