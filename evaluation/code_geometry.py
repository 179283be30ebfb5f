"""What P kept of the codebook: its neighbourhoods, and the room between codes.

Beside every figure of alignment stands this one: codes that were copied onto text rows, or drawn
together where text is dense, would fool any probe, and carry less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .errors import EvaluationError
from .probes import as_numpy, finite_rows


def geometry(
    codebook: Any, code_rows: Any, used: Any, neighbours: int = 10, close: float = 0.05
) -> dict[str, Any]:
    """Whether P kept the codebook's geometry, over the used codes.

    Parameters
    ----------
    codebook : float32, shape (codes, code_dim)
        Compared by cosine.
    code_rows : float32, shape (codes, width)
        P(codebook), compared by Euclidean distance.
    used : bool, shape (codes,)
        Or counts; a code above 0 is used.
    neighbours : int
    close : float
        Two codes are close below this share of the median distance.

    Returns
    -------
    dict
        ``neighbour_overlap``: mean share of a code's nearest neighbours in code space that are also
        its nearest in the text space. ``close_pairs`` and ``share_close_pairs``: number and share
        of pairs of `code_rows` that are closer than `close` of the median distance.
        ``close_pairs_codebook``: the same number within the codebook. ``nearest_over_median``:
        the smallest distance by the median one. ``codes``.

    Raises
    ------
    EvaluationError
        Lengths that do not agree, or fewer used codes than `neighbours` + 2.
    """
    codebook, rows = finite_rows(codebook, "codebook"), finite_rows(code_rows, "code_rows")
    chosen = torch.from_numpy(as_numpy(used) > 0)
    if not len(codebook) == len(rows) == len(chosen):
        raise EvaluationError(
            f"geometry needs one row per code in all three: found {len(codebook)} in codebook, "
            f"{len(rows)} in code_rows, {len(chosen)} in used."
        )
    if int(chosen.sum()) < neighbours + 2:
        raise EvaluationError(
            f"geometry compares {neighbours} neighbours of each used code: expected at least "
            f"{neighbours + 2} used codes, found {int(chosen.sum())}. Encode more scans."
        )
    # On unit vectors the order by distance is the order by cosine.
    before, near_before, _ = _neighbourhood(
        F.normalize(codebook[chosen], dim=-1), neighbours, close
    )
    after, near_after, smallest = _neighbourhood(rows[chosen], neighbours, close)
    shared = (before[:, :, None] == after[:, None, :]).any(-1).float().mean()
    count = int(chosen.sum())
    return {
        "codes": count,
        "neighbour_overlap": float(shared),
        "close_pairs": near_after,
        "share_close_pairs": near_after / (count * (count - 1) / 2),
        "close_pairs_codebook": near_before,
        "nearest_over_median": smallest,
    }


def _neighbourhood(
    rows: torch.Tensor, neighbours: int, close: float
) -> tuple[torch.Tensor, int, float]:
    """Nearest rows (rows, neighbours), number of close pairs, smallest distance by the median."""
    rows = rows - rows.mean(0)  # or a common part, squared, would swallow the differences
    # Every pair of at most 2048 rows is enough for a median.
    some = rows[torch.linspace(0, len(rows) - 1, min(2048, len(rows))).long()]
    median = float(torch.pdist(some).median())
    nearest, pairs, smallest = [], 0, float("inf")
    for first in range(0, len(rows), 1024):
        part = torch.cdist(rows[first : first + 1024], rows)
        own = torch.arange(len(part))
        part[own, first + own] = float("inf")
        found = part.topk(neighbours, largest=False)
        nearest.append(found.indices)
        smallest = min(smallest, float(found.values[:, 0].min()))
        pairs += int((part < close * median).sum())
    return torch.cat(nearest), pairs // 2, smallest / median if median > 0 else 0.0
