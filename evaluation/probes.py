"""Are codes and text told apart? Fresh probes on held-out types.

The training classifier's own accuracy proves nothing: a starved classifier scores 50 % for free.
So new classifiers are trained afterwards on the rows themselves, and judged on text types and
codes that none of them has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .errors import EvaluationError

PROBES = ("logistic", "quadratic", "mlp")
MIN_TEXT_COUNT = 5  # a type that occurs less often has hardly been trained
MIN_ROWS = 20
CAP = 0.005  # no type gets more of a domain's mass
TRAIN, STOP, TEST = 0, 1, 2
SHARES = (0.4, 0.2, 0.4)  # of types: two equal halves, and a third part for early stopping
STEPS, BATCH, CHECK_EVERY, ITERATIONS, PATIENCE = 400, 256, 20, 40, 8


class _Domain(NamedTuple):
    """One side of a probe: rows float32 (types, width), share and part of each type."""

    rows: torch.Tensor
    share: np.ndarray
    part: np.ndarray


class _Part(NamedTuple):
    """Both sides of one part: rows, labels (1 = text), and weights, half of them on each side."""

    rows: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor


class _Quadratic(nn.Module):
    """A logit that is quadratic in the features: z' A z + b' z + c, where z is x whitened.

    Whitening changes nothing about which surfaces there are, but lets 8,000 coefficients be found
    from 2,000 points before they fit the noise. `weights` (types,) are those of `rows`.
    """

    def __init__(self, rows: torch.Tensor, weights: torch.Tensor):
        super().__init__()
        width = rows.shape[1]
        values, vectors = torch.linalg.eigh((rows * weights[:, None]).T @ rows)
        self.register_buffer("whitening", vectors / (values.clamp(min=0) + 1e-4).sqrt())
        self.form = nn.Parameter(torch.zeros(width, width))
        self.linear = nn.Linear(width, 1)
        self.scale = width**-0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x @ self.whitening
        return self.linear(z) + self.scale * ((z @ self.form) * z).sum(-1, keepdim=True)


def probe_alignment(
    code_rows: Any,
    code_counts: Any,
    text_table: Any,
    text_counts: Any,
    splits: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy at which fresh probes tell P(code) from text embeddings, on types none has seen.

    Text types (>= 5 occurrences) and used codes are cut, anew in every split, into disjoint parts:
    40 % train, 40 % test, 20 % stop the training early. Types weigh by frequency, none above 0.5 %
    of its side, each side one half: training batches are drawn by these weights, features are
    standardised with them on the training part, and accuracies are their exact means.

    Parameters
    ----------
    code_rows : float32, shape (codes, width)
        The projected codebook.
    code_counts : int or float32, shape (codes,)
        How often each code occurs; codes that never occur are left out.
    text_table : float32, shape (types, width)
        The language model's input embeddings.
    text_counts : int64, shape (types,)
        How often each type occurs in the text that the model was trained or is read with.
    splits, seed : int

    Returns
    -------
    dict
        For each of ``logistic``, ``quadratic`` and ``mlp``: ``accuracy`` (mean over splits of
        max(accuracy, 1 - accuracy)), ``sd``, and ``splits``, the accuracies as they are. Besides,
        ``codes`` and ``text_types``: the numbers of rows that served.

    Raises
    ------
    EvaluationError
        Widths or lengths that do not agree, values that are not finite, or too few rows.
    """
    text, text_share = text_types(text_table, text_counts)
    rows, counts = finite_rows(code_rows, "code_rows"), as_numpy(code_counts)
    if len(rows) != len(counts) or rows.shape[1] != text.shape[1]:
        raise EvaluationError(
            f"code_rows must have the text table's width {text.shape[1]} and one row for each of "
            f"the {len(counts)} code_counts, found shape {tuple(rows.shape)}."
        )
    used = _used_codes(counts)
    codes, code_share = rows[torch.from_numpy(used)], capped_share(counts[used])

    def sides(generator: np.random.Generator) -> tuple[_Domain, _Domain]:
        return (
            _Domain(codes, code_share, _parts(len(codes), generator)),
            _Domain(text, text_share, _parts(len(text), generator)),
        )

    return _probe(sides, splits, seed) | {"codes": len(codes), "text_types": len(text)}


