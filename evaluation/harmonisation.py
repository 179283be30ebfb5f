"""Removes what is a scanner's own from features, learned on training subjects alone.

ComBat (Johnson, Li & Rabinovic 2007, Biostatistics 8:118): every site has its own mean and variance
of each feature, shrunk towards what its other features say. Differs from the usual code: a site's
effect is estimated beside covariates of the training subjects (age, sex, diagnosis), but applied
without any, since those of a test subject are what is asked for. A site that training has not seen
is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

#: Rounds of the shrinkage; it settles to three digits within ten.
ROUNDS = 15
#: Below this number of training subjects a site has no variance of its own.
FEWEST_FOR_VARIANCE = 5


class SiteHarmonisation:
    """ComBat fitted on training features.

    Parameters
    ----------
    features : float array, (subjects, features)
        NaN where a value is missing; it counts as the feature's mean.
    sites : sequence of str, (subjects,)
    covariates : float array, (subjects, covariates), optional
        What may differ between sites without being their scanners' doing; finite.

    Attributes
    ----------
    sites : list of str
    mean, scale : float64 arrays, (features,)
        Grand mean, and SD once sites and covariates are taken off.
    shift, spread : float64 arrays, (sites, features)
        Of each site, in SD: its mean, and the factor of its own SD.
    expected : float64 array, (sites, features)
        What the covariates of a site's training subjects explain on average, in SD; it stays.
    """

    def __init__(
        self, features: np.ndarray, sites: Sequence[str], covariates: np.ndarray | None = None
    ) -> None:
        self.sites = sorted(set(sites))
        known = np.isfinite(features)
        count = np.maximum(known.sum(axis=0), 1)
        self._fill = np.where(known, features, 0.0).sum(axis=0) / count
        values = np.where(known, features, self._fill).astype(np.float64)
        member = np.array([[name == site for site in self.sites] for name in sites], np.float64)
        design = member
        if covariates is not None:
            design = np.column_stack([member, covariates - covariates.mean(axis=0)])
        weights = np.linalg.lstsq(design, values, rcond=None)[0]
        residual = values - design @ weights
        of_sites, of_covariates = weights[: len(self.sites)], weights[len(self.sites) :]
        self.mean = member.mean(axis=0) @ of_sites
        scale = np.sqrt((residual**2).mean(axis=0))
        varies = scale > 1e-8
        self.scale = np.where(varies, scale, 1.0)
        explained = design[:, len(self.sites) :] @ of_covariates
        standard = (values - explained - self.mean) / self.scale
        shape = (len(self.sites), values.shape[1])
        self.shift, self.spread, self.expected = np.zeros(shape), np.ones(shape), np.zeros(shape)
        for k in range(len(self.sites)):
            mine = member[:, k] > 0
            self.shift[k, varies], self.spread[k, varies] = _shrunk(standard[mine][:, varies])
            self.expected[k] = explained[mine].mean(axis=0) / self.scale

    def apply(self, features: np.ndarray, sites: Sequence[str]) -> np.ndarray:
        """Features without the sites' own mean and variance; float32, NaN stays NaN."""
        known = np.isfinite(features)
        values = np.where(known, features, self._fill).astype(np.float64)
        standard = (values - self.mean) / self.scale
        names = np.asarray(sites, str)
        for k, site in enumerate(self.sites):
            mine = names == site
            # Stretched around what is expected of the site's people, not around everybody's mean.
            deviation = standard[mine] - self.shift[k] - self.expected[k]
            standard[mine] = deviation / self.spread[k] + self.expected[k]
        return np.where(known, standard * self.scale + self.mean, np.nan).astype(np.float32)


def _shrunk(standard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and SD factor of one site's features, shrunk by empirical Bayes; (features,) each.

    Parameters
    ----------
    standard : float64, (subjects of the site, features)
    """
    count = len(standard)
    raw_shift = standard.mean(axis=0)
    prior, prior_variance = raw_shift.mean(), raw_shift.var()
    if count < FEWEST_FOR_VARIANCE:
        weight = count * prior_variance / (count * prior_variance + 1.0)
        return weight * raw_shift + (1 - weight) * prior, np.ones_like(raw_shift)
    raw_variance = standard.var(axis=0, ddof=1)
    mean, variance = raw_variance.mean(), max(raw_variance.var(), 1e-12)
    shape, rate = mean**2 / variance + 2.0, mean**3 / variance + mean  # inverse gamma by moments
    spread, shift = raw_variance, raw_shift
    for _ in range(ROUNDS):
        weight = count * prior_variance / (count * prior_variance + spread)
        shift = weight * raw_shift + (1 - weight) * prior
        squares = (count - 1) * raw_variance + count * (raw_shift - shift) ** 2
        spread = (0.5 * squares + rate) / (0.5 * count + shape - 1.0)
    return shift, np.sqrt(spread)


def training_covariates(participants: pd.DataFrame, targets: Sequence[str]) -> np.ndarray:
    """The targets as numbers: a numeric one as it is, classes as one column each but the first.

    A missing value counts as the mean.

    Returns
    -------
    float64 array, (subjects, columns)
    """
    columns = []
    for target in targets:
        column = participants[target]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            parts = [column.astype(float)]
        else:
            names = sorted(column.dropna().astype(str).unique())
            known = column.notna()
            parts = [(column.astype(str) == name).astype(float).where(known) for name in names[1:]]
        columns += [part.fillna(part.mean()).to_numpy(float) for part in parts]
    if not columns:
        return np.zeros((len(participants), 0))
    return np.column_stack(columns)
