"""More ways from a scan to kernel ridge and SVM: tangent space, harmonised sites, plain tokens.

The readers are those of `baselines.py`; only the features differ. Everything that is fitted is
fitted on the fold's training subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .baselines import (
    TargetRows,
    fold_subjects,
    gram,
    kernel_ridge,
    rows_of_targets,
    support_vectors,
    write_baseline,
)
from .connectivity import connectivity_features, standardised
from .connectome import plain_system, tokens_of
from .errors import EvaluationError
from .harmonisation import SiteHarmonisation, training_covariates
from .patch_kmeans import k_means, nearest_centre, to_patches, training_patches
from .scores import fisher_z

if TYPE_CHECKING:
    from cortexicon.cohorts import Cohort

CONNECTOME_CODE = "PCA 192 + k-means 4096, triples"
#: The features a system can read, and how a table names them.
FEATURES = {
    "correlation": "connectivity",
    "tangent": "tangent-space connectivity",
    "connectivity_tokens": f"{tokens_of(CONNECTOME_CODE)} plain connectivity tokens",
    "series_tokens": "plain series tokens",
}
# The plain tokenizer of series: spatial PCA 32 + k-means on patches of 40 s, 128 tokens per 160 s.
WINDOW, PATCH, COMPONENTS, CENTRES, PATCHES, ROUNDS = 80, 20, 32, 1024, 150_000, 5


def system_name(numeric: bool, features: str, harmonised: bool, further: bool = False) -> str:
    """Name of the row, `kernel ridge on ...` for numbers and `SVM on ...` for classes."""
    reader = "kernel ridge" if numeric else "SVM"
    more = ", further scans" if further else ""
    return f"{reader} on {FEATURES[features]}{', sites harmonised' if harmonised else ''}{more}"


def run_connectivity(
    cohort: Cohort,
    split_fold: Mapping[str, Sequence[str]],
    targets: Sequence[str],
    out_folder: str | Path,
    features: str = "correlation",
    harmonised: Sequence[bool] = (False,),
    fold: int = 0,
    seed: int = 0,
    further: Sequence[str] = (),
) -> list[Path]:
    """Fit kernel ridge (numbers) and SVM (classes) on one kind of features of one fold.

    Parameters
    ----------
    cohort, split_fold, targets, out_folder, fold, seed
        As in `run_baselines`.
    features : str
        correlation, tangent, connectivity_tokens, or series_tokens.
    harmonised : sequence of bool
        A system for each: True takes the sites' own mean and variance off first
        (`SiteHarmonisation`, with the targets of the training subjects as covariates).
    further : sequence of str
        Subjects of no part, such as those whom quality control kept out, to fit on as well.

    Returns
    -------
    list of Path
        One file of predictions per system and target.

    Raises
    ------
    EvaluationError
        Unknown features, or from `rows_of_targets`.
    """
    if features not in FEATURES:
        raise EvaluationError(
            f"expected features of {', '.join(FEATURES)}, found {features!r}. Choose one of them."
        )
    split_fold = {**split_fold, "train": [*split_fold["train"], *further]}
    fitted, tested, _ = fold_subjects(split_fold)
    rows = list(rows_of_targets(cohort, split_fold, targets))
    raw = {
        "correlation": _correlation,
        "tangent": _tangent,
        "connectivity_tokens": _connectivity_tokens,
        "series_tokens": _series_tokens,
    }[features](cohort, fitted, tested, seed)
    paths = []
    for removed in harmonised:
        train, test = raw
        if removed:
            people = cohort.participants
            sites = [people.loc[names, "site"].astype(str).to_list() for names in (fitted, tested)]
            covariates = training_covariates(people.loc[fitted], targets)
            combat = SiteHarmonisation(train, sites[0], covariates)
            train, test = combat.apply(train, sites[0]), combat.apply(test, sites[1])
        train, test = standardised(train, test)
        kernels = gram(train, train), gram(test, train)
        for mine in rows:
            y_hat, score = _read(mine, kernels, seed)
            name = system_name(mine.numeric, features, removed, bool(further))
            paths.append(write_baseline(out_folder, mine, name, fold, y_hat, score))
    return paths


def _read(
    rows: TargetRows, kernels: tuple[np.ndarray, np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Answers and, for classes, scores of the test subjects."""
    generator = np.random.default_rng(seed)
    train_kernel, test_kernel = rows.kernels(*kernels)
    truth = rows.train[rows.target]
    if rows.numeric:
        return kernel_ridge(train_kernel, truth.to_numpy(float), test_kernel, generator), None
    labels = truth.astype(str).to_numpy()
    if len(np.unique(labels)) != 2:
        raise EvaluationError(
            f"Target '{rows.target}': expected two classes, found {', '.join(np.unique(labels))}."
        )
    return support_vectors(train_kernel, labels, test_kernel, generator)


