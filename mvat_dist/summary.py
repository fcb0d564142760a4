"""From score rows to means: what each network reached, how sure that is, and what could not be scored.

A row is a flat dict that is one line of JSONL: ``index``, ``key``, ``model``, ``duration_s``,
``snr_db`` (None where unknown), one value per metric (None where it failed) and ``failure``: the reason
by metric, or None where all have a value. `mvat_dist.evaluate` puts ``subset`` before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]

NOISY = "noisy"
"""Name of the unprocessed input among the models."""

RESAMPLES = 2000
"""Bootstrap resamples: the ends of a 95 % interval then vary by a few percent of its width."""


@dataclass(frozen=True)
class Summary:
    """One metric of one model over the clips that have a value. Higher is better."""

    mean: float | None
    """None where no clip could be scored."""
    low: float | None
    high: float | None
    """95 % bootstrap interval of the mean."""
    clips: int
    """Clips behind the mean."""
    failed: dict[str, int]
    """Clips without a value, by reason."""


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean of `values` and its 95 % percentile bootstrap interval: (mean, low, high).

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13. The clips are the
    units: it says how far the mean would move with other clips of the same kind, not with other seeds
    of the training. Deterministic for equal values and `seed`.
    """
    array = np.asarray(values, np.float64)
    generator = np.random.default_rng(seed)
    # One resample at a time: a matrix of all draws would take gigabytes for large test sets.
    means = [array[generator.integers(0, len(array), len(array))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), float(low), float(high)


def summarise(rows: Iterable[Row], metrics: Sequence[str]) -> dict[str, dict[str, Summary]]:
    """``{model: {metric: Summary}}``, models in the order of their first row."""
    by_model: dict[str, list[Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], []).append(row)
    return {
        model: {metric: _summary(model_rows, metric) for metric in metrics}
        for model, model_rows in by_model.items()
    }


def _summary(rows: Sequence[Row], metric: str) -> Summary:
    values = [row[metric] for row in rows if row[metric] is not None]
    failed = Counter(row["failure"][metric] for row in rows if row[metric] is None)
    mean, low, high = mean_interval(values) if values else (None, None, None)
    return Summary(mean, low, high, len(values), dict(failed))
