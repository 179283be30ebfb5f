"""Cohorts whose scans say nothing about their subjects: what any system should fail on.

A system is trained and tested on such a cohort exactly as on the true one, and its answers are
scored against the true values. What it still finds, it found elsewhere than in the brain: in the
length of the scan, the number of tokens, the repetition time, the site.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from cortexicon.cohorts import Cohort, build_cohort

from .arguments import TrainingError
from .benchmark_suite import COHORT_CONTROLS

#: Columns that belong to a scan and go where it goes.
OF_SCAN = ("session", "tr", "n_timepoints")
#: Counts the ways `control_cohort` has made them: cells of earlier ones are run again.
KIND = 2


def control_cohort(
    cohort: Cohort,
    control: str,
    targets: Sequence[str],
    seed: int,
    parts: Mapping[str, Sequence[str]] | None = None,
) -> Cohort:
    """The cohort of a control.

    Parameters
    ----------
    cohort : Cohort
    control : str
        ``permuted labels``: each target's values change hands among the subjects who have one,
        those of held-out people among themselves: what is trained on must not even have their
        mean.
        ``another scan``: everybody gets somebody else's scan, with its length and TR.
        ``noise scan``: white noise in place of every scan, of its length and TR.
    targets : sequence of str
    seed : int
    parts : mapping of str to list of str, optional
        The fold: who is held out (test, test_sites), and of which sites training people are.
        Default: nobody is.

    Returns
    -------
    Cohort
        Same subjects, sites and regions. Scans that quality control advised against change like
        all others, for a system may be trained on them too.

    Raises
    ------
    TrainingError
        An unknown control, or a single scan to change hands.
    """
    if control not in COHORT_CONTROLS:
        raise TrainingError(
            f"expected a control of {', '.join(COHORT_CONTROLS)}, found {control!r}."
        )
    generator = np.random.default_rng(seed)
    people = cohort.participants.copy()
    scans = {name: np.asarray(cohort.series(name).values, np.float32) for name in people.index}
    if control == "permuted labels":
        for group in _groups(people, parts):
            for target in targets:
                known = group[people.loc[group, target].notna()]
                values = people.loc[known, target].to_numpy()
                people.loc[known, target] = generator.permutation(values)
    elif control == "another scan":
        # Recommended people keep recommended scans: a cohort refuses others.
        recommended = np.ones(len(people), bool)
        if "recommended" in people:
            recommended = people["recommended"].to_numpy(bool)
        if recommended.sum() < 2:
            raise TrainingError("another scan: expected at least two recommended scans, found one.")
        donors: dict[str, str] = {}
        for group in (people.index[recommended], people.index[~recommended]):
            order = generator.permutation(group.to_numpy())
            # Two people or more: nobody keeps their own.
            donors |= dict(zip(order, np.roll(order, 1), strict=True))
        columns = [name for name in OF_SCAN if name in people]
        people.loc[list(donors), columns] = people.loc[list(donors.values()), columns].to_numpy()
        scans = {name: scans[donor] for name, donor in donors.items()}
    else:
        for name in people.index:
            scans[name] = generator.standard_normal(scans[name].shape).astype(np.float32)
    for column, kind in cohort.participants.dtypes.items():
        people[column] = people[column].astype(kind)
    return build_cohort(
        np.concatenate([scans[name] for name in people.index]),
        people.reset_index(),
        cohort.regions,
        cohort.atlas,
    )


def _groups(people, parts) -> list:
    """Who may exchange labels: held-out people, and people of the training sites but them."""
    if parts is None:
        return [people.index]
    held_out = people.index.isin(
        [s for part in ("test", "test_sites") for s in parts.get(part, ())]
    )
    training = people["site"].isin(set(people.loc[list(parts["train"]), "site"]))
    return [people.index[held_out], people.index[training & ~held_out]]