def _correlation(
    cohort: Cohort, fitted: list[str], tested: list[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    return connectivity_features(cohort, fitted), connectivity_features(cohort, tested)


def _connectivity_tokens(
    cohort: Cohort, fitted: list[str], tested: list[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Connectivity as it comes back from principal components and k-means."""
    train, test = _correlation(cohort, fitted, tested, seed)
    decode = plain_system(train, CONNECTOME_CODE, seed)
    return decode(train), decode(test)


def _scan(cohort: Cohort, subject_id: str) -> np.ndarray:
    """Z-scored series at the scan's own TR; a region without a signal is zero; (time, regions)."""
    values = np.asarray(cohort.series(subject_id).values, np.float64)
    values = np.where(np.isfinite(values).all(axis=0), values, 0.0)
    values = values - values.mean(axis=0)
    spread = values.std(axis=0)
    return np.divide(values, spread, out=np.zeros_like(values), where=spread > 1e-9)


def _tangent(
    cohort: Cohort, fitted: list[str], tested: list[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of each scan's covariance seen from the training scans' geometric mean.

    Varoquaux et al. 2010 (MICCAI), with Ledoit-Wolf covariances. Differs from nilearn in how the
    mean is found (`geometric_mean`), at a quarter of the time.
    """
    from sklearn.covariance import ledoit_wolf

    train = [ledoit_wolf(_scan(cohort, name), assume_centered=True)[0] for name in fitted]
    whitening = _power(geometric_mean(train), -0.5)
    rows = np.triu_indices(len(whitening))
    # Off the diagonal every number stands for two, so that the distance is that of the matrices.
    weight = np.where(rows[0] == rows[1], 1.0, np.sqrt(2.0))

    def seen(covariance: np.ndarray) -> np.ndarray:
        return (_logarithm(whitening @ covariance @ whitening)[rows] * weight).astype(np.float32)

    test = (ledoit_wolf(_scan(cohort, name), assume_centered=True)[0] for name in tested)
    return np.stack([seen(matrix) for matrix in train]), np.stack([seen(matrix) for matrix in test])


def geometric_mean(matrices: Sequence[np.ndarray], steps: int = 2) -> np.ndarray:
    """The symmetric positive definite matrix with the least squared distances to all others.

    Starts from the mean of logarithms, which is near, and takes a few steps of the fixed point.

    Parameters
    ----------
    matrices : sequence of float64, (regions, regions)
    steps : int

    Returns
    -------
    float64, (regions, regions)
    """
    mean = _exponential(np.mean([_logarithm(matrix) for matrix in matrices], axis=0))
    for _ in range(steps):
        root, inverse = _power(mean, 0.5), _power(mean, -0.5)
        logarithms = [_logarithm(inverse @ matrix @ inverse) for matrix in matrices]
        mean = root @ _exponential(np.mean(logarithms, axis=0)) @ root
    return mean


def _spectral(matrix: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A function of a symmetric matrix through its eigenvalues."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * function(values)) @ vectors.T


def _logarithm(matrix: np.ndarray) -> np.ndarray:
    return _spectral(matrix, lambda values: np.log(np.maximum(values, 1e-12)))


def _exponential(matrix: np.ndarray) -> np.ndarray:
    return _spectral(matrix, np.exp)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    return _spectral(matrix, lambda values: np.maximum(values, 1e-12) ** exponent)


def _series_tokens(
    cohort: Cohort, fitted: list[str], tested: list[str], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Connectivity of the series as they come back from spatial PCA and k-means on patches."""
    from cortexicon.tokenization import AVQFeatureExtractor

    extractor = AVQFeatureExtractor(window_length=WINDOW, patch_length=PATCH)

    def windows(name: str) -> np.ndarray:
        scan = cohort.series(name)
        values, _ = extractor.prepare_scan(scan.values, scan.tr, where=f"{name}: ")
        count = max(1, len(values) // WINDOW)
        if len(values) < WINDOW:  # too short for one: repeated, so that nobody is left out
            values = np.resize(values, (WINDOW, values.shape[1]))
        return values[: count * WINDOW].reshape(count, WINDOW, -1).astype(np.float32)

    train = [(name, windows(name)) for name in fitted]
    regions = train[0][1].shape[2]
    covariance = np.zeros((regions, regions))
    for _, values in train:
        flat = values.reshape(-1, regions)
        covariance += flat.T @ flat
    variances, axes = np.linalg.eigh(covariance)
    kept = min(COMPONENTS, regions)
    basis = axes[:, ::-1][:, :kept].astype(np.float32)
    spread = np.sqrt(np.maximum(variances[::-1][:kept], 0.0))
    scale = np.maximum(spread / spread[0], 1e-4).astype(np.float32)
    generator = np.random.default_rng(seed)
    rows = training_patches(train, basis / scale, PATCH, PATCHES, generator)
    centres = k_means(rows, min(CENTRES, len(rows) // 4), ROUNDS, generator)

    def decoded(values: np.ndarray) -> np.ndarray:
        index, sign = nearest_centre(to_patches(values, basis / scale, PATCH), centres)
        patches = (sign[:, None] * centres[index]).reshape(len(values), -1, kept, PATCH)
        courses = patches.transpose(0, 1, 3, 2).reshape(-1, kept)
        return fisher_z(courses @ (basis * scale).T)

    return (
        np.stack([decoded(values) for _, values in train]),
        np.stack([decoded(windows(name)) for name in tested]),
    )
