"""`cortexicon simulate` and `cortexicon split`: a cohort without data, and its parts."""

import argparse


def simulate(arguments: argparse.Namespace) -> None:
    """Write a simulated cohort."""
    from cortexicon.cohorts import save_cohort, simulate_cohort

    given = {
        name: value
        for name, value in (
            ("num_subjects", arguments.num_subjects),
            ("num_regions", arguments.num_regions),
        )
        if value is not None
    }
    cohort = simulate_cohort(**given, seed=arguments.seed, effect=arguments.effect)
    save_cohort(cohort, arguments.out)
    print(f"{len(cohort)} simulated subjects x {len(cohort.labels)} regions -> {arguments.out}")


def split(arguments: argparse.Namespace) -> None:
    """Divide a cohort's subjects into parts."""
    from cortexicon.cohorts import load_cohort, make_split

    cohort = load_cohort(arguments.cohort)
    split = make_split(cohort, arguments.scheme, seed=arguments.seed)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    split.save(arguments.out)
    for number, parts in enumerate(split.folds):
        sizes = ", ".join(f"{name} {len(subjects)}" for name, subjects in parts.items())
        print(f"fold {number}: {sizes}")
    print(f"split -> {arguments.out}")