def control_rows(
    code_counts: Any, text_table: Any, text_counts: Any, splits: int = 5, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """The rows that any alignment is read against; they depend on no codec but by its counts.

    Parameters
    ----------
    code_counts, text_table, text_counts, splits, seed
        As in `probe_alignment`.

    Returns
    -------
    dict of str to dict
        ``text_against_text``: types against other types, the floor. ``gaussian``: two clouds of
        the same sizes from one Gaussian with the text's mean and covariance. ``copied``: codes that
        are copies of text rows, the cheat; a copy stands in the part of its original, or the probes
        would remember it. Each as `probe_alignment` returns it.

    Raises
    ------
    EvaluationError
        As `probe_alignment`.
    """
    text, share = text_types(text_table, text_counts)
    code_share = capped_share(as_numpy(code_counts)[_used_codes(code_counts)])
    codes = len(code_share)

    def halves(generator: np.random.Generator) -> tuple[_Domain, _Domain]:
        order = generator.permutation(len(text))
        first, second = np.array_split(order, 2)
        return (
            _Domain(text[first], share[first], _parts(len(first), generator)),
            _Domain(text[second], share[second], _parts(len(second), generator)),
        )

    weights = torch.from_numpy(share).to(text)
    mean = weights @ text
    centred = (text - mean) * weights.sqrt()[:, None]
    # (width, width): the symmetric square root of the text's covariance
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def clouds(generator: np.random.Generator) -> tuple[_Domain, _Domain]:
        noise = [generator.standard_normal((n, text.shape[1])) for n in (codes, len(text))]
        first, second = (mean + torch.from_numpy(part).to(text) @ root for part in noise)
        return (
            _Domain(first, code_share, _parts(len(first), generator)),
            _Domain(second, share, _parts(len(second), generator)),
        )

    def copies(generator: np.random.Generator) -> tuple[_Domain, _Domain]:
        original = generator.choice(len(text), codes, p=share)
        part = _parts(len(text), generator)
        return (
            _Domain(text[original], code_share, part[original]),
            _Domain(text, share, part),
        )

    return {
        "text_against_text": _probe(halves, splits, seed)
        | {"codes": len(text) // 2, "text_types": len(text) - len(text) // 2},
        "gaussian": _probe(clouds, splits, seed) | {"codes": codes, "text_types": len(text)},
        "copied": _probe(copies, splits, seed) | {"codes": codes, "text_types": len(text)},
    }


def gap_closed(aligned: dict[str, Any], off: dict[str, Any], floor: dict[str, Any]) -> dict:
    """Share of the gap between `off` and `floor` that `aligned` closes, for each probe.

    1 is at the floor, 0 no better than without the adversary, None where there was no gap.
    """
    shares: dict[str, float | None] = {}
    for probe in PROBES:
        gap = off[probe]["accuracy"] - floor[probe]["accuracy"]
        left = aligned[probe]["accuracy"] - floor[probe]["accuracy"]
        shares[probe] = 1.0 - left / gap if gap > 0 else None
    return shares


def capped_share(counts: np.ndarray, cap: float = CAP) -> np.ndarray:
    """Shares of `counts`, float64 (types,), sum 1, none above `cap`.

    What is cut off goes to the others in proportion. With fewer than 1 / `cap` types the shares are
    equal.
    """
    counts = np.asarray(counts, dtype=np.float64)
    cap = max(cap, 1.0 / len(counts))
    share = counts / counts.sum()
    capped = np.zeros(len(counts), dtype=bool)
    while (share > cap * (1 + 1e-9)).any():
        capped |= share > cap
        rest = counts[~capped].sum()
        left = 1.0 - cap * capped.sum()
        share = np.where(capped, cap, counts * (left / rest if rest > 0 else 0.0))
    return share


# ------------------------------------------------------------------ inside


def _probe(
    sides: Callable[[np.random.Generator], tuple[_Domain, _Domain]], splits: int, seed: int
) -> dict[str, Any]:
    """Accuracies of all probes over `splits` draws of `sides` (codes, text)."""
    if splits < 2:
        raise EvaluationError(f"Probes need at least 2 splits for an SD, found {splits}.")
    found: dict[str, list[float]] = {name: [] for name in PROBES}
    # The probes' initial weights come from torch's global generator: it is given back as it was.
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for split in range(splits):
            generator = np.random.default_rng([seed, split])
            parts = _standardized(*sides(generator))
            for name in PROBES:
                torch.manual_seed(int(generator.integers(2**31)))
                found[name].append(_fit(name, parts, generator))
    return {
        name: {
            "accuracy": float(np.mean([max(value, 1 - value) for value in values])),
            "sd": float(np.std([max(value, 1 - value) for value in values], ddof=1)),
            "splits": values,
        }
        for name, values in found.items()
    }


def _fit(name: str, parts: list[_Part], generator: np.random.Generator) -> float:
    """Train a probe, keep the weights that are best on the stopping part; accuracy on the test.

    NOTE: best by accuracy. By loss, all of them stop after a step or two, because a probe that is
    certain of the types it has seen loses on the others long before it stops telling more of them
    apart: text against a Gaussian with its mean and covariance then looks inseparable (50 %) to the
    MLP that tells three quarters of it apart.
    """
    train, stop, test = parts
    probe = _new_probe(name, train)
    updates = _adam(probe, train, generator) if name == "mlp" else _lbfgs(probe, train)
    best, best_accuracy, waited = {}, -1.0, 0
    for _ in updates:  # each leaves the probe a little further trained
        accuracy = _accuracy(probe, stop)
        waited += 1
        if accuracy > best_accuracy:
            best_accuracy, waited = accuracy, 0
            best = {key: value.clone() for key, value in probe.state_dict().items()}
        if accuracy > 1 - 1e-6 or waited == PATIENCE:
            break
    probe.load_state_dict(best)
    return _accuracy(probe, test)


def _new_probe(name: str, train: _Part) -> nn.Module:
    width = train.rows.shape[1]
    if name == "mlp":
        return nn.Sequential(
            nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1)
        )
    probe = nn.Linear(width, 1) if name == "logistic" else _Quadratic(train.rows, train.weights)
    for parameter in probe.parameters():
        nn.init.zeros_(parameter)
    return probe


def _lbfgs(probe: nn.Module, train: _Part) -> Iterator[None]:
    """Steps of L-BFGS on the exact mean loss over the part."""
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=1, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = F.binary_cross_entropy_with_logits(
            probe(train.rows)[:, 0], train.labels, reduction="none"
        )
        loss = losses @ train.weights
        loss.backward()
        return loss

    for _ in range(ITERATIONS):
        optimizer.step(closure)
        yield


def _adam(probe: nn.Module, train: _Part, generator: np.random.Generator) -> Iterator[None]:
    """Steps of Adam on batches drawn by the types' weights, `CHECK_EVERY` at a time."""
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=1e-2)
    share = train.weights.double().numpy()
    drawn = generator.choice(len(share), (STEPS, BATCH), p=share / share.sum())
    for step, batch in enumerate(torch.from_numpy(drawn), start=1):
        logits = probe(train.rows[batch])[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECK_EVERY == 0:
            yield


@torch.no_grad()
def _accuracy(probe: nn.Module, part: _Part) -> float:
    right = (probe(part.rows)[:, 0] > 0) == (part.labels > 0)
    return float(right.float() @ part.weights)


def _standardized(codes: _Domain, text: _Domain) -> list[_Part]:
    """Training, stopping and test part, in units of the training part's weighted mean and SD."""
    parts = []
    for part in (TRAIN, STOP, TEST):
        sides = [(side, np.flatnonzero(side.part == part)) for side in (codes, text)]
        weights = [0.5 * side.share[index] / side.share[index].sum() for side, index in sides]
        parts.append(
            _Part(
                torch.cat([side.rows[index] for side, index in sides]),
                torch.cat([torch.zeros(len(sides[0][1])), torch.ones(len(sides[1][1]))]),
                torch.from_numpy(np.concatenate(weights)).float(),
            )
        )
    train = parts[TRAIN]
    mean = train.weights @ train.rows
    scale = (train.weights @ (train.rows - mean).square()).sqrt().clamp(min=1e-8)
    return [part._replace(rows=(part.rows - mean) / scale) for part in parts]


def _parts(count: int, generator: np.random.Generator) -> np.ndarray:
    """A part for each of `count` types, int64 (count,), in the shares `SHARES`."""
    bounds = np.round(np.cumsum(SHARES[:2]) * count)
    part = np.searchsorted(bounds, np.arange(count), side="right")
    return generator.permutation(part)


def as_numpy(values: Any) -> np.ndarray:
    """A tensor, an array or a list as an array on the CPU."""
    return np.asarray(torch.as_tensor(values).detach().cpu())


def finite_rows(values: Any, name: str) -> torch.Tensor:
    """`values` as float32 (rows, width); `EvaluationError` where that is not what they are."""
    rows = torch.as_tensor(values).detach().float().cpu()
    if rows.dim() != 2 or not bool(torch.isfinite(rows).all()):
        raise EvaluationError(
            f"{name} must hold finite rows of shape (rows, width), found shape "
            f"{tuple(rows.shape)}{'' if rows.dim() != 2 else ' with values that are not finite'}."
        )
    return rows


def text_types(table: Any, counts: Any) -> tuple[torch.Tensor, np.ndarray]:
    """Rows and capped shares of the types that occur often enough."""
    rows, numbers = finite_rows(table, "text_table"), as_numpy(counts)
    if len(rows) != len(numbers):
        raise EvaluationError(
            f"text_counts must hold one count per row of text_table: expected {len(rows)}, found "
            f"{len(numbers)}. Are both of one language model?"
        )
    kept = np.flatnonzero(numbers >= MIN_TEXT_COUNT)
    if len(kept) < MIN_ROWS:
        raise EvaluationError(
            f"Probes need at least {MIN_ROWS} text types with {MIN_TEXT_COUNT} occurrences, found "
            f"{len(kept)}. Count the tokens of more text."
        )
    return rows[torch.from_numpy(kept)], capped_share(numbers[kept])


def _used_codes(counts: Any) -> np.ndarray:
    """Indices of the codes that occur."""
    used = np.flatnonzero(as_numpy(counts) > 0)
    if len(used) < MIN_ROWS:
        raise EvaluationError(
            f"Probes need at least {MIN_ROWS} used codes, found {len(used)}. Encode more scans."
        )
    return used
