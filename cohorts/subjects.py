"""Whose scan a file is: subjects of file names matched to a participants table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from .readers import canonical_subject

#: A shorter id could be a run or an echo when it stands somewhere inside a file's name.
MIN_ID_INSIDE_NAME = 3


def match_subjects(
    subjects: Sequence[str], sources: Sequence[str], participants: Sequence[str]
) -> list[tuple[str, str]]:
    """Find the row of the participants table for every scan.

    ``sub-01``, ``01`` and ``1`` are one person. Where the subject of a file is nobody's id, but its
    name holds one id between separators (``func_0050642_rois``), it is that participant's; the
    longest id counts. Names with a ``sub-`` entity say whose they are and are never searched.

    Parameters
    ----------
    subjects, sources : sequence of str
        Of every scan: what its name says, and its path below the source.
    participants : sequence of str
        Ids of the table.

    Returns
    -------
    list of (str, str)
        Id in the table's spelling, or "" with the reason why there is none.
    """
    ids = {canonical_subject(name): name for name in participants}
    spellings: dict[str, set[str]] = defaultdict(set)
    for subject in subjects:
        spellings[canonical_subject(subject)].add(subject.removeprefix("sub-"))
    matched = []
    for subject, source in zip(subjects, sources, strict=True):
        name = canonical_subject(subject)
        written = sorted(spellings[name])
        if len(written) > 1:
            reason = (
                f"expected one spelling per person, found {', '.join(written)} in file names, "
                "which would be the same subject: rename the files of one of them"
            )
            matched.append(("", reason))
        elif name in ids:
            matched.append((ids[name], ""))
        else:
            inside = [] if "sub-" in source else _inside(f"{subject}/{source}".lower(), ids)
            matched.append(_decide(subject, inside))
    return matched


def _inside(name: str, ids: dict[str, str]) -> list[str]:
    """The longest ids of the table that stand between separators in a file's name."""
    tokens = "".join(char if char.isalnum() else " " for char in name).split()
    runs = {
        "".join(tokens[first:last]).lstrip("0")
        for first in range(len(tokens))
        for last in range(first + 1, min(first + 6, len(tokens)) + 1)
    }
    found = [
        written
        for canonical, written in ids.items()
        if len(canonical) >= MIN_ID_INSIDE_NAME and re.sub(r"[^a-z0-9]", "", canonical) in runs
    ]
    longest = max((len(canonical_subject(text)) for text in found), default=0)
    return [text for text in found if len(canonical_subject(text)) == longest]


def _decide(subject: str, inside: list[str]) -> tuple[str, str]:
    if len(inside) == 1:
        return inside[0], ""
    if not inside:
        return "", f"subject {subject} has no row in the participants table"
    return "", f"subject {subject} could be each of {', '.join(inside)} of the participants table"
