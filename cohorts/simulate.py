"""A simulated cohort: a stochastic whole-brain model whose connections carry age, sex, diagnosis.

Regions are coupled linearly, driven by white noise, seen through a haemodynamic response and a
scanner. What each person's age, sex and diagnosis change is listed in `EFFECTS`, and nothing else.

Calibration: 900 subjects, seed 1, five site-stratified folds, kernel ridge with alpha by inner
folds (``pytest -s -m slow tests/cohorts/test_calibration.py``). SD of age 17.9 years; the median of
the cohort is off by 15.50 years.

    age from                                   r      MAE (years)
    Fisher-z connectivity, whole scan          0.747   9.60
    its means between networks, whole scan     0.752   9.57
    Fisher-z connectivity, first 160 s         0.710  10.31
    its means between networks, first 160 s    0.721  10.17
    variance of every region                  -0.06
    mean power spectrum                       -0.08
    site                                      -0.11
    sex, AUC from connectivity                 0.827
    diagnosis, AUC from connectivity           0.802

Connectivity reaches 0.755, 0.729, 0.747, 0.737 for 400 subjects (seed 0) and 900 (seeds 0, 1, 2).

The traits explain 66 % (age) of the variance of the connections they act on, so r = 0.81 is the
most that any reader can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from .build import Cohort, build_cohort
from .series import CohortError
from .template import network_modes, structural_coupling, template_regions

#: What acts where: (network, network, sign). Every list is bipartite: its networks fall into two
#: groups with couplings only between them. Then an effect and its opposite give the same variances
#: and spectra at every order, and only the signs of connections tell them apart. No two couplings
#: of another trait close a triangle with one of age, for the same reason.
EFFECTS: dict[str, tuple[tuple[str, str, int], ...]] = {
    "age": (
        ("Default", "Frontoparietal", +1),
        ("Default", "Cinguloopercular", -1),
        ("DorsalAttention", "Frontoparietal", -1),
        ("DorsalAttention", "Visual", +1),
        ("DorsalAttention", "Cinguloopercular", +1),
        ("DorsalAttention", "Auditory", -1),
        ("Somatomotor", "Frontoparietal", -1),
        ("Somatomotor", "Cinguloopercular", +1),
    ),
    "sex": (  # + in women
        ("Auditory", "Somatomotor", +1),
        ("Somatomotor", "Default", -1),
        ("Default", "Visual", +1),
        ("Visual", "Auditory", -1),
    ),
    "diagnosis": (  # + in patients
        ("Auditory", "Frontoparietal", +1),
        ("Frontoparietal", "Visual", -1),
        ("Visual", "Cinguloopercular", +1),
        ("Cinguloopercular", "Auditory", -1),
    ),
}
#: Change of each listed coupling per SD of the person's trait (neural coupling, dimensionless).
STRENGTH = {"age": 0.042, "sex": 0.035, "diagnosis": 0.035}
#: Share of the variance of the trait that the phenotype explains. The rest is the individual:
#: the same connections vary between people of one age, which bounds what any reader can reach.
EXPLAINED = {"age": 0.66, "sex": 0.42, "diagnosis": 0.42}
#: SD of each coupling between two networks, or halves of one, that has nothing to do with the rest.
INDIVIDUAL_SD = 0.01

AGE_RANGE_YEARS = (18.0, 80.0)
STEP_S = 0.1  # of the neural model
NEURAL_TIME_CONSTANT_S = 0.6
HRF_LENGTH_S = 32.0
CHUNK = 32  # subjects computed together; part of the arithmetic, so not an argument


class Site(NamedTuple):
    """One scanner: name, TR in s, noise SD relative to the signal's, gain."""

    name: str
    tr: float
    noise: float
    gain: float


