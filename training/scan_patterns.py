"""Patterns of connectivity for `ScanSummary`: ridge regressions on what a codec's tokens decode to.

A kernel ridge on decoded matrices, written as weights of the tokens' values. Every person fitted
to also gets the scores of the regression without them, in closed form, for the language model
to learn from.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from cortexicon.modeling import AVQLMForConditionalGeneration

from .patterns import balanced_weights, leave_one_out, target_columns

#: Penalties to choose from, of a kernel whose diagonal is about 1. NOTE: none below 0.3, though
#: leave-one-out scores like smaller ones: a codec with `targets` has read these very people, and
#: flatters them. On inner folds 0.3 was best for age, sex and diagnosis alike.
PENALTIES = (0.3, 1.0, 3.0)
_ROWS = 64  # matrices decoded at once


class PatternFit(NamedTuple):
    """What `ScanSummary.start` takes, and the scores of the people that it was fitted to.

    Attributes
    ----------
    mean : float32 tensor, (tokens, code_dim - 1)
    patterns : float32 tensor, (patterns, tokens, code_dim - 1)
    offset : float32 tensor, (patterns,)
    scores : float32 tensor, (scans, patterns)
        Of each person by the regression without that person; mean 0, SD 1.
    """

    mean: torch.Tensor
    patterns: torch.Tensor
    offset: torch.Tensor
    scores: torch.Tensor


def columns_of(
    people: pd.DataFrame, targets: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], slice]]:
    """Each target, and which of `summary_columns` are its own."""
    first = 0
    for target in targets:
        count = len(summary_columns(people, [target]))
        yield target, slice(first, first + count)
        first += count


def summary_columns(
    people: pd.DataFrame, targets: Sequence[dict[str, Any]]
) -> list[tuple[str, np.ndarray]]:
    """Columns to regress, as from `target_columns`, by the targets' own kinds."""
    table = pd.DataFrame(index=people.index)
    for target in targets:
        column = people[target["name"]]
        told = column.astype(str).where(column.notna(), None)
        table[target["name"]] = column if target["kind"] == "number" else told
    return target_columns(table, list(table))


def _correlation(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> float:
    """Weighted Pearson correlation."""
    a, b = (part - np.average(part, weights=weights) for part in (first, second))
    size = (weights * a**2).sum() * (weights * b**2).sum()
    return float((weights * a * b).sum() / np.sqrt(max(size, 1e-30)))


@torch.no_grad()
def connections_of_values(model: AVQLMForConditionalGeneration) -> np.ndarray:
    """Connections that a unit of each token's value brings, float64 (tokens x values, pairs)."""
    codec = model.connectome
    slots = codec.config.num_tokens, codec.config.code_dim - 1
    units = torch.eye(slots[0] * slots[1], device=codec.device).unflatten(1, slots)
    rows = torch.cat([codec.deviations(part).flatten(1).cpu() for part in units.split(_ROWS)])
    regions = round(rows.shape[1] ** 0.5)
    upper = np.triu_indices(regions, 1)
    read: np.ndarray = rows.numpy()[:, upper[0] * regions + upper[1]].astype(np.float64)
    return read


@torch.no_grad()
def fit_patterns(
    model: AVQLMForConditionalGeneration,
    scans: Sequence[np.ndarray],
    columns: Sequence[tuple[str, np.ndarray]],
    read: np.ndarray,
) -> PatternFit:
    """Fit a pattern to each column, with the penalty whose leave-one-out scores go with it best.

    Parameters
    ----------
    model : AVQLMForConditionalGeneration
        With a connectivity stream.
    scans : sequence of int64 (tokens,) or float32 (tokens, code_dim)
        Codes of the people's connectivity, or what they were before quantisation.
    columns : list of (name, float64 (scans,))
        As from `summary_columns`; two classes, 0 and 1, count the same in all. NaN: not fitted to.
    read : float64, (tokens x values, pairs)
        Of `connections_of_values`.
    """
    codec = model.connectome
    vectors = torch.from_numpy(np.stack(scans)).to(codec.device)
    if not vectors.dtype.is_floating_point:
        vectors = codec.quantizer.codebook[vectors]
    values = model.summary.values(vectors)
    mean = values.mean(0)
    away = (values - mean).flatten(1).double().cpu().numpy()
    connections = away @ read  # each in SD of these people
    spread = connections.std(0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-8)
    connections *= scale
    kernel = connections @ connections.T / connections.shape[1]

    patterns, offsets, scores = [], [], []
    for _, column in columns:
        told = np.isfinite(column)
        wanted, own = column[told], kernel[np.ix_(told, told)]
        weights = balanced_weights(wanted)
        fits = [leave_one_out(own, wanted, weights, penalty) for penalty in PENALTIES]
        # NOTE: not by squared error, which shrinks a weak pattern until it ranks people badly: how
        # far scores reach does not matter, they are standardised.
        agreement = [_correlation(found, wanted, weights) for found, _, _ in fits]
        found, dual, intercept = fits[int(np.argmax(agreement))]
        centre, size = found.mean(), max(float(found.std()), 1e-6)
        pattern = read @ (scale * (dual @ connections[told])) / connections.shape[1]
        everyone = away @ pattern + intercept
        everyone[told] = found
        patterns.append(pattern / size)
        offsets.append((intercept - centre) / size)
        scores.append((everyone - centre) / size)

    def tensor(array):
        return torch.from_numpy(np.stack(array)).float()

    return PatternFit(
        mean.cpu(),
        tensor(patterns).unflatten(1, tuple(mean.shape)),
        tensor(offsets),
        tensor(scores).T.contiguous(),
    )
