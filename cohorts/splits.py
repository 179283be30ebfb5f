"""Splits by participant, stored as a file with a hash: who may be fitted on, who is judged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .build import Cohort
from .readers import canonical_subject
from .series import CohortError, some

FORMAT_VERSION = 1
PARTS = ("train", "validation", "test", "test_sites")
REQUIRED_PARTS = ("train", "validation", "test")
SCHEMES = ("holdout", "site_stratified", "leave_sites_out", "hash")
#: The repetition time of the sites that the reconstruction score is measured on.
REFERENCE_TR_S = 2.0

Fold = dict[str, list[str]]


@dataclass
class Split:
    """Folds of participants, each fold a dict of parts to subject ids.

    Attributes
    ----------
    scheme : str
        How it was made.
    folds : list of dict of str to list of str
        Parts train, validation, test and, where whole sites are held out, test_sites.
    cohort_hash : str
        Content hash of the cohort it was made for.
    settings : dict
        Arguments that it was made with.
    """

    scheme: str
    folds: list[Fold]
    cohort_hash: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.folds)

    def __iter__(self) -> Iterator[Fold]:
        return iter(self.folds)

    def __getitem__(self, fold: int) -> Fold:
        return self.folds[fold]

    @property
    def hash(self) -> str:
        """SHA-256 over scheme, settings, cohort hash and folds."""
        content = [self.scheme, self.folds, self.cohort_hash, self.settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def validate(self, where: str = "split") -> None:
        """Refuse parts that share a person, unknown parts, and empty ones.

        Raises
        ------
        CohortError
            With the fold, the parts and the subjects.
        """
        if not self.folds:
            raise CohortError(f"{where}: expected at least one fold, found none.")
        for number, fold in enumerate(self.folds):
            here = f"{where}, fold {number}"
            strange = [part for part in fold if part not in PARTS]
            empty = [part for part in REQUIRED_PARTS if not fold.get(part)]
            if strange or empty:
                raise CohortError(
                    f"{here}: expected the parts {', '.join(REQUIRED_PARTS)}, none of them empty, "
                    f"and optionally test_sites; empty: {some(empty) or 'none'}, unknown: "
                    f"{some(strange) or 'none'}. Use more subjects or larger fractions."
                )
            owner: dict[str, tuple[str, str]] = {}
            for part, subjects in fold.items():
                for subject in subjects:
                    first = owner.setdefault(canonical_subject(subject), (part, subject))
                    if first != (part, subject) or subjects.count(subject) > 1:
                        raise CohortError(
                            f"{here}: expected every person in one part, found {first[1]!r} in "
                            f"{first[0]} and {subject!r} in {part}. Make the split again."
                        )

    def save(self, path: str | Path) -> Path:
        """Write the split as JSON, atomically; an existing file is replaced.

        Raises
        ------
        CohortError
            The split is not valid, or the file cannot be written.
        """
        path = Path(path)
        self.validate(str(path))
        content = {
            "format": FORMAT_VERSION,
            "scheme": self.scheme,
            "settings": self.settings,
            "cohort_hash": self.cohort_hash,
            "hash": self.hash,
            "folds": self.folds,
        }
        scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(scratch, path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise CohortError(
                f"{path}: expected to write the split, found: {error}. Check space and permissions."
            ) from error
        return path


def load_split(path: str | Path, cohort: Cohort | None = None) -> Split:
    """Read a split and check it against its own hash and, where given, its cohort.

    Raises
    ------
    CohortError
        File missing or damaged, hash wrong, parts that share a person, another cohort.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text())
        split = Split(
            content["scheme"], content["folds"], content["cohort_hash"], content["settings"]
        )
        version, expected_hash = content["format"], content["hash"]
    except FileNotFoundError:
        raise CohortError(f"{path}: expected a split file, found none. Check the path.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CohortError(
            f"{path}: expected a split written by cortexicon, found damage ({error!r}). "
            "Make the split again."
        ) from error
    if version != FORMAT_VERSION:
        raise CohortError(
            f"{path}: expected split format {FORMAT_VERSION}, found {version}. "
            "Make the split again with this version of cortexicon."
        )
    split.validate(str(path))
    if split.hash != expected_hash:
        raise CohortError(
            f"{path}: expected split hash {expected_hash[:12]}, found {split.hash[:12]}: the file "
            "was changed after it was written. Make the split again."
        )
    if cohort is not None:
        named = {s for fold in split for subjects in fold.values() for s in subjects}
        unknown = sorted(named - set(cohort.subject_ids))
        if unknown:
            raise CohortError(
                f"{path}: expected participants of {cohort.path or 'the cohort'}, found "
                f"{len(unknown)} unknown: {some(unknown)}. Use the split of this cohort."
            )
        if split.cohort_hash != cohort.content_hash:
            raise CohortError(
                f"{path}: expected the split of a cohort with content hash "
                f"{cohort.content_hash[:12]}, found {split.cohort_hash[:12]}. Make the split again."
            )
    return split