SITES = (
    Site("ALPHA", 2.0, 0.28, 1.0),
    Site("BRAVO", 2.0, 0.38, 1.3),
    Site("CARMEL", 2.5, 0.25, 0.8),
    Site("DELTA", 1.5, 0.42, 1.1),
    Site("ESTER", 2.2, 0.32, 0.9),
    Site("FJORD", 1.8, 0.35, 1.2),
)


def haemodynamic_response() -> np.ndarray:
    """Double-gamma response, (lags,), sampled every 0.1 s, with unit sum of squares.

    Peak at 5 s, undershoot at 15 s with 0.35 of the peak's area. The usual canonical response has a
    smaller undershoot; this one leaves more power between 0.02 and 0.1 Hz.
    """
    t = np.arange(0.0, HRF_LENGTH_S, STEP_S)
    with np.errstate(divide="ignore"):
        peak = np.exp(5 * np.log(t / 5) - (t - 5))
        undershoot = np.exp(15 * np.log(t / 15) - (t - 15))
    response = peak - 0.35 * undershoot * (peak.sum() / undershoot.sum())
    return response / np.sqrt((response**2).sum())


@dataclass
class _Model:
    """What all subjects share."""

    regions: pd.DataFrame
    base: np.ndarray  # (regions, regions)
    modes: np.ndarray  # (regions, networks)
    halves: np.ndarray  # (regions, network halves)
    patterns: dict[str, np.ndarray]  # trait -> (networks, networks)
    response: np.ndarray  # (lags,)
    global_weights: np.ndarray  # (regions,)
    duration: float


def _build_model(num_regions: int, duration: float) -> _Model:
    regions = template_regions(num_regions)
    networks = list(dict.fromkeys(regions["network"]))
    patterns = {}
    for trait, edges in EFFECTS.items():
        pattern = np.zeros((len(networks), len(networks)))
        for one, other, sign in edges:
            i, j = networks.index(one), networks.index(other)
            pattern[i, j] = pattern[j, i] = sign
        patterns[trait] = pattern
    weights = 1.0 + 0.3 * np.sin(np.arange(num_regions) * 2.4)
    return _Model(
        regions,
        structural_coupling(regions),
        network_modes(regions["network"]),
        network_modes(regions["network"] + regions["hemisphere"]),
        patterns,
        haemodynamic_response(),
        weights,
        duration,
    )


def simulate_cohort(
    num_subjects: int = 1000,
    num_regions: int = 100,
    seed: int = 0,
    effect: float = 1.0,
    duration: float = 330.0,
    sites: Sequence[Site] = SITES,
    progress: bool = True,
) -> Cohort:
    """Simulate a cohort whose connections carry age, sex and diagnosis.

    Parameters
    ----------
    num_subjects : int
        Participants, spread evenly over the sites.
    num_regions : int
        Regions, 28 to 193, from seven networks.
    seed : int
        The same seed gives the same cohort, bit for bit on one machine.
    effect : float
        Factor on the share that phenotypes have in the traits: 1 as calibrated, 0 none at all. The
        traits' variance, and so the variability between people, is the same at every value.
    duration : float
        Length of each scan in s; each site samples it at its own TR.
    sites : sequence of Site
        Name, TR in s (a multiple of 0.1 s), noise, gain of each scanner.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Cohort
        Phenotypes age (years), sex (F/M), diagnosis (patient/control), mean_fd (mm).

    Raises
    ------
    CohortError
        Numbers out of range.
    """
    _check_arguments(num_subjects, effect, duration, sites)
    model = _build_model(num_regions, duration)
    root = np.random.SeedSequence(seed)
    design, *streams = root.spawn(num_subjects + 1)
    people, site_of = _draw_people(num_subjects, sites, np.random.default_rng(design))
    scans: list[np.ndarray] = [np.empty(0)] * num_subjects
    with tqdm(total=num_subjects, desc="simulate", unit="scan", disable=not progress) as bar:
        for index, site in enumerate(sites):
            members = np.flatnonzero(site_of == index)
            for start in range(0, len(members), CHUNK):
                chunk = members[start : start + CHUNK]
                rngs = [np.random.default_rng(streams[row]) for row in chunk]
                for row, scan in zip(
                    chunk,
                    _simulate_chunk(model, people.iloc[chunk], site, effect, rngs),
                    strict=True,
                ):
                    scans[row] = scan
                bar.update(len(chunk))
    people["n_timepoints"] = [len(scan) for scan in scans]
    return build_cohort(np.concatenate(scans), people, model.regions, f"simulated{num_regions}")


