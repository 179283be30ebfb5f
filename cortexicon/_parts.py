"""Which subjects a command runs on: the parts of a split's fold."""

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cortexicon.cohorts import Cohort


def fold_parts(
    arguments: argparse.Namespace, cohort: "Cohort", any_atlas: bool = False
) -> dict[str, list[str]]:
    """Parts of the fold asked for: name to subject ids.

    With `any_atlas` the split may be of another cohort: of the same people in the checkpoint's own
    atlas. Then the parts hold those of them whose scan is here and recommended.
    """
    from cortexicon.cohorts import CohortError, load_split

    split = load_split(arguments.split, None if any_atlas else cohort)
    if not 0 <= arguments.fold < len(split):
        raise CohortError(
            f"{arguments.split}: expected --fold in 0..{len(split) - 1}, found {arguments.fold}."
        )
    parts = dict(split[arguments.fold])
    if split.cohort_hash == cohort.content_hash or not any_atlas:
        return parts
    table = cohort.participants
    here = set(
        table.index[table["recommended"].astype(bool)] if "recommended" in table else table.index
    )
    found = {part: [name for name in names if name in here] for part, names in parts.items()}
    if not any(found.values()):
        raise CohortError(
            f"{arguments.split}: expected a split of the people of {arguments.cohort}, found none "
            "of its subject ids there. Use the split that the checkpoint was trained on."
        )
    lost = sum(map(len, parts.values())) - sum(map(len, found.values()))
    print(f"{lost} of the split's subjects have no recommended scan here", file=sys.stderr)
    return found


def chosen(
    arguments: argparse.Namespace, cohort: "Cohort", any_atlas: bool = False
) -> list[str] | None:
    """Subject ids of the part asked for, or None for everyone."""
    if arguments.split is None:
        return None
    from cortexicon.cohorts import CohortError

    parts = fold_parts(arguments, cohort, any_atlas)
    if arguments.part not in parts:
        raise CohortError(
            f"{arguments.split}: expected --part to be one of {', '.join(parts)}, "
            f"found {arguments.part!r}."
        )
    return list(parts[arguments.part])
