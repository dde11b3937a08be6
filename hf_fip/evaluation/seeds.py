"""Several runs that differ by their seed alone, as mean ± standard deviation."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """A mean and its sample standard deviation (ddof = 1); one run has no deviation, None.

    `f"{spread}"` is "90.4 ± 3.7", `f"{spread:.2f}"` has two decimals.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        values = [float(value) for value in values]  # of NumPy's types too
        if len(values) == 1:
            return cls(values[0], None)
        finite = all(map(math.isfinite, values))
        return cls(statistics.fmean(values), statistics.stdev(values) if finite else math.nan)

    def __format__(self, spec: str) -> str:
        spec = spec or ".1f"
        mean = format(self.mean, spec)
        return mean if self.deviation is None else f"{mean} ± {format(self.deviation, spec)}"

    def __str__(self) -> str:
        return format(self)


def over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the `report.json` of several runs say, as one report with a [`Spread`] for each number.

    Nested like the reports: `over_seeds(reports)["after"]["asr"]`. What is not a number in each of them is left out,
    so no mean is over fewer runs than there are.

    Raises:
        ValueError: there are no reports, or two of the same `seed`: a run counted twice hides the deviation.
    """
    if not reports:
        raise ValueError("There is no run to take the mean of.")
    seeds = [report["seed"] for report in reports if "seed" in report]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"Two runs have the same seed, of {seeds}: give each run once.")
    return _merge(reports)


def _merge(reports: Sequence[dict]) -> dict:
    merged = {}
    for key in reports[0]:
        values = [report.get(key) for report in reports]
        if all(isinstance(value, dict) for value in values):
            merged[key] = _merge(values)
        elif all(isinstance(value, numbers.Real) and not isinstance(value, bool) for value in values):
            merged[key] = Spread.of(values)
    return merged