def _check_arguments(
    num_subjects: int, effect: float, duration: float, sites: Sequence[Site]
) -> None:
    if num_subjects < 1 or effect < 0 or effect > 1.2 or duration < 60 or not sites:
        raise CohortError(
            "expected at least one subject and one site, an effect of 0 to 1.2 and a duration of "
            f"at least 60 s, found {num_subjects} subjects, {len(sites)} sites, effect {effect:g}, "
            f"{duration:g} s."
        )
    for site in sites:
        steps = site.tr / STEP_S
        if steps < 1 or abs(steps - round(steps)) > 1e-6:
            raise CohortError(
                f"site {site.name}: expected a TR that is a multiple of {STEP_S} s, "
                f"found {site.tr}."
            )


def _draw_people(
    num_subjects: int, sites: Sequence[Site], rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray]:
    """Participants table, and the site number of each row.

    Within every site ages cover the range evenly and both sexes and diagnoses are as frequent as
    possible, in random order: no site mean says anything about a phenotype.
    """
    site_of = rng.permutation(np.arange(num_subjects) % len(sites))
    age, sex = np.empty(num_subjects), np.empty(num_subjects, int)
    diagnosis = np.empty(num_subjects, int)
    for index in range(len(sites)):
        members = np.flatnonzero(site_of == index)
        count, (low, high) = len(members), AGE_RANGE_YEARS
        steps = (np.arange(count) + rng.random(count)) / max(count, 1)
        age[members] = rng.permutation(low + (high - low) * steps)
        sex[members] = rng.permutation((np.arange(count) + rng.integers(2)) % 2)
        diagnosis[members] = rng.permutation((np.arange(count) + rng.integers(2)) % 2)
    people = pd.DataFrame(
        {
            "subject_id": [f"sim-{row:05d}" for row in range(num_subjects)],
            "session": "",
            "site": [sites[index].name for index in site_of],
            "tr": [sites[index].tr for index in site_of],
            "age": age.round(2),
            "sex": np.where(sex == 1, "F", "M"),
            "diagnosis": np.where(diagnosis == 1, "patient", "control"),
            "mean_fd": np.exp(rng.normal(np.log(0.15), 0.4, num_subjects)).round(4),
        }
    )
    return people, site_of


def _draw_coupling(
    model: _Model, people: pd.DataFrame, effect: float, rngs: list[np.random.Generator]
) -> np.ndarray:
    """Coupling of each subject, (subjects, regions, regions)."""
    low, high = AGE_RANGE_YEARS
    score = {
        "age": (people["age"].to_numpy() - (low + high) / 2) / ((high - low) / np.sqrt(12)),
        "sex": np.where(people["sex"] == "F", 1.0, -1.0),
        "diagnosis": np.where(people["diagnosis"] == "patient", 1.0, -1.0),
    }
    groups, halves = model.modes.shape[1], model.halves.shape[1]
    change = np.zeros((len(rngs), groups, groups))
    for trait, pattern in model.patterns.items():
        share = EXPLAINED[trait] * effect**2
        own = np.array([rng.standard_normal() for rng in rngs])
        level = np.sqrt(share) * score[trait] + np.sqrt(1 - share) * own
        level = 3.5 * np.tanh(level / 3.5)  # no one is further out than the model stays stable
        change += STRENGTH[trait] * level[:, None, None] * pattern
    private = np.stack([rng.standard_normal((halves, halves)) for rng in rngs]) / np.sqrt(2)
    private = INDIVIDUAL_SD * (private + private.transpose(0, 2, 1))
    coupling = model.base + model.modes @ change @ model.modes.T
    return coupling + model.halves @ private @ model.halves.T


