"""R2 of several systems on the same scans, and the differences between them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import EvaluationError
from .scores import bootstrap_interval, interval_of, r2_from_sums, squared_error_sums


class PairedR2:
    """Accumulates errors system by system and scan by scan; keeps two numbers of each.

    R2 is pooled over scans and regions, SST around each scan's own region mean; intervals are 95 %
    over subjects drawn with replacement, the same draws for every system.
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, tuple[float, float]]] = {}

    def add(
        self,
        system: str,
        subject_id: str,
        raw: np.ndarray,
        reconstruction: np.ndarray,
        region_mask: np.ndarray | None = None,
    ) -> None:
        """Score one scan of one system; arguments as `squared_error_sums`.

        Raises
        ------
        EvaluationError
            The subject was scored before, or other windows of it for another system.
        """
        scored = self.sums.setdefault(system, {})
        if subject_id in scored:
            raise EvaluationError(f"{system}: subject {subject_id} was scored already.")
        try:
            sse, sst = squared_error_sums(raw, reconstruction, region_mask)
        except EvaluationError as error:
            raise EvaluationError(f"{system}, subject {subject_id}: {error}") from error
        total = float(np.nansum(sst))
        for name, others in self.sums.items():
            known = others.get(subject_id, (0.0, total))[1]
            if abs(known - total) > 1e-3 * total:
                raise EvaluationError(
                    f"{system}, subject {subject_id}: expected the same windows as for {name}, "
                    f"whose squares sum to {known:.6g}, found {total:.6g}. Systems are compared "
                    "on the same windows of the same scans."
                )
        scored[subject_id] = (float(np.nansum(sse)), total)

    @property
    def subject_ids(self) -> list[str]:
        """Subjects scored for every system, in the order of the first.

        Raises
        ------
        EvaluationError
            A system lacks subjects that another has, or nobody was scored.
        """
        first: dict[str, tuple[float, float]] = next(iter(self.sums.values()), {})
        for name, scored in self.sums.items():
            lacking = [subject for subject in first if subject not in scored]
            extra = [subject for subject in scored if subject not in first]
            if lacking or extra:
                raise EvaluationError(
                    f"{name}: expected the subjects of the other systems, found "
                    f"{len(lacking)} lacking and {len(extra)} more: {(lacking + extra)[:3]}."
                )
        if not first:
            raise EvaluationError("No scan was scored; expected at least one held-out scan.")
        return list(first)

    def r2(self, system: str, subjects: list[str] | None = None) -> float:
        """Pooled R2 of a system over `subjects` (default: all)."""
        chosen = self.subject_ids if subjects is None else subjects
        return self._pooled(self._table(system, chosen), np.arange(len(chosen)))

    def results(self, num_resamples: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
        """One row per system: `system`, `r2`, `r2_interval`, `r2_per_subject`."""
        subjects, rows = self.subject_ids, []
        for system in self.sums:
            table = self._table(system, subjects)
            each = r2_from_sums(table[:, 0], table[:, 1]).tolist()
            interval = interval_of(
                lambda part: self._pooled(part, np.arange(len(part))), (table,), num_resamples, seed
            )
            rows.append(
                {
                    "system": system,
                    "r2": self.r2(system),
                    "r2_interval": interval,
                    "r2_per_subject": dict(zip(subjects, each, strict=True)),
                }
            )
        return rows

    def difference(
        self, system: str, other: str, num_resamples: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        """R2 of `system` minus that of `other`, with its interval over the same subjects."""
        subjects = self.subject_ids
        one, two = self._table(system, subjects), self._table(other, subjects)

        def gap(rows: np.ndarray) -> float:
            return self._pooled(one, rows) - self._pooled(two, rows)

        return {
            "system": system,
            "other": other,
            "difference": gap(np.arange(len(subjects))),
            "interval": list(bootstrap_interval(gap, len(subjects), num_resamples, seed)),
        }

    def _table(self, system: str, subjects: list[str]) -> np.ndarray:
        """SSE and SST, (subjects, 2)."""
        return np.array([self.sums[system][subject] for subject in subjects])

    @staticmethod
    def _pooled(table: np.ndarray, rows: np.ndarray) -> float:
        return float(r2_from_sums(*table[rows].sum(axis=0)))