def make_split(
    cohort: Cohort,
    scheme: str,
    seed: int = 0,
    num_folds: int = 5,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    test_sites: int | Sequence[str] | None = None,
) -> Split:
    """Split a cohort by participant; scans with `recommended` False are in no part.

    Parameters
    ----------
    scheme : str
        ``holdout``: one fold; test and validation stratified by site, whole sites in test_sites.
        ``site_stratified``: every participant is in test once; each site spread over all folds.
        ``leave_sites_out``: every site is in test once; sites in `num_folds` groups of like size.
        ``hash``: one fold; test = sha256 of `sub_id` (or subject_id), as an integer, divisible by
        6; whole sites whose TR is not 2 s in test_sites, also those of their scans that the hash
        would have put into test.
    num_folds : int
        Folds of the two cross-validation schemes.
    test_fraction : float
        Share of test among the sites not held out (``holdout``).
    validation_fraction : float
        Share of validation, per site, among what is neither test nor test_sites.
    test_sites : int or list of str, optional
        Sites to hold out (``holdout``, ``hash``), by name or number; None: one site where there
        are at least three to choose from, else none.

    Raises
    ------
    CohortError
        Unknown scheme or site, a site with TR 2 s named for ``hash``, impossible numbers.
    """
    if scheme not in SCHEMES:
        raise CohortError(f"expected a split scheme of {', '.join(SCHEMES)}, found {scheme!r}.")
    for name, value in (("test", test_fraction), ("validation", validation_fraction)):
        if not 0 < value < 1:
            raise CohortError(f"expected a {name}_fraction between 0 and 1, found {value}.")
    table = cohort.participants
    if "recommended" in table:
        table = table[table["recommended"].astype(bool)]
    rng = np.random.default_rng(seed)
    settings: dict[str, Any] = {"seed": seed, "validation_fraction": validation_fraction}
    if scheme in ("site_stratified", "leave_sites_out"):
        tests = _test_folds(table, scheme, num_folds, rng)
        settings["num_folds"] = num_folds
        parts = [{"test": test} for test in tests]
    else:
        held = _held_out_sites(table, scheme, test_sites, rng)
        settings["test_sites"] = held
        inside = table[~table["site"].isin(held)]
        if scheme == "hash":
            key = inside["sub_id"] if "sub_id" in inside else inside.index.to_series()
            test = list(inside.index[[_in_hash_test(subject) for subject in key]])
        else:
            settings["test_fraction"] = test_fraction
            test = _draw_per_site(inside, test_fraction, rng)
        parts = [{"test": test}]
        if held:
            parts[0]["test_sites"] = list(table.index[table["site"].isin(held)])
    folds = []
    for part in parts:
        taken = {subject for subjects in part.values() for subject in subjects}
        rest = table[~table.index.isin(taken)]
        validation = _draw_per_site(rest, validation_fraction, rng)
        train = [subject for subject in rest.index if subject not in set(validation)]
        folds.append({"train": train, "validation": validation, **part})
    split = Split(scheme, folds, cohort.content_hash, settings)
    split.validate(f"split {scheme}")
    return split


def _in_hash_test(sub_id: str | int) -> bool:
    """Whether a participant belongs to the fixed test set, the same in every program."""
    return int(hashlib.sha256(str(sub_id).encode()).hexdigest(), 16) % 6 == 0


def _draw_per_site(table: pd.DataFrame, fraction: float, rng: np.random.Generator) -> list[str]:
    """Subjects drawn at random, the same share of every site, rounded over the whole table."""
    shuffled = table.iloc[rng.permutation(len(table))].sort_values("site", kind="stable")
    # Walking through the sites one after the other, every 1/fraction-th subject is drawn.
    position = (np.arange(len(shuffled)) + rng.random()) * fraction
    drawn = set(shuffled.index[np.floor(position + fraction) > np.floor(position)])
    return [subject for subject in table.index if subject in drawn]


def _test_folds(
    table: pd.DataFrame, scheme: str, num_folds: int, rng: np.random.Generator
) -> list[list[str]]:
    """Test parts of cross-validation: every participant in exactly one."""
    sizes = table["site"].value_counts()
    limit = len(sizes) if scheme == "leave_sites_out" else len(table)
    if not 2 <= num_folds <= limit:
        raise CohortError(
            f"{scheme}: expected 2 to {limit} folds for {len(table)} scans of {len(sizes)} sites, "
            f"found {num_folds}."
        )
    if scheme == "site_stratified":
        shuffled = table.iloc[rng.permutation(len(table))].sort_values("site", kind="stable")
        fold = pd.Series(np.arange(len(shuffled)) % num_folds, index=shuffled.index)
    else:
        loads, group = np.zeros(num_folds), {}
        for site, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
            group[site] = int(loads.argmin())  # the largest sites first, each to the emptiest group
            loads[group[site]] += size
        fold = table["site"].map(group)
    return [[s for s in table.index if fold[s] == number] for number in range(num_folds)]


def _held_out_sites(
    table: pd.DataFrame, scheme: str, wanted: int | Sequence[str] | None, rng: np.random.Generator
) -> list[str]:
    """Names of the sites that go into test_sites as a whole."""
    allowed = sorted(table["site"].unique())
    if scheme == "hash":
        trs = table.groupby("site")["tr"]
        fitting = trs.apply(lambda tr: (np.abs(tr - REFERENCE_TR_S) > 1e-3).all())
        allowed = sorted(fitting.index[fitting])
    if wanted is None:
        wanted = 1 if len(allowed) >= 3 else 0
    if isinstance(wanted, int):
        if not 0 <= wanted < len(set(table["site"])) or wanted > len(allowed):
            raise CohortError(
                f"{scheme}: expected at most {len(allowed)} of the sites {some(allowed, 20)} to "
                f"hold out, and one left, found {wanted}."
            )
        return sorted(allowed[i] for i in rng.permutation(len(allowed))[:wanted])
    wrong = [site for site in wanted if site not in allowed]
    if wrong:
        rule = " whose TR is not 2 s" if scheme == "hash" else ""
        raise CohortError(
            f"{scheme}: expected sites{rule} to hold out, found {some(wrong)}. "
            f"Choose among {some(allowed, 20)}."
        )
    return sorted(wanted)