def _simulate_chunk(
    model: _Model,
    people: pd.DataFrame,
    site: Site,
    effect: float,
    rngs: list[np.random.Generator],
) -> np.ndarray:
    """Scans of some subjects of one site, (subjects, time, regions) float32.

    dx = (C - 1) x dt / tau + dW is solved in the eigenvectors of each subject's symmetric C, where
    it falls apart into independent first-order recursions driven by white noise; rotated back it
    is the same process, and its BOLD variance is known in closed form.
    """
    strength, vectors = np.linalg.eigh(_draw_coupling(model, people, effect, rngs))
    decay = 1 - STEP_S / NEURAL_TIME_CONSTANT_S * (1 - strength.clip(max=0.95))  # (subjects, modes)
    stride, samples = round(site.tr / STEP_S), int(model.duration / site.tr + 1e-6)
    lags, regions = len(model.response), len(model.regions)
    burn_in = 100
    steps = burn_in + lags + (samples - 1) * stride
    neural = np.empty((steps, len(rngs), regions), np.float32)
    for column, rng in enumerate(rngs):
        neural[:, column] = rng.standard_normal((steps, regions), np.float32)
    factor = decay.astype(np.float32)
    neural[0] /= np.sqrt(1 - factor**2)  # starts in its stationary state
    for step in range(1, steps):
        neural[step] += factor * neural[step - 1]
    window = np.zeros((samples, steps), np.float32)  # response, sampled at the TR
    for sample in range(samples):
        end = burn_in + lags + sample * stride
        window[sample, end - lags : end] = model.response[::-1]
    bold = window @ neural.reshape(steps, -1)
    bold = bold.reshape(samples, len(rngs), regions).transpose(1, 0, 2)
    # Homeostasis: every region of every person has the same BOLD variance, whatever its inputs.
    spectrum = np.abs(np.fft.rfft(model.response, 4096)) ** 2  # (frequencies,)
    phase = np.exp(-2j * np.pi * np.arange(len(spectrum)) / 4096)
    power = np.einsum(
        "f,smf->sm",
        np.r_[1, np.full(len(spectrum) - 2, 2), 1] * spectrum / 4096,
        1 / np.abs(1 - decay[:, :, None] * phase) ** 2,
    )  # (subjects, modes)
    variance = np.einsum("srm,sm->sr", vectors**2, power)
    rotation = (vectors / np.sqrt(variance)[:, :, None]).transpose(0, 2, 1).astype(np.float32)
    scans = bold @ rotation  # (subjects, time, regions)
    for row, rng in enumerate(rngs):
        scans[row] += _nuisance(model, samples, site, people["mean_fd"].iloc[row], rng)
    return (site.gain * scans).astype(np.float32)


def _nuisance(
    model: _Model, samples: int, site: Site, mean_fd: float, rng: np.random.Generator
) -> np.ndarray:
    """Scanner noise, drift and motion, (time, regions), in SD of the neural BOLD signal."""
    regions = len(model.regions)
    time = np.linspace(0, 1, samples)
    cosines = np.cos(np.pi * time[:, None] * np.arange(1, 4))  # periods above 220 s
    drift = cosines @ (0.15 * rng.standard_normal((3, regions)))
    # Jerks that fade within a few seconds, stronger in people who move more, seen everywhere.
    jerks = rng.exponential(1.0, samples) ** 2 * rng.standard_normal(samples)
    fading = np.exp(-np.arange(8) * site.tr / 4.0)
    motion = np.convolve(jerks, fading / np.sqrt((fading**2).sum()))[:samples] / 5.0
    shared = mean_fd * motion[:, None] * model.global_weights
    return site.noise * rng.standard_normal((samples, regions)) + drift + shared
